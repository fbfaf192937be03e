//! The local certificate authority: made at first start, trusted by whoever takes `ca.pem`, and able to name any endpoint, but nothing else:
//! whoever steals its key can be an endpoint to those who trust it, and not their bank (RFC 5280, 4.2.1.10).

use std::{
    fs, io,
    net::Ipv6Addr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints,
};
use rustls::{
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use time::{Duration, OffsetDateTime};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{FromDer, X509Error},
};

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
    /// the authority was made for another domain
    #[error(
        "{} may not name endpoints of {domain}: clients would refuse them. `hearth trust --undo` if you trusted it, remove it and ca.key to have a new \
         authority made, and trust that one",
        path.display()
    )]
    OtherDomain {
        /// The authority's certificate.
        path: PathBuf,
        /// The domain of the endpoints.
        domain: String,
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
    /// Reads the authority in a directory, or makes it, for endpoints below a domain and for this host. One that was made before authorities
    /// were limited goes on.
    pub fn load_or_create(dir: &Path, domain: &str) -> Result<Self, CaError> {
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
                let pem = self_signed(&key_pair, &plain(domain))?;
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

    /// Fails if clients would refuse the authority's certificates for endpoints below a domain.
    pub fn require(&self, domain: &str) -> Result<(), CaError> {
        let domain = plain(domain);
        let der = CertificateDer::from_pem_slice(self.pem.as_bytes()).map_err(unusable(&self.path, "certificate"))?;
        if may_name(&der, &domain).map_err(unusable(&self.path, "certificate"))? {
            return Ok(());
        }
        Err(CaError::OtherDomain { path: self.path.clone(), domain })
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

fn self_signed(key: &KeyPair, domain: &str) -> Result<String, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("Hearth local CA");
    params.not_before = OffsetDateTime::now_utc() - BACKDATED;
    params.not_after = params.not_before + CA_LIFETIME;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut permitted_subtrees = vec![
        GeneralSubtree::DnsName("localhost".to_owned()),
        GeneralSubtree::IpAddress(CidrSubnet::from_v4_prefix([127, 0, 0, 0], 8)),
        GeneralSubtree::IpAddress(CidrSubnet::from_v6_prefix(Ipv6Addr::LOCALHOST.octets(), 128)),
    ];
    if domain != "localhost" {
        permitted_subtrees.push(GeneralSubtree::DnsName(domain.to_owned()));
    }
    params.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
    let certificate =
        params.self_signed(key).map_err(|error| CaError::Issue { names: "the authority".into(), reason: error.to_string() })?;
    Ok(certificate.pem())
}

/// A domain as certificates have it.
fn plain(domain: &str) -> String {
    domain.trim_matches('.').to_ascii_lowercase()
}

/// Whether an authority's certificates for names below a domain are accepted.
fn may_name(authority: &CertificateDer<'_>, domain: &str) -> Result<bool, x509_parser::nom::Err<X509Error>> {
    let (_, certificate) = X509Certificate::from_der(authority)?;
    let constraints = certificate.name_constraints()?.and_then(|constraints| constraints.value.permitted_subtrees.as_ref());
    let below = |base: &str| domain.strip_suffix(base).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    Ok(constraints
        .is_none_or(|permitted| permitted.iter().any(|subtree| matches!(subtree.base, GeneralName::DNSName(base) if below(base)))))
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
        let first = LocalCa::load_or_create(&dir, "localhost").unwrap();
        let leaf = first.issue(&["*.example.localhost".into(), "127.0.0.1".into()]).unwrap();
        assert_eq!(fs::metadata(dir.join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);

        let second = LocalCa::load_or_create(&dir, "localhost").unwrap();
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        for host in ["a.example.localhost", "127.0.0.1"] {
            assert!(accepts(&second, &leaf, host, SystemTime::now()), "{host}");
        }
        assert!(!accepts(&second, &leaf, "example.localhost", SystemTime::now()));
        let later = second.issue(&["b.localhost".into()]).unwrap();
        assert!(accepts(&first, &later, "b.localhost", SystemTime::now()));
    }

    #[test]
    fn it_names_endpoints_and_this_host_only() {
        let temp = tempfile::tempdir().unwrap();
        let ca = LocalCa::load_or_create(temp.path(), "Example.com.").unwrap();
        for (name, host, accepted) in [
            ("*.lambda-microvm.us-east-1.example.com", "a.lambda-microvm.us-east-1.example.com", true),
            ("localhost", "localhost", true),
            ("127.0.0.1", "127.0.0.1", true),
            ("::1", "::1", true),
            ("www.example.org", "www.example.org", false),
            ("notexample.com", "notexample.com", false),
            ("192.0.2.1", "192.0.2.1", false),
            ("2001:db8::1", "2001:db8::1", false),
        ] {
            let leaf = ca.issue(&[name.to_owned()]).unwrap();
            assert_eq!(accepts(&ca, &leaf, host, SystemTime::now()), accepted, "{name}");
        }
        for domain in ["eu.example.com", "localhost", "a.localhost"] {
            ca.require(domain).unwrap();
        }
        for domain in ["com", "example.org", "notexample.com"] {
            assert!(matches!(ca.require(domain), Err(CaError::OtherDomain { .. })), "{domain}");
        }
    }

    #[test]
    fn one_without_limits_goes_on() {
        let temp = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(temp.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(temp.path().join("ca.key"), key.serialize_pem()).unwrap();
        let ca = LocalCa::load_or_create(temp.path(), "example.org").unwrap();
        ca.require("example.org").unwrap();
        let leaf = ca.issue(&["a.example.org".into()]).unwrap();
        assert!(accepts(&ca, &leaf, "a.example.org", SystemTime::now()));
    }

    #[test]
    fn certificates_end() {
        let temp = tempfile::tempdir().unwrap();
        let ca = LocalCa::load_or_create(temp.path(), "localhost").unwrap();
        let leaf = ca.issue(&["a.localhost".into()]).unwrap();
        let in_days = |days: u64| SystemTime::now() + std::time::Duration::from_secs(days * 86_400);
        assert!(accepts(&ca, &leaf, "a.localhost", in_days(395)));
        assert!(!accepts(&ca, &leaf, "a.localhost", in_days(397)));
    }

    #[test]
    fn a_key_without_a_certificate_is_an_interrupted_start() {
        let temp = tempfile::tempdir().unwrap();
        let first = LocalCa::load_or_create(temp.path(), "localhost").unwrap();
        fs::remove_file(temp.path().join("ca.pem")).unwrap();
        let second = LocalCa::load_or_create(temp.path(), "localhost").unwrap();
        let leaf = first.issue(&["a.localhost".into()]).unwrap();
        assert!(accepts(&second, &leaf, "a.localhost", SystemTime::now()));
    }

    #[test]
    fn a_lost_or_foreign_key_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        LocalCa::load_or_create(temp.path(), "localhost").unwrap();
        let key = temp.path().join("ca.key");
        fs::remove_file(&key).unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path(), "localhost"), Err(CaError::NoKey(_))));
        fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path(), "localhost"), Err(CaError::Unusable { .. })));
        fs::write(&key, "nonsense").unwrap();
        assert!(matches!(LocalCa::load_or_create(temp.path(), "localhost"), Err(CaError::Unusable { .. })));
    }
}
