//! The local certificate authority: made at first start, trusted by whoever takes `ca.pem`, and able to name any endpoint.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use time::{Duration, OffsetDateTime};

use crate::files;

const CA_LIFETIME: Duration = Duration::days(3650);

/// Clients refuse certificates that live longer than 398 days.
pub(crate) const LEAF_LIFETIME: Duration = Duration::days(397);

/// Clocks of clients may be behind ours by this much. Counts towards the lifetimes.
const BACKDATED: Duration = Duration::days(1);

/// The certificate authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// a file cannot be read or written
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// the certificate has no key
    #[error(
        "{} has no ca.key beside it; put the key back, or remove the certificate to have a new authority made (clients must then trust that one)",
        .0.display()
    )]
    NoKey(PathBuf),
    /// a file is not what this server writes
    #[error("{} is not a usable {what}: {reason}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// a certificate cannot be made
    #[error("cannot make a certificate for {names}: {reason}")]
    Issue {
        /// For whom.
        names: String,
        /// Why.
        reason: String,
    },
}

/// A certificate authority in two files, `ca.pem` and `ca.key`.
pub struct LocalCa {
    pem: String,
    path: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalCa").field("path", &self.path).finish_non_exhaustive()
    }
}

impl LocalCa {
    /// Reads the authority in a directory, or makes it.
    pub fn load_or_create(dir: &Path) -> Result<Self, CaError> {
        let (certificate, key) = (dir.join("ca.pem"), dir.join("ca.key"));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed("create", dir))?;
        // The key is written first: a key alone is a first start that was interrupted, a certificate alone is a lost key.
        let key_pem = match read(&key)? {
            Some(pem) => pem,
            None if certificate.exists() => return Err(CaError::NoKey(certificate)),
            None => {
                let pem = new_key("the authority")?.serialize_pem();
                files::replace(&key, 0o600, pem.as_bytes()).map_err(failed("write", &key))?;
                pem
            }
        };
        let key_pair = KeyPair::from_pem(&key_pem).map_err(unusable(&key, "private key"))?;
        let pem = match read(&certificate)? {
            Some(pem) => pem,
            None => {
                let pem = self_signed(&key_pair)?;
                files::replace(&certificate, 0o644, pem.as_bytes()).map_err(failed("write", &certificate))?;
                pem
            }
        };

        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(unusable(&certificate, "certificate"))?;
        certified_key(der.clone(), &key_pair)
            .and_then(|certified| certified.keys_match())
            .map_err(unusable(&certificate, "certificate of the key beside it"))?;
        let issuer = Issuer::from_ca_cert_der(&der, key_pair).map_err(unusable(&certificate, "certificate"))?;
        Ok(Self { pem, path: certificate, issuer })
    }

    /// The authority's own certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    /// The file that holds it.
    pub fn certificate_path(&self) -> &Path {
        &self.path
    }

    /// Makes a server certificate for DNS names (wildcards allowed) and IP addresses.
    pub fn issue(&self, names: &[String]) -> Result<CertifiedKey, CaError> {
        self.issue_at(names, OffsetDateTime::now_utc())
    }

    fn issue_at(&self, names: &[String], now: OffsetDateTime) -> Result<CertifiedKey, CaError> {
        let refuse = |reason: String| CaError::Issue { names: names.join(", "), reason };
        let mut params = CertificateParams::new(names).map_err(|error| refuse(error.to_string()))?;
        // Not the host name, which may be longer than a common name's 64 characters. Clients read the alternative names.
        params.distinguished_name = named("Hearth MicroVM endpoint");
        params.not_before = now - BACKDATED;
        params.not_after = params.not_before + LEAF_LIFETIME;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Strict verification (the default from Python 3.13) wants it.
        params.use_authority_key_identifier_extension = true;

        let key = new_key(&names.join(", "))?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(|error| refuse(error.to_string()))?;
        certified_key(certificate.der().clone(), &key).map_err(|error| refuse(error.to_string()))
    }
}

