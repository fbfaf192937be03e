//! The stand-in for the managed base image: a minimal Debian root file system that trusts whom this host trusts and understands what
//! Dockerfiles for Amazon Linux 2023 say. `docs/base-image.md` says how far.

mod files;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::{checksum, fingerprint};
use crate::process;

const LOCAL_CERTIFICATES: &str = "/usr/local/share/ca-certificates";
/// Files are not dated after this, 2025-01-01, so that one set of packages always gives the same bytes.
pub(super) const SOURCE_DATE_EPOCH: &str = "1735689600";
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Left out of every package, now and when the image's users install more.
const TRIMMED: [&str; 4] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// Left out as well: Debian's pip refuses to install into a system with this mark, Amazon Linux has no such mark.
const PIP_REFUSAL: &str = "/usr/lib/python3*/EXTERNALLY-MANAGED";

/// What Amazon Linux's minimal image has and Debian's smallest has not.
const PACKAGES: &str = "ca-certificates,curl";

/// What useradd does without options, on Amazon Linux: it makes a home, and the shell is bash.
const USERS: &str =
    r#"chroot "$1" sh -ec 'sed -i "s|^SHELL=.*|SHELL=/bin/bash|" /etc/default/useradd; echo "CREATE_HOME yes" >> /etc/login.defs'"#;

/// Packages register manual pages as alternatives, and some, such as Java, fail where the directories are missing. The pages are left out.
const MANUALS: &str = r#"for section in 1 2 3 4 5 6 7 8 9; do mkdir -p "$1/usr/share/man/man$section"; done"#;

/// The file that says what the system is keeps its place, whatever Debian's package does at its next upgrade.
const DIVERSION: &str = r#"chroot "$1" dpkg-divert --quiet --local --rename --add /usr/lib/os-release"#;

/// Where the packages come from and what is added to them.
#[derive(Debug)]
pub struct Sources {
    suite: String,
    /// Debian's version for readers, such as 12.
    debian: String,
    /// One-line entries of sources.list(5).
    entries: Vec<String>,
    /// The host's own additions to the distribution's certificate authorities.
    certificates: Vec<PathBuf>,
}

