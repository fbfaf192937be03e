//! Certificates that somebody else issued: the operator's files, or what an ACME authority sent.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    InconsistentKeys,
    client::verify_server_name,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

/// The files of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainFiles {
    /// PEM: the certificate first, then those that lead to its authority.
    pub chain: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// A certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// a file cannot be read
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// a file is not what it should be
    #[error("{} has no usable {what}: {reason}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// the two files do not belong together
    #[error("{} is not the key of the first certificate in {}; the server's own certificate must come first, those of authorities after it",
        key.display(), chain.display())]
    Mismatch {
        /// The key.
        key: PathBuf,
        /// The certificates.
        chain: PathBuf,
    },
}

/// A certificate with its key and what a client would find in it.
#[derive(Debug)]
pub struct Chain {
    pub(crate) certified: Arc<CertifiedKey>,
    names: Vec<String>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Chain {
    /// Reads the two files.
    pub fn read(files: &ChainFiles) -> Result<Self, ChainError> {
        let read = |path: &Path| fs::read(path).map_err(|source| ChainError::Read { path: path.to_owned(), source });
        Self::from_pem(files, &read(&files.chain)?, &read(&files.key)?)
    }

    /// Takes what the two files hold, or shall hold: they are named in errors.
    pub(crate) fn from_pem(files: &ChainFiles, chain: &[u8], key: &[u8]) -> Result<Self, ChainError> {
        let in_chain = |reason: String| ChainError::Unusable { path: files.chain.clone(), what: "certificate", reason };
        let in_key = |reason: String| ChainError::Unusable { path: files.key.clone(), what: "private key", reason };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let certificates = certificates.map_err(|error| in_chain(error.to_string()))?;
        let leaf = certificates.first().ok_or_else(|| in_chain("expected PEM with BEGIN CERTIFICATE".to_owned()))?.clone();
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| in_key(error.to_string()))?;

        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|error| in_chain(error.to_string()))?;
        let names = names(&parsed).map_err(in_chain)?;
        let (not_before, not_after) = (time(parsed.validity().not_before), time(parsed.validity().not_after));
        let certified = CertifiedKey::from_der(certificates, key, &default_provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                ChainError::Mismatch { key: files.key.clone(), chain: files.chain.clone() }
            }
            error => in_key(error.to_string()),
        })?;
        Ok(Self { certified: Arc::new(certified), names, not_before, not_after })
    }

    /// Whether a client that asks for `name` is content with it.
    pub fn covers(&self, name: &str) -> bool {
        let leaf = self.certified.cert.first().and_then(|leaf| ParsedCertificate::try_from(leaf).ok());
        leaf.zip(ServerName::try_from(name).ok()).is_some_and(|(leaf, name)| verify_server_name(&leaf, &name).is_ok())
    }

    /// The names in it, wildcards as they are.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Clients accept it from then on.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Clients accept it until then.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether both are the same certificate.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.certified.cert == other.certified.cert
    }
}

/// A name that stands for all endpoints of a region: a certificate that covers it covers them.
pub fn any_endpoint(region: &str, domain: &str) -> String {
    format!("00000000-0000-0000-0000-000000000000.lambda-microvm.{region}.{domain}")
}

/// The first certificate of a PEM file.
pub fn certificate_der(pem: &str) -> Option<Vec<u8>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).ok().map(|der| der.to_vec())
}

/// When the first certificate of a PEM file ends.
pub fn ends(pem: &str) -> Option<SystemTime> {
    let der = certificate_der(pem)?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    Some(time(parsed.validity().not_after))
}

fn names(certificate: &X509Certificate<'_>) -> Result<Vec<String>, String> {
    let alternatives = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let names: Vec<String> = alternatives
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        return Err("it names no host (subject alternative names), and clients look nowhere else".to_owned());
    }
    Ok(names)
}

fn time(time: x509_parser::time::ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// A certificate and its key as PEM.
    pub(crate) fn issued(names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        (CertificateParams::new(names).unwrap().self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    pub(crate) fn files(dir: &Path) -> ChainFiles {
        ChainFiles { chain: dir.join("chain.pem"), key: dir.join("key.pem") }
    }

    fn read(chain: &str, key: &str) -> Result<Chain, ChainError> {
        Chain::from_pem(&files(Path::new("/tls")), chain.as_bytes(), key.as_bytes())
    }

    #[test]
    fn a_wildcard_covers_the_endpoints_of_its_region_only() {
        let (chain, key) = issued(&["*.lambda-microvm.eu-west-1.example.com", "example.com"]);
        let chain = read(&chain, &key).unwrap();
        assert_eq!(chain.names(), ["*.lambda-microvm.eu-west-1.example.com", "example.com"]);
        assert!(chain.covers(&any_endpoint("eu-west-1", "example.com")));
        assert!(chain.covers("EXAMPLE.com"));
        for other in [&any_endpoint("us-east-1", "example.com"), "a.b.lambda-microvm.eu-west-1.example.com", "", "not a name", "127.0.0.1"]
        {
            assert!(!chain.covers(other), "{other}");
        }
        assert!(chain.not_before() < SystemTime::now() && chain.not_after() > SystemTime::now());
    }

    #[test]
    fn what_cannot_be_used_is_named_with_the_file_and_what_to_do() {
        let ((chain, key), (other, other_key)) = (issued(&["a.example.com"]), issued(&["b.example.com"]));
        let refusal = |chain: &str, key: &str| read(chain, key).unwrap_err().to_string();
        assert!(refusal(&chain, &other_key).contains("/tls/key.pem is not the key of the first certificate in /tls/chain.pem"));
        assert!(refusal(&format!("{other}{chain}"), &key).contains("must come first"));
        assert!(refusal("", &key).starts_with("/tls/chain.pem has no usable certificate: expected PEM"));
        assert!(
            refusal("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &key).starts_with("/tls/chain.pem has no usable")
        );
        assert!(refusal(&chain, &chain).starts_with("/tls/key.pem has no usable private key"));
        let (nameless, key) = issued(&[]);
        assert!(refusal(&nameless, &key).contains("names no host"));
        let missing = Chain::read(&files(Path::new("/nonexistent"))).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read /nonexistent/chain.pem"), "{missing}");
    }
}
