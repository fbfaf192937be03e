//! The system's store: a directory for additional authorities, and the program that makes bundles of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Authority, Outcome, TrustError, must};

/// Directories of additional authorities, with the program to run after a change: Debian and Alpine, Fedora, SUSE, Arch Linux.
const KNOWN: &[(&str, &[&str])] = &[
    ("/usr/local/share/ca-certificates", &["update-ca-certificates"]),
    ("/etc/pki/ca-trust/source/anchors", &["update-ca-trust", "extract"]),
    ("/etc/pki/trust/anchors", &["update-ca-certificates"]),
    ("/etc/ca-certificates/trust-source/anchors", &["trust", "extract-compat"]),
];

/// Where the system keeps additional authorities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    dir: PathBuf,
    refresh: &'static [&'static str],
}

/// The store of this system, if it is one that is known.
pub fn find() -> Option<Store> {
    let there = |&&(dir, _): &&(&str, &[&str])| Path::new(dir).is_dir();
    KNOWN.iter().find(there).map(|&(dir, refresh)| Store { dir: dir.into(), refresh })
}

impl Store {
    /// The file of an authority.
    pub fn file(&self, authority: &Authority) -> PathBuf {
        // Debian takes no other ending.
        self.dir.join(format!("hearth-{}.crt", authority.fingerprint))
    }

    /// Adds an authority.
    pub fn trust(&self, authority: &Authority) -> Result<Outcome, TrustError> {
        let path = self.file(authority);
        if fs::read_to_string(&path).is_ok_and(|found| found == authority.pem) {
            return Ok(Outcome::AsItWas);
        }
        let written = crate::data_dir::write_atomically(&path, authority.pem.as_bytes(), 0o644);
        written.map_err(|source| TrustError::Io { action: "write", path: path.clone(), source })?;
        // A store that was not refreshed would look, the next time, as if there were nothing to do.
        self.refresh().inspect_err(|_| drop(fs::remove_file(&path)))?;
        Ok(Outcome::Added)
    }

    /// Removes it again.
    pub fn undo(&self, authority: &Authority) -> Result<Outcome, TrustError> {
        let path = self.file(authority);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Outcome::AsItWas),
            Err(source) => return Err(TrustError::Io { action: "remove", path, source }),
        }
        self.refresh()?;
        Ok(Outcome::Removed)
    }

    fn refresh(&self) -> Result<(), TrustError> {
        let (program, arguments) = self.refresh.split_first().expect("a store has a program");
        must(Command::new(program).args(arguments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &Path, refresh: &'static [&'static str]) -> (Store, Authority) {
        let authority = Authority { path: "/ca.pem".into(), pem: "a certificate".into(), fingerprint: "0123456789ab".into() };
        (Store { dir: dir.to_owned(), refresh }, authority)
    }

    #[test]
    fn adding_and_removing_are_each_done_once() {
        let temp = tempfile::tempdir().unwrap();
        let (store, authority) = store(temp.path(), &["true"]);
        assert_eq!(store.undo(&authority).unwrap(), Outcome::AsItWas);
        assert_eq!(store.trust(&authority).unwrap(), Outcome::Added);
        assert_eq!(fs::read_to_string(temp.path().join("hearth-0123456789ab.crt")).unwrap(), "a certificate");
        assert_eq!(store.trust(&authority).unwrap(), Outcome::AsItWas);
        assert_eq!(store.undo(&authority).unwrap(), Outcome::Removed);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_store_that_could_not_be_refreshed_is_tried_again() {
        let temp = tempfile::tempdir().unwrap();
        let (broken, authority) = store(temp.path(), &["false"]);
        assert!(matches!(broken.trust(&authority), Err(TrustError::Program { .. })));
        assert_eq!(store(temp.path(), &["true"]).0.trust(&authority).unwrap(), Outcome::Added);
    }
}