impl Sources {
    /// What this host uses itself.
    pub fn find() -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let value = |name: &str| release.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_matches('"').to_owned()));
        let suite = value("VERSION_CODENAME=").context("/etc/os-release has no VERSION_CODENAME")?;
        // Debian's next release has no version yet.
        let debian = value("VERSION_ID=").unwrap_or_else(|| suite.clone());
        let mut command = Command::new("apt-get");
        let format = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
        command.env("LC_ALL", "C").args(["indextargets", "--format", format, "Created-By: Packages"]);
        let targets = process::output("apt-get indextargets", &mut command, LIMIT)?;
        let entries = entries(&targets, &suite);
        if entries.is_empty() {
            bail!("apt has no lists of Debian {suite} here: run `apt-get update`");
        }
        Ok(Self { suite, debian, entries, certificates: local_certificates(Path::new(LOCAL_CERTIFICATES))? })
    }

    /// Names the image's inputs. The packages' own versions are not among them: an image stays until it is deleted.
    pub fn identity(&self, standin: &Path) -> Result<String> {
        let mut parts = vec![self.suite.clone(), self.entries.join("\n"), SOURCE_DATE_EPOCH.to_owned(), checksum(standin)?.sha256];
        parts.extend(self.arguments());
        parts.extend(self.files().into_iter().map(|entry| format!("{entry:?}")));
        for path in &self.certificates {
            parts.push(path.display().to_string());
            parts.push(fs::read_to_string(path).unwrap_or_default());
        }
        Ok(fingerprint(&parts.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Address of the distribution's archive.
    pub fn mirror(&self) -> Option<&str> {
        let of = |entry: &'_ String| entry.split_whitespace().nth(2) == Some(self.suite.as_str());
        self.entries.iter().find(|entry| of(entry)).and_then(|entry| entry.split_whitespace().nth(1))
    }

    fn files(&self) -> Vec<(&'static str, files::Entry)> {
        files::files(&self.suite, &self.debian, !self.certificates.is_empty())
    }

    /// Writes the image as a tar archive. `standin` is the program that is `dnf` in it.
    pub fn build(&self, archive: &Path, standin: &Path) -> Result<()> {
        let additions = tempfile::tempdir().context("making a directory for the base image's files")?;
        files::write(additions.path(), &self.files(), standin)?;
        let mut command = Command::new("mmdebstrap");
        command.env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH).env("LC_ALL", "C.UTF-8");
        command.args(self.arguments());
        for path in &self.certificates {
            command.arg(format!("--customize-hook=copy-in {} {LOCAL_CERTIFICATES}", path.display()));
        }
        command.arg("--customize-hook=chroot \"$1\" update-ca-certificates");
        command.arg(format!("--customize-hook=sync-in {} /", additions.path().display()));
        // What the host lent for the making; the guest writes its own.
        command.arg("--customize-hook=rm -f \"$1\"/etc/resolv.conf \"$1\"/etc/hostname \"$1\"/var/cache/ldconfig/aux-cache");
        command.arg(&self.suite).arg(archive).args(&self.entries);
        process::output("mmdebstrap", &mut command, LIMIT).map(drop)
    }

    /// Arguments that are the same on every host.
    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = ["--quiet", "--variant=minbase", "--format=tar"].map(str::to_owned).into();
        arguments.push(format!("--include={PACKAGES}"));
        // The directories are merged from the start, so the package that would do it later, and its 50 MB of Perl, stay out.
        arguments.push("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr".to_owned());
        arguments.push("--include=usr-is-merged".to_owned());
        arguments.push("--aptopt=APT::Install-Recommends \"false\"".to_owned());
        arguments.push("--aptopt=Acquire::Languages \"none\"".to_owned());
        // Lists that stay in a layer take 19 MB instead of 52.
        arguments.push("--aptopt=Acquire::GzipIndexes \"true\"".to_owned());
        arguments.extend(TRIMMED.iter().chain([&PIP_REFUSAL]).map(|path| format!("--dpkgopt=path-exclude={path}")));
        // Licences stay with what they permit.
        arguments.push("--dpkgopt=path-include=/usr/share/doc/*/copyright".to_owned());
        // A build that is cut off is thrown away, so nothing is won by waiting for the disk after each package.
        arguments.push("--dpkgopt=force-unsafe-io".to_owned());
        // The image has one of its own.
        arguments.push("--skip=chroot/policy-rc.d".to_owned());
        arguments.push(format!("--customize-hook={USERS}"));
        arguments.push(format!("--customize-hook={DIVERSION}"));
        arguments.push(format!("--customize-hook={MANUALS}"));
        arguments
    }
}

/// Entries of the distribution's own archives among apt's targets, one `origin|uri|release|component` a line.
fn entries(targets: &str, suite: &str) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    for target in targets.lines() {
        let [origin, uri, release, component] = target.split('|').collect::<Vec<_>>()[..] else { continue };
        let archive = release.split('-').next().unwrap_or(release);
        let entry = format!("deb {uri} {release} {component}");
        if origin == "Debian" && archive == suite && !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    entries
}

fn local_certificates(directory: &Path) -> Result<Vec<PathBuf>> {
    let Ok(files) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut certificates = Vec::new();
    for file in files {
        let path = file.with_context(|| format!("reading {}", directory.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "crt") {
            certificates.push(path);
        }
    }
    certificates.sort();
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_distributions_own_archives_are_used() {
        let targets = "Debian|http://deb.example/debian/|bookworm|main\nDebian|http://deb.example/debian/|bookworm|main\nDebian|http://deb.example/debian/|bookworm-updates|main\nDebian Backports|http://deb.example/debian/|bookworm-backports|main\nSomebody|https://packages.example/apt/|stable|main\nDebian|http://deb.example/debian/|trixie|main\nW: noise\n";
        assert_eq!(
            entries(targets, "bookworm"),
            ["deb http://deb.example/debian/ bookworm main", "deb http://deb.example/debian/ bookworm-updates main"]
        );
    }

    #[test]
    fn certificates_are_found_in_order() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["b.crt", "a.crt", "readme.txt"] {
            fs::write(scratch.path().join(name), "").unwrap();
        }
        assert_eq!(local_certificates(scratch.path()).unwrap(), [scratch.path().join("a.crt"), scratch.path().join("b.crt")]);
        assert!(local_certificates(&scratch.path().join("nowhere")).unwrap().is_empty());
    }
}
