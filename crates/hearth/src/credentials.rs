//! Keys that sign requests: those of the configuration, or a pair of the server's own, made at its first start.

use std::{fs, io, path::Path};

use base64::Engine as _;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::data_dir::{DataDir, write_secret};

/// An access key and its secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// For example `AKIAIOSFODNN7EXAMPLE`.
    pub access_key_id: String,
    /// What requests are signed with.
    pub secret_access_key: String,
}

/// The secret stays out of logs.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// The server's own key pair cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// the file could not be read or written
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// the file is not what this server wrote
    #[error("{path} is not understood ({reason}); delete it to have a new key pair made")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// the system has no random numbers
    #[error("the system gave no random numbers for a new key pair")]
    Random,
}

impl Credentials {
    /// Whether a client can use the pair.
    pub fn is_usable(&self) -> bool {
        let id = &self.access_key_id;
        (3..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric()) && !self.secret_access_key.is_empty()
    }

    /// Reads the server's own pair, or makes it at the first start.
    pub fn own(dir: &DataDir) -> Result<(Self, Origin), CredentialsError> {
        let path = dir.keys().join("credentials.json");
        match fs::read(&path) {
            Ok(text) => Ok((Self::parse(&path, &text)?, Origin::Kept)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((Self::make(&path)?, Origin::Made)),
            Err(source) => Err(CredentialsError::Io { what: format!("reading {}", path.display()), source }),
        }
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Self, CredentialsError> {
        let damaged = |reason: String| CredentialsError::Damaged { path: path.display().to_string(), reason };
        let pair: Self = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        if pair.is_usable() { Ok(pair) } else { Err(damaged("the access key or the secret is empty or too long".to_owned())) }
    }

    fn make(path: &Path) -> Result<Self, CredentialsError> {
        let pair = Self::random().ok_or(CredentialsError::Random)?;
        let text = serde_json::to_vec_pretty(&pair).expect("two strings always serialise");
        write_secret(path, &text).map_err(|source| CredentialsError::Io { what: format!("writing {}", path.display()), source })?;
        Ok(pair)
    }

    /// A pair that looks like AWS's: clients recognise access keys and secrets by their shape.
    fn random() -> Option<Self> {
        const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let (mut id, mut secret) = ([0_u8; 16], [0_u8; 30]);
        let random = SystemRandom::new();
        random.fill(&mut id).ok()?;
        random.fill(&mut secret).ok()?;
        let id: String = id.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
        let secret = base64::engine::general_purpose::STANDARD.encode(secret);
        Some(Self { access_key_id: format!("AKIA{id}"), secret_access_key: secret })
    }
}

/// Where the server's own pair came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Just made: worth telling.
    Made,
    /// Made at an earlier start.
    Kept,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn data_dir() -> (tempfile::TempDir, DataDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        dir.prepare().unwrap();
        (root, dir)
    }

    #[test]
    fn the_pair_is_made_once_looks_like_aws_s_and_is_private() {
        let (_root, dir) = data_dir();
        let (made, origin) = Credentials::own(&dir).unwrap();
        assert_eq!(origin, Origin::Made);
        assert_eq!((made.access_key_id.len(), made.secret_access_key.len()), (20, 40));
        assert_eq!(Credentials::own(&dir).unwrap(), (made, Origin::Kept));
        let mode = fs::metadata(dir.keys().join("credentials.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_file_is_refused_not_replaced() {
        let (_root, dir) = data_dir();
        for text in ["{", r#"{"access_key_id":"","secret_access_key":""}"#] {
            fs::write(dir.keys().join("credentials.json"), text).unwrap();
            assert!(matches!(Credentials::own(&dir), Err(CredentialsError::Damaged { .. })));
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let pair = Credentials { access_key_id: "AKIA".to_owned(), secret_access_key: "hidden".to_owned() };
        assert!(!format!("{pair:?}").contains("hidden"));
    }
}
