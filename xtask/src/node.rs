//! The JavaScript SDK that the conformance tests use, in the target directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{host, process};

const NPM_LIMIT: Duration = Duration::from_secs(5 * 60);

/// Installs what `package` names, or leaves it as it is when it was installed for the same file. Returns the directory of `node_modules`.
pub fn ensure(target: &Path, package: &Path) -> Result<PathBuf> {
    host::ensure_node()?;
    let dir = target.join("node");
    let text = fs::read(package).with_context(|| format!("reading {}", package.display()))?;
    let digest = format!("{:x}", Sha256::digest(&text));
    let stamp = dir.join("package.sha256");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == digest) {
        return Ok(dir);
    }
    println!("installing the JavaScript SDK in {}", dir.display());
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    fs::write(dir.join("package.json"), &text).with_context(|| format!("writing into {}", dir.display()))?;
    process::run(
        "installing the JavaScript SDK",
        Command::new("npm").current_dir(&dir).args([
            "install",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--loglevel=error",
        ]),
        NPM_LIMIT,
    )?;
    fs::write(&stamp, digest).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(dir)
}