fn self_signed(key: &KeyPair) -> Result<String, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("Hearth local CA");
    params.not_before = OffsetDateTime::now_utc() - BACKDATED;
    params.not_after = params.not_before + CA_LIFETIME;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate =
        params.self_signed(key).map_err(|error| CaError::Issue { names: "the authority".into(), reason: error.to_string() })?;
    Ok(certificate.pem())
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Hearth");
    name.push(DnType::CommonName, common_name);
    name
}

/// ECDSA on P-256: every client knows it, and making one takes microseconds.
fn new_key(whose: &str) -> Result<KeyPair, CaError> {
    KeyPair::generate().map_err(|error| CaError::Issue { names: whose.to_owned(), reason: error.to_string() })
}

fn certified_key(certificate: CertificateDer<'static>, key: &KeyPair) -> Result<CertifiedKey, rustls::Error> {
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(CertifiedKey::new(vec![certificate], any_ecdsa_type(&der)?))
}

fn read(path: &Path) -> Result<Option<String>, CaError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io { action, path, source }
}

fn unusable<E: std::fmt::Display>(path: &Path, what: &'static str) -> impl FnOnce(E) -> CaError {
    let path = path.to_owned();
    move |error| CaError::Unusable { path, what, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, sync::Arc, time::SystemTime};

    use rustls::{
        RootCertStore,
        client::{WebPkiServerVerifier, danger::ServerCertVerifier},
        crypto::ring::default_provider,
        pki_types::{ServerName, UnixTime},
    };

    use super::*;

    fn accepts(ca: &LocalCa, leaf: &CertifiedKey, host: &str, now: SystemTime) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).unwrap()).unwrap();
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider())).build().unwrap();
        let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        verifier.verify_server_cert(&leaf.cert[0], &[], &ServerName::try_from(host.to_owned()).unwrap(), &[], now).is_ok()
    }

    #[test]
    fn the_authority_outlives_a_restart() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let first = LocalCa::load_or_create(&dir).unwrap();
        let leaf = first.issue(&["*.example.localhost".into(), "127.0.0.1".into()]).unwrap();
        assert_eq!(fs::metadata(dir.join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);

        let second = LocalCa::load_or_create(&dir).unwrap();
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        for host in ["a.example.localhost", "127.0.0.1"] {
            assert!(accepts(&second, &leaf, host, SystemTime::now()), "{host}");
        }
        assert!(!accepts(&second, &leaf, "example.localhost", SystemTime::now()));
        let later = second.issue(&["b.localhost".into()]).unwrap();
        assert!(accepts(&first, &later, "b.localhost", SystemTime::now()));
    }

    #[test]
    fn certificates_end() {
        let temp = tempfile::tempdir().unwrap();
        let ca = LocalCa::load_or_create(temp.path()).unwrap();
        let leaf = ca.issue(&["a.localhost".into()]).unwrap();
        let in_days = |days: u64| SystemTime::now() + std::time::Duration::from_secs(days * 86_400);
        assert!(accepts(&ca, &leaf, "a.localhost", in_days(395)));
        assert!(!accepts(&ca, &leaf, "a.localhost", in_days(397)));
    }

    #[test]
    fn a_key_without_a_certificate_is_an_interrupted_start() {
        let temp = tempfile::tempdir().unwrap();
        let first = LocalCa::load_or_create(temp.path()).unwrap();
        fs::remove_file(temp.path().join("ca.pem")).unwrap();
        let second = LocalCa::load_or_create(temp.path()).unwrap();
        let leaf = first.issue(&["a.localhost".into()]).unwrap();
        assert!(accepts(&second, &leaf, "a.localhost", SystemTime::now()));
    }

    #[test]
    fn a_lost_or_foreign_key_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        LocalCa::load_or_create(temp.path()).unwrap();
        let key = temp.path().join("ca.key");
        fs::remove_file(&key).unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path()), Err(CaError::NoKey(_))));
        fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path()), Err(CaError::Unusable { .. })));
        fs::write(&key, "nonsense").unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path()), Err(CaError::Unusable { .. })));
    }
}
