//! Compiles what runs inside images, the guest's PID 1 and the base image's stand-in for dnf, as static programs that are the same
//! wherever they are compiled.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::process;

/// glibc links statically with `crt-static`, so that no further toolchain target is needed.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// Where the programs are.
#[derive(Debug)]
pub struct Programs {
    /// PID 1 of MicroVMs.
    pub guest: PathBuf,
    /// `dnf` and the like in the base image.
    pub standin: PathBuf,
}

/// Builds the programs, if anything has changed. Their flags differ from the workspace's, so they have a target directory of their own:
/// neither build makes the other start afresh.
pub fn build(target_dir: &Path) -> Result<Programs> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is not inside a work tree")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(root)
        .args(["build", "--quiet", "--package", "hearth-guest", "--package", "hearth-standin"])
        .args(["--profile", "guest", "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(root));
    process::run("building hearth-guest and hearth-standin", &mut command, LIMIT)?;
    let made = target_dir.join(TARGET).join("guest");
    Ok(Programs { guest: made.join("hearth-guest"), standin: made.join("hearth-standin") })
}

/// Separated by the unit separator, as cargo wants it.
fn flags(root: &Path) -> OsString {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(|| Path::new(&home).join(".cargo"), PathBuf::from);
    let mut flags = OsString::from("-Ctarget-feature=+crt-static");
    // Panic messages name source files: they should not differ from machine to machine.
    for (from, to) in [(root, "/hearth"), (&cargo_home, "/cargo")] {
        flags.push("\u{1f}--remap-path-prefix=");
        flags.push(from);
        flags.push("=");
        flags.push(to);
    }
    flags
}
