//! What outlives the server: the account with the authority, and the certificate with its key. Each is one file, so that it is there whole or
//! not at all, and only its owner may read it.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use instant_acme::AccountCredentials;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{AcmeConfig, AcmeError};
use crate::{
    chain::{Chain, ChainFiles},
    files,
};

/// The directory of an [`AcmeConfig`].
pub(super) struct Store<'a> {
    config: &'a AcmeConfig,
}

/// A certificate and where it is from.
pub(super) struct Kept {
    pub(super) directory: String,
    pub(super) chain: Chain,
}

#[derive(Serialize, Deserialize)]
struct CertificateFile {
    directory: String,
    chain: String,
    key: String,
}

#[derive(Serialize, Deserialize)]
struct AccountFile<C> {
    directory: String,
    credentials: C,
}

impl<'a> Store<'a> {
    pub(super) fn new(config: &'a AcmeConfig) -> Self {
        Self { config }
    }

    /// The certificate, if there is one that can be used.
    pub(super) fn certificate(&self) -> Result<Option<Kept>, AcmeError> {
        let path = self.certificate_path();
        let Some(file) = self.read::<CertificateFile>(&path)? else { return Ok(None) };
        match self.chain(&file.chain, &file.key) {
            Ok(chain) => Ok(Some(Kept { directory: file.directory, chain })),
            Err(error) => {
                tracing::warn!(%error, "the kept certificate is not used");
                Ok(None)
            }
        }
    }

    /// Keeps a certificate that can be used.
    pub(super) fn keep_certificate(&self, chain: &str, key: &str) -> Result<Chain, AcmeError> {
        let parsed = self.chain(chain, key)?;
        let file = CertificateFile { directory: self.config.directory.clone(), chain: chain.to_owned(), key: key.to_owned() };
        self.write(&self.certificate_path(), &file)?;
        Ok(parsed)
    }

    /// The account with the configured authority.
    pub(super) fn account(&self) -> Result<Option<AccountCredentials>, AcmeError> {
        let file = self.read::<AccountFile<AccountCredentials>>(&self.account_path())?;
        Ok(file.filter(|file| file.directory == self.config.directory).map(|file| file.credentials))
    }

    pub(super) fn keep_account(&self, credentials: &AccountCredentials) -> Result<(), AcmeError> {
        self.write(&self.account_path(), &AccountFile { directory: self.config.directory.clone(), credentials })
    }

    fn certificate_path(&self) -> PathBuf {
        self.config.dir.join("certificate.json")
    }

    fn account_path(&self) -> PathBuf {
        self.config.dir.join("account.json")
    }

    fn chain(&self, chain: &str, key: &str) -> Result<Chain, crate::ChainError> {
        let path = self.certificate_path();
        Chain::from_pem(&ChainFiles { chain: path.clone(), key: path }, chain.as_bytes(), key.as_bytes())
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, AcmeError> {
        let failed = |source| AcmeError::Io { action: "read", path: path.to_owned(), source };
        match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| failed(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    fn write<T: Serialize>(&self, path: &Path, contents: &T) -> Result<(), AcmeError> {
        let write = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.config.dir)?;
            files::replace(path, 0o600, &serde_json::to_vec_pretty(contents)?)
        };
        write().map_err(|source| AcmeError::Io { action: "write", path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{acme::tests::config, chain::tests::issued};

    #[test]
    fn certificates_are_kept_for_their_owner_alone_and_bad_ones_are_not_kept() {
        let temp = tempfile::tempdir().unwrap();
        let config = config(temp.path());
        let store = Store::new(&config);
        assert!(store.certificate().unwrap().is_none());
        let (chain, key) = issued(&["a.example.com"]);
        store.keep_certificate(&chain, &key).unwrap();
        assert!(store.keep_certificate(&chain, &issued(&["a.example.com"]).1).is_err());
        assert_eq!(store.certificate().unwrap().unwrap().directory, config.directory);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&store.certificate_path()), mode(&config.dir)), (0o600, 0o700));
        fs::write(store.certificate_path(), "{").unwrap();
        assert!(store.certificate().err().unwrap().to_string().contains("certificate.json"));
    }
}
