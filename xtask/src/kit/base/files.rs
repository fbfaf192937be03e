//! What the stand-in has of Amazon Linux beside Debian's packages: the commands, and files that scripts look at.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use anyhow::{Context, Result};
use walkdir::WalkDir;

/// The program that `dnf` and the others are.
const PROGRAM: &str = "usr/lib/hearth/hearth-standin";
const COMMANDS: [&str; 7] = ["dnf", "dnf-3", "microdnf", "yum", "yum-config-manager", "rpm", "amazon-linux-extras"];

/// The table of names, from the program's crate.
const TABLE: &str = include_str!("../../../../crates/standin/packages.tsv");

/// The certificate authorities of a Debian system, one file.
pub const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    File { contents: String, mode: u32 },
    Link(String),
    Directory,
}

/// Everything but the program, by its path in the image.
pub fn files(suite: &str, debian: &str, more_certificates: bool) -> Vec<(&'static str, Entry)> {
    let file = |contents: &str| Entry::File { contents: contents.to_owned(), mode: 0o644 };
    let script = |contents: &str| Entry::File { contents: contents.to_owned(), mode: 0o755 };
    let link = |target: &str| Entry::Link(target.to_owned());
    let mut files = vec![
        ("usr/share/hearth/dnf-packages", file(TABLE)),
        ("usr/lib/os-release", file(&os_release(suite, debian))),
        ("etc/system-release", file(&format!("Amazon Linux release 2023 (stand-in on Debian {debian})\n"))),
        ("etc/amazon-linux-release", link("system-release")),
        ("etc/dnf/dnf.conf", file(include_str!("dnf.conf"))),
        ("etc/yum.conf", link("dnf/dnf.conf")),
        ("etc/yum.repos.d", Entry::Directory),
        ("etc/pki/ca-trust/source/anchors", Entry::Directory),
        ("etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", link(BUNDLE)),
        ("etc/pki/tls/certs/ca-bundle.crt", link(BUNDLE)),
        ("etc/pki/tls/cert.pem", link(BUNDLE)),
        ("usr/bin/update-ca-trust", script(include_str!("update-ca-trust"))),
        ("usr/sbin/alternatives", link("/usr/bin/update-alternatives")),
        ("usr/sbin/policy-rc.d", script(include_str!("policy-rc.d"))),
    ];
    if more_certificates {
        // Debian's pip trusts the system's authorities; one that replaced itself may bring its own.
        files.push(("etc/pip.conf", file(&format!("[global]\ncert = {BUNDLE}\n"))));
    }
    files
}

/// As Amazon Linux 2023 has it. Debian is named where scripts look for what a system is like, and for the release of its archives.
fn os_release(suite: &str, debian: &str) -> String {
    format!(
        "NAME=\"Amazon Linux\"\nVERSION=\"2023\"\nID=\"amzn\"\nID_LIKE=\"debian fedora\"\nVERSION_ID=\"2023\"\n\
         VERSION_CODENAME={suite}\nPLATFORM_ID=\"platform:al2023\"\nPRETTY_NAME=\"Amazon Linux 2023 (stand-in on Debian {debian})\"\n\
         CPE_NAME=\"cpe:2.3:o:amazon:amazon_linux:2023\"\nVARIANT=\"stand-in on Debian {debian}\"\nVARIANT_ID=hearth-standin\n"
    )
}

/// Puts everything into a directory. What may be done with it does not depend on this process's umask.
pub fn write(directory: &Path, files: &[(&str, Entry)], program: &Path) -> Result<()> {
    for (path, entry) in files {
        put(&directory.join(path), entry)?;
    }
    let into = directory.join(PROGRAM);
    let doing = || format!("copying {}", program.display());
    fs::create_dir_all(into.parent().expect("it has a directory")).with_context(doing)?;
    fs::copy(program, &into).with_context(doing)?;
    fs::set_permissions(&into, PermissionsExt::from_mode(0o755)).with_context(doing)?;
    for command in COMMANDS {
        put(&directory.join("usr/bin").join(command), &Entry::Link(format!("/{PROGRAM}")))?;
    }
    for entry in WalkDir::new(directory) {
        let entry = entry.context("looking for directories")?;
        if entry.file_type().is_dir() {
            fs::set_permissions(entry.path(), PermissionsExt::from_mode(0o755)).context("setting a directory's mode")?;
        }
    }
    Ok(())
}

fn put(path: &Path, entry: &Entry) -> Result<()> {
    let doing = || format!("making {}", path.display());
    fs::create_dir_all(path.parent().expect("files are in directories")).with_context(doing)?;
    match entry {
        Entry::File { contents, mode } => {
            fs::write(path, contents).with_context(doing)?;
            fs::set_permissions(path, PermissionsExt::from_mode(*mode)).with_context(doing)
        }
        Entry::Link(target) => symlink(target, path).with_context(doing),
        Entry::Directory => fs::create_dir_all(path).with_context(doing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_names_amazon_linux_and_debian() {
        let text = os_release("bookworm", "12");
        for line in
            ["ID=\"amzn\"", "VERSION_ID=\"2023\"", "VERSION_CODENAME=bookworm", "PRETTY_NAME=\"Amazon Linux 2023 (stand-in on Debian 12)\""]
        {
            assert!(text.lines().any(|found| found == line), "{line}");
        }
    }

    #[test]
    fn files_configure_pip_only_for_more_certificates() {
        let has = |more| files("bookworm", "12", more).iter().any(|(path, _)| *path == "etc/pip.conf");
        assert!(has(true));
        assert!(!has(false));
    }

    #[test]
    fn write_puts_files_links_and_commands() {
        let scratch = tempfile::tempdir().unwrap();
        let program = scratch.path().join("program");
        fs::write(&program, "program").unwrap();
        let root = scratch.path().join("root");
        write(&root, &files("bookworm", "12", true), &program).unwrap();
        assert!(fs::read_to_string(root.join("usr/share/hearth/dnf-packages")).unwrap().contains("python3-pip"));
        assert_eq!(fs::read_link(root.join("usr/bin/microdnf")).unwrap(), Path::new("/usr/lib/hearth/hearth-standin"));
        assert_eq!(fs::metadata(root.join("usr/sbin/policy-rc.d")).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(root.join("etc/yum.repos.d").is_dir());
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
