//! The databases of browsers: Firefox has one in each profile, Chromium and Chrome share one (NSS's `certutil` changes them).

use std::{
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use super::{Authority, Outcome, TrustError, must, run};

/// Below a home directory: databases themselves, and directories of Firefox profiles.
const DATABASES: &[&str] = &[".pki/nssdb", "snap/chromium/current/.pki/nssdb"];
const PROFILES: &[&str] = &[
    ".mozilla/firefox",
    ".config/mozilla/firefox",
    "snap/firefox/common/.mozilla/firefox",
    ".var/app/org.mozilla.firefox/.mozilla/firefox",
];

/// A database's own file.
const MARK: &str = "cert9.db";

/// The browsers' databases in a home directory.
pub fn databases(home: &Path) -> Vec<PathBuf> {
    let profiles = PROFILES.iter().filter_map(|dir| fs::read_dir(home.join(dir)).ok());
    let profiles = profiles.flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> =
        DATABASES.iter().map(|dir| home.join(dir)).chain(profiles).filter(|dir| dir.join(MARK).is_file()).collect();
    found.sort();
    found
}

/// Adds an authority to a database. Browsers see it from their next start.
pub fn trust(database: &Path, authority: &Authority) -> Result<Outcome, TrustError> {
    if is_there(database, authority)? {
        return Ok(Outcome::AsItWas);
    }
    // An unprivileged certutil could not read the authority's own file.
    let file = tempfile::NamedTempFile::new().and_then(|file| {
        fs::write(file.path(), &authority.pem)?;
        fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok(file)
    });
    let file = file.map_err(|source| TrustError::Io { action: "write", path: std::env::temp_dir(), source })?;
    must(certutil(database, authority, "-A")?.args(["-t", "C,,", "-i"]).arg(file.path()))?;
    Ok(Outcome::Added)
}

/// Removes it again.
pub fn undo(database: &Path, authority: &Authority) -> Result<Outcome, TrustError> {
    if !is_there(database, authority)? {
        return Ok(Outcome::AsItWas);
    }
    must(&mut certutil(database, authority, "-D")?)?;
    Ok(Outcome::Removed)
}

fn is_there(database: &Path, authority: &Authority) -> Result<bool, TrustError> {
    run(&mut certutil(database, authority, "-L")?).map(|(content, _)| content)
}

fn certutil(database: &Path, authority: &Authority, action: &str) -> Result<Command, TrustError> {
    let owner = fs::metadata(database).map_err(|source| TrustError::Io { action: "look at", path: database.to_owned(), source })?;
    let mut command = Command::new("certutil");
    command.args([action, "-d", &format!("sql:{}", database.display()), "-n", &format!("Hearth local CA {}", authority.fingerprint)]);
    if nix::unistd::geteuid().is_root() && owner.uid() != 0 {
        // Nothing in a user's home directory becomes root's, and root follows none of the user's links.
        command.uid(owner.uid()).gid(owner.gid());
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_are_found_where_browsers_have_them() {
        let home = tempfile::tempdir().unwrap();
        let make = |dir: &str, file: &str| {
            fs::create_dir_all(home.path().join(dir)).unwrap();
            fs::write(home.path().join(dir).join(file), "").unwrap();
        };
        assert!(databases(home.path()).is_empty());
        make(".pki/nssdb", MARK);
        make(".mozilla/firefox/abc.default", MARK);
        make(".mozilla/firefox/Crash Reports", "events");
        let found = databases(home.path());
        assert_eq!(found, [home.path().join(".mozilla/firefox/abc.default"), home.path().join(".pki/nssdb")]);
    }
}
