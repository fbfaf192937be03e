//! The image builder's root file system: Docker's daemon with BuildKit inside, in a Debian of its own.
//!
//! Its release is later than most hosts', because Dockerfiles are written for today's BuildKit. The daemon and what belongs to it come from
//! the release after that: Debian 13 has BuildKit 0.13, which knows neither `COPY --exclude` nor symbolic permissions.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};

use super::{
    base::{SOURCE_DATE_EPOCH, Sources},
    fingerprint,
    kernel::Kernel,
    modules,
};
use crate::process;

const SUITE: &str = "trixie";
/// Where the packages of [`NEWER`] come from.
const NEWER_SUITE: &str = "forky";
const NEWER: &[&str] = &["containerd", "crun", "docker-buildx", "docker-cli", "docker.io", "runc"];
/// Further packages: certificates and git for what Dockerfiles fetch, decompressors for what they ADD, ext4 for the result.
const PACKAGES: &[&str] = &[
    "bzip2",
    "ca-certificates",
    "crun",
    "docker-buildx",
    "docker-cli",
    "docker.io",
    "e2fsprogs",
    "git",
    "iproute2",
    "kmod",
    "nftables",
    "xz-utils",
];
/// Left out of the packages: what no build uses.
const TRIMMED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/bash-completion/*",
    "/usr/bin/ctr",
    "/usr/bin/containerd-stress",
    "/usr/sbin/docker-proxy",
];
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// How the root file system is made.
#[derive(Debug)]
pub struct Recipe {
    mirror: String,
}

impl Recipe {
    /// From the mirror that the host's own packages come from.
    pub fn new(sources: &Sources) -> Result<Self> {
        Ok(Self { mirror: sources.mirror().context("apt has no archive of Debian here")?.to_owned() })
    }

    /// Names the inputs. The packages' own versions are not among them: a builder stays until it is deleted.
    pub fn identity(&self) -> String {
        let lists = [NEWER.join(" "), PACKAGES.join(" "), TRIMMED.join(" ")];
        fingerprint(&[SUITE, NEWER_SUITE, &self.mirror, &lists[0], &lists[1], &lists[2]])
    }

    /// Writes the root file system as a tar archive, with modules of the kernel that it is booted with in a machine.
    pub fn build(&self, archive: &Path, kernel: &Kernel) -> Result<()> {
        let scratch = tempfile::tempdir().context("making a directory for apt's preferences")?;
        let modules = scratch.path().join("modules");
        write_modules(&modules, kernel)?;
        let preferences = scratch.path().join("preferences");
        let pins = format!(
            "Package: *\nPin: release n={NEWER_SUITE}\nPin-Priority: 100\n\nPackage: {}\nPin: release n={NEWER_SUITE}\nPin-Priority: 900\n",
            NEWER.join(" ")
        );
        fs::write(&preferences, pins).context("writing apt's preferences")?;
        let mut command = Command::new("mmdebstrap");
        command.env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH).env("LC_ALL", "C.UTF-8");
        command.args(["--quiet", "--variant=minbase", "--format=tar"]).arg(format!("--include={}", PACKAGES.join(",")));
        command.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\""]);
        for path in TRIMMED {
            command.arg(format!("--dpkgopt=path-exclude={path}"));
        }
        command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
        command.arg(format!(
            "--setup-hook=mkdir -p \"$1/etc/apt/preferences.d\" && cp {} \"$1/etc/apt/preferences.d/builder\"",
            preferences.display()
        ));
        // Where the sandbox mounts what it gets: its own root may not make directories in here.
        command.arg("--customize-hook=mkdir -p \"$1\"/build \"$1\"/hearth \"$1\"/var/lib/docker");
        command.arg("--customize-hook=: > \"$1\"/hearth/base.tar; : > \"$1\"/etc/resolv.conf; echo 127.0.0.1 localhost > \"$1\"/etc/hosts; rm -f \"$1\"/etc/hostname");
        command.arg(format!("--customize-hook=cp -r {} \"$1\"/hearth/modules", modules.display()));
        command.arg(SUITE).arg(archive);
        command.arg(format!("deb {} {SUITE} main", self.mirror));
        command.arg(format!("deb {} {SUITE}-updates main", self.mirror));
        // A release that is not stable yet dates its lists, and a mirror may be behind. The lists are signed all the same.
        command.arg(format!("deb [check-valid-until=no] {} {NEWER_SUITE} main", self.mirror));
        process::output("mmdebstrap", &mut command, LIMIT).map(drop)
    }
}

/// Modules, and the order to insert them in.
fn write_modules(dir: &Path, kernel: &Kernel) -> Result<()> {
    let mut order = String::new();
    fs::create_dir(dir).context("making a directory for the builder's modules")?;
    for module in kernel.modules(modules::FOR_BUILDER)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a kernel module without a name")?;
        fs::copy(&module, dir.join(name)).with_context(|| format!("copying {}", module.display()))?;
        order.push_str(name);
        order.push('\n');
    }
    fs::write(dir.join("order"), order).context("writing the order of the builder's modules")
}
