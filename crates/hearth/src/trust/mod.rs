//! Makes programs on this host trust the local authority, and undoes it: the system's store, which curl and most programs use, and the databases
//! of browsers, which have their own. What is added has the certificate's fingerprint in its name, so that authorities of several servers live
//! side by side and each is found again. No server has to run.

mod nss;
mod system;

use std::{fmt, path::PathBuf};

use hearth_ingress::certificate_der;

pub use self::nss::{databases, trust as trust_browser, undo as undo_browser};
pub use self::system::find as find_store;

/// The certificate to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// Its file.
    pub path: PathBuf,
    /// The file's contents.
    pub pem: String,
    /// Enough of its SHA-256 to tell it from others.
    pub fingerprint: String,
}

/// What became of one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Added,
    Removed,
    AsItWas,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "added to",
            Self::Removed => "removed from",
            Self::AsItWas => "nothing to do in",
        })
    }
}

/// Trust could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// a file cannot be read or written
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// there is no authority
    #[error("{} is not there: the authority is made when `hearth serve` first starts; start it once, or name its --data-dir", .0.display())]
    NoAuthority(PathBuf),
    /// the file is none
    #[error("{} is not a certificate", .0.display())]
    NotACertificate(PathBuf),
    /// not root
    #[error("the system's store is root's: run this with sudo")]
    NotRoot,
    /// no store is known here
    #[error("no store of the system is where Debian, Fedora, SUSE or Arch Linux have theirs; add {} by hand", .0.display())]
    NoStore(PathBuf),
    /// a program failed
    #[error("{program} failed: {reason}")]
    Program {
        /// The program.
        program: String,
        /// What it said.
        reason: String,
    },
}

impl Authority {
    /// Reads the authority's certificate.
    pub fn read(path: PathBuf) -> Result<Self, TrustError> {
        let pem = match std::fs::read_to_string(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(TrustError::NoAuthority(path)),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Err(TrustError::NotRoot),
            Err(source) => return Err(TrustError::Io { action: "read", path, source }),
        };
        let der = certificate_der(&pem).ok_or_else(|| TrustError::NotACertificate(path.clone()))?;
        let digest = ring::digest::digest(&ring::digest::SHA256, &der);
        let fingerprint = digest.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path, pem, fingerprint })
    }
}

/// Runs a program to its end and returns whether it was content, with what it said.
fn run(command: &mut std::process::Command) -> Result<(bool, String), TrustError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(std::process::Stdio::null()).output();
    let output = output.map_err(|error| TrustError::Program { program, reason: error.to_string() })?;
    let said = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr }).trim().to_owned();
    Ok((output.status.success(), said))
}

/// Runs a program that must be content.
fn must(command: &mut std::process::Command) -> Result<(), TrustError> {
    let program = command.get_program().to_string_lossy().into_owned();
    match run(command)? {
        (true, _) => Ok(()),
        (false, reason) => Err(TrustError::Program { program, reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_told_by_its_certificate() {
        let temp = tempfile::tempdir().unwrap();
        let ca = hearth_ingress::LocalCa::load_or_create(temp.path(), "localhost").unwrap();
        let authority = Authority::read(ca.certificate_path().to_owned()).unwrap();
        assert_eq!(authority.fingerprint.len(), 12);
        assert_eq!(authority, Authority::read(ca.certificate_path().to_owned()).unwrap());

        let missing = Authority::read(temp.path().join("none.pem")).unwrap_err();
        assert!(missing.to_string().contains("hearth serve"), "{missing}");
        std::fs::write(temp.path().join("bad.pem"), "rubbish").unwrap();
        assert!(matches!(Authority::read(temp.path().join("bad.pem")), Err(TrustError::NotACertificate(_))));
    }
}
