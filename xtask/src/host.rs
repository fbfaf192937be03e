//! The distribution's packages that Hearth needs, installed when they are missing.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use crate::process;

/// Package, and a file that tells that it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("ca-certificates", "/etc/ssl/certs/ca-certificates.crt"),
    ("cpio", "/usr/bin/cpio"),
    ("curl", "/usr/bin/curl"),
    ("e2fsprogs", "/usr/sbin/mkfs.ext4"),
    ("iproute2", "/usr/sbin/ip"),
    ("kmod", "/usr/bin/kmod"),
    ("libnss3-tools", "/usr/bin/certutil"),
    ("libnss-myhostname", "/usr/lib/x86_64-linux-gnu/libnss_myhostname.so.2"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("mount", "/usr/bin/mount"),
    ("nftables", "/usr/sbin/nft"),
    ("openssl", "/usr/bin/openssl"),
    ("pebble", "/usr/bin/pebble"),
    ("procps", "/usr/bin/pgrep"),
    ("runc", "/usr/sbin/runc"),
    ("zip", "/usr/bin/zip"),
    ("zstd", "/usr/bin/zstd"),
];

const WRK: (&str, &str) = ("wrk", "/usr/bin/wrk");
/// As [`PACKAGES`]: a browser, its store of certificates, load generators, and a program that needs no file system around it.
const CLIENTS: &[(&str, &str)] = &[
    ("apache2-utils", "/usr/bin/htpasswd"),
    // Its program is where that of the package `busybox` is, which is linked otherwise.
    ("busybox-static", "/var/lib/dpkg/info/busybox-static.list"),
    ("chromium-headless-shell", "/usr/bin/chromium-headless-shell"),
    ("libnss3-tools", "/usr/bin/certutil"),
    ("nghttp2-client", "/usr/bin/h2load"),
    WRK,
];

const QEMU: &str = "qemu-system-x86";
const QEMU_UTILS: &str = "qemu-utils";
const APT_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Installs what is missing. Says nothing when everything is there.
pub fn ensure() -> Result<()> {
    let mut wanted: Vec<String> = missing(PACKAGES).map(str::to_owned).collect();
    let pair = qemu_pair();
    if wanted.is_empty() && matches!(&pair, Ok((emulator, img)) if emulator == img) {
        return Ok(());
    }
    if !geteuid().is_root() {
        wanted.extend(pair.is_err().then(|| format!("{QEMU} {QEMU_UTILS}")));
        bail!("these packages are missing, and installing them needs root: {}", wanted.join(" "));
    }
    apt("updating the package lists", &["update"])?;
    if !matches!(&pair, Ok((emulator, img)) if emulator == img) {
        wanted.extend(qemu_packages()?);
    }
    println!("installing {}", wanted.join(" "));
    let mut arguments = vec!["install", "--yes", "--no-install-recommends", "--allow-downgrades"];
    arguments.extend(wanted.iter().map(String::as_str));
    apt("installing packages", &arguments)?;
    let (emulator, img) = qemu_pair()?;
    if emulator != img {
        bail!("QEMU is {emulator} but qemu-img is {img}: they must be of one version, because both write the same disk images");
    }
    Ok(())
}

/// Installs the module that makes virtual environments for the distribution's Python.
pub fn ensure_python_venv() -> Result<()> {
    ensure_extra("no Python 3 here can make virtual environments", &["python3-venv"])
}

/// Installs Node.js and npm unless there are some already, from wherever.
pub fn ensure_node() -> Result<()> {
    let there = |program: &str| process::output(program, Command::new(program).arg("--version"), Duration::from_secs(30)).is_ok();
    if there("node") && there("npm") {
        return Ok(());
    }
    ensure_extra("the JavaScript SDK's tests need Node.js and npm", &["nodejs", "npm"])
}

/// Installs the load generator.
pub fn ensure_wrk() -> Result<()> {
    ensure_programs("measuring requests per second needs wrk", &[WRK])
}

/// Installs the clients that the whole-system tests drive beside those of Python and Node.
pub fn ensure_clients() -> Result<()> {
    ensure_programs("the whole-system tests need programs", CLIENTS)
}

fn ensure_programs(why: &str, packages: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = missing(packages).collect();
    if missing.is_empty() { Ok(()) } else { ensure_extra(why, &missing) }
}

/// Names of the packages whose file is not there.
fn missing<'a>(packages: &'a [(&str, &str)]) -> impl Iterator<Item = &'a str> {
    packages.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name)
}

fn ensure_extra(why: &str, packages: &[&str]) -> Result<()> {
    if !geteuid().is_root() {
        bail!("{why}, and installing needs root: {}", packages.join(" "));
    }
    apt("updating the package lists", &["update"])?;
    println!("installing {}", packages.join(" "));
    apt("installing packages", &[&["install", "--yes", "--no-install-recommends"], packages].concat())
}

/// QEMU and qemu-img with versions. The two break each other's packages when their versions differ, and apt keeps a newer one of a
/// backport that is already installed, so the version is always named: the candidate of the emulator.
fn qemu_packages() -> Result<Vec<String>> {
    let policy =
        process::output("apt-cache", Command::new("apt-cache").env("LC_ALL", "C").args(["policy", QEMU]), Duration::from_secs(60))?;
    let version = candidate(&policy).with_context(|| format!("the distribution offers no {QEMU}"))?;
    let mut packages = vec![format!("{QEMU}={version}"), format!("{QEMU_UTILS}={version}")];
    let common = "qemu-system-common";
    let installed = Command::new("dpkg-query").args(["--show", common]).output().is_ok_and(|output| output.status.success());
    if installed {
        packages.push(format!("{common}={version}"));
    }
    Ok(packages)
}

fn candidate(policy: &str) -> Option<&str> {
    policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: ")).filter(|version| *version != "(none)")
}

/// Versions of the emulator and of its disk image tool.
fn qemu_pair() -> Result<(String, String)> {
    Ok((qemu_version("qemu-system-x86_64")?, qemu_version("qemu-img")?))
}

fn qemu_version(program: &str) -> Result<String> {
    let text = process::output(program, Command::new(program).arg("--version"), Duration::from_secs(30))?;
    version_in(&text).map(str::to_owned).with_context(|| format!("{program} --version says {text:?}"))
}

/// The number after the word "version".
fn version_in(text: &str) -> Option<&str> {
    text.split_whitespace().skip_while(|word| *word != "version").nth(1)
}

fn apt(what: &str, arguments: &[&str]) -> Result<()> {
    // Another apt may run on a fresh machine: wait for its lock instead of failing.
    process::run(
        what,
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["--quiet=2", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"])
            .args(arguments),
        APT_LIMIT,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7+deb12u18+b3\n  Version table:\n";
        assert_eq!(candidate(policy), Some("1:7.2+dfsg-7+deb12u18+b3"));
        assert_eq!(candidate("x:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn both_tools_versions_compare() {
        let emulator = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 Fabrice Bellard\n";
        let img = "qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\n";
        assert_eq!(version_in(emulator), Some("7.2.22"));
        assert_eq!(version_in(img), Some("10.0.2"));
    }
}
