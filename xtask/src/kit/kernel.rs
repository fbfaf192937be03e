//! The distribution's signed cloud kernel: found through apt, downloaded, unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::{checksum, modules::in_order};
use crate::process;

/// Depends on the newest kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const APT_LIMIT: Duration = Duration::from_secs(5 * 60);
const UNPACK_LIMIT: Duration = Duration::from_secs(2 * 60);

/// The kernel's package.
#[derive(Debug, PartialEq, Eq)]
pub struct Package {
    name: String,
    version: String,
}

impl Package {
    /// The kernel that the distribution offers now.
    pub fn find() -> Result<Self> {
        let show = || process::capture("apt-cache", apt("apt-cache").args(["show", "--no-all-versions", META_PACKAGE]), APT_LIMIT);
        let (_, mut record) = show()?;
        if newest_kernel(&record).is_none() {
            // A fresh machine may not have the lists yet.
            process::output("apt-get update", apt("apt-get").args(["update", "--quiet=2"]), APT_LIMIT)?;
            (_, record) = show()?;
        }
        newest_kernel(&record).with_context(|| format!("apt offers no {META_PACKAGE}: the guest kit needs Debian's package sources"))
    }

    /// Names the package's exact contents.
    pub fn identity(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// The kernel's release, as `uname -r` would say.
    pub fn release(&self) -> &str {
        self.name.trim_start_matches("linux-image-")
    }

    /// Downloads the package into `cache` unless it is there, and unpacks it into a temporary directory.
    pub fn unpack(&self, cache: &Path) -> Result<Kernel> {
        let archive = self.download(cache)?;
        let root = tempfile::Builder::new().prefix("unpacked-").tempdir_in(cache).context("making a directory for the kernel")?;
        let mut unpack = Command::new("dpkg-deb");
        process::output("dpkg-deb", unpack.arg("--extract").arg(&archive).arg(root.path()), UNPACK_LIMIT)?;
        Ok(Kernel { root: Rc::new(root), release: self.release().to_owned() })
    }

    fn download(&self, cache: &Path) -> Result<PathBuf> {
        fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
        let exact = format!("{}={}", self.name, self.version);
        let record = process::output("apt-cache", apt("apt-cache").args(["show", &exact]), APT_LIMIT)?;
        let expected = field(&record, "SHA256").with_context(|| format!("apt knows no checksum for {exact}"))?;
        // Debian's version characters are safe in a file name, except for the epoch's colon.
        let archive = cache.join(format!("{}_{}.deb", self.name, self.version.replace(':', "%3a")));
        if checksum(&archive).is_ok_and(|actual| actual.sha256 == expected) {
            return Ok(archive);
        }
        let scratch = tempfile::tempdir_in(cache).context("making a directory for the download")?;
        process::output("apt-get download", apt("apt-get").args(["download", &exact]).current_dir(scratch.path()), APT_LIMIT)?;
        let downloaded = fs::read_dir(scratch.path()).context("looking for the download")?.next();
        let downloaded = downloaded.with_context(|| format!("apt-get download left no file for {exact}"))??.path();
        if checksum(&downloaded)?.sha256 != expected {
            bail!("the package {exact} as downloaded does not have the checksum {expected} that apt promised");
        }
        fs::rename(&downloaded, &archive).with_context(|| format!("moving the download to {}", archive.display()))?;
        Ok(archive)
    }
}

/// An unpacked kernel. Its files go when the last clone does.
#[derive(Debug, Clone)]
pub struct Kernel {
    root: Rc<TempDir>,
    release: String,
}

impl Kernel {
    /// Copies the bootable image.
    pub fn copy_image(&self, to: &Path) -> Result<()> {
        let image = self.root.path().join("boot").join(format!("vmlinuz-{}", self.release));
        fs::copy(&image, to).with_context(|| format!("copying {}", image.display()))?;
        Ok(())
    }

    /// The files of modules, each after those it depends on.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        // The package leaves this to its installation.
        let mut depmod = Command::new("/usr/sbin/depmod");
        process::output("depmod", depmod.arg("--basedir").arg(self.root.path()).arg(&self.release), UNPACK_LIMIT)?;
        let directory = self.root.path().join("lib/modules").join(&self.release);
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
        let files = in_order(wanted, &dependencies, &builtin)?;
        Ok(files.iter().map(|file| directory.join(file)).collect())
    }
}

fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    // Downloads go to our directory, which apt's own user may not be allowed to enter.
    command.env("LC_ALL", "C").args(["-o", "APT::Sandbox::User=root"]);
    command
}

/// The kernel that the meta package's record depends on: `linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)`.
fn newest_kernel(record: &str) -> Option<Package> {
    field(record, "Depends")?.split(',').find_map(|dependency| {
        let (name, version) = dependency.trim().split_once(" (= ")?;
        let version = version.strip_suffix(')')?;
        name.starts_with("linux-image-").then(|| Package { name: name.to_owned(), version: version.to_owned() })
    })
}

fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meta_package_names_the_kernel() {
        let record = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        let package = newest_kernel(record).unwrap();
        assert_eq!(package.identity(), "linux-image-6.1.0-56-cloud-amd64 6.1.192-2");
        assert_eq!(package.release(), "6.1.0-56-cloud-amd64");
        assert_eq!(newest_kernel("N: Unable to locate package linux-image-cloud-amd64\n"), None);
        assert_eq!(newest_kernel("Depends: libc6 (= 1), linux-headers (>= 2)\n"), None);
    }
}
