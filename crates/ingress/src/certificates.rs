//! A certificate for whichever endpoint a client names: one wildcard per region, made when it is first asked for and kept.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustls::{
    ServerConfig,
    crypto::ring::{Ticketer, default_provider},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::ca::{CaError, LEAF_LIFETIME, LocalCa};

/// Clients choose the region in a name, so what is kept for them has a limit.
const MAX_KEPT: usize = 64;

/// Made anew when this old, three months before it ends.
const RENEWED_AFTER: Duration = Duration::from_secs(LEAF_LIFETIME.whole_seconds().unsigned_abs() - 90 * 86_400);

/// Names of the server itself, for clients that send no name or connect to it directly.
const OWN_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Answers a TLS client with the certificate for the name that it asks for.
#[derive(Debug)]
pub struct EndpointCertificates {
    ca: LocalCa,
    /// Without a leading dot, in lower case.
    domain: String,
    kept: Mutex<HashMap<String, Kept>>,
}

#[derive(Debug)]
struct Kept {
    certificate: Arc<CertifiedKey>,
    made: Instant,
}

impl EndpointCertificates {
    /// Certificates for `*.lambda-microvm.<any region>.<domain>`.
    pub fn new(ca: LocalCa, domain: &str) -> Self {
        Self { ca, domain: domain.trim_matches('.').to_ascii_lowercase(), kept: Mutex::default() }
    }

    /// The certificate for a name, if it is one of ours.
    fn certificate(&self, server_name: Option<&str>) -> Result<Option<Arc<CertifiedKey>>, CaError> {
        match server_name.map(str::to_ascii_lowercase) {
            Some(name) if name != OWN_NAMES[0] => self.wildcard(&name).map(|wildcard| self.kept_or_issued(&[wildcard])).transpose(),
            _ => self.kept_or_issued(&OWN_NAMES.map(str::to_owned)).map(Some),
        }
    }

    /// `*.lambda-microvm.<region>.<domain>` for a name below it.
    fn wildcard(&self, name: &str) -> Option<String> {
        let labels = name.strip_suffix(&self.domain)?.strip_suffix('.')?;
        match labels.split('.').collect::<Vec<_>>().as_slice() {
            [_, "lambda-microvm", region] => Some(format!("*.lambda-microvm.{region}.{}", self.domain)),
            _ => None,
        }
    }

    fn kept_or_issued(&self, names: &[String]) -> Result<Arc<CertifiedKey>, CaError> {
        // The lock is held while a certificate is made: a fraction of a millisecond, and only one is made for many who ask at once.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let key = names[0].as_str();
        if let Some(found) = kept.get(key).filter(|found| found.made.elapsed() < RENEWED_AFTER) {
            return Ok(found.certificate.clone());
        }
        let certificate = Arc::new(self.ca.issue(names)?);
        if kept.len() >= MAX_KEPT
            && let Some(oldest) = kept.iter().min_by_key(|(_, kept)| kept.made).map(|(name, _)| name.clone())
        {
            kept.remove(&oldest);
        }
        tracing::debug!(?names, "made a certificate");
        kept.insert(key.to_owned(), Kept { certificate: certificate.clone(), made: Instant::now() });
        Ok(certificate)
    }
}

impl ResolvesServerCert for EndpointCertificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match self.certificate(hello.server_name()) {
            Ok(certificate) => certificate,
            Err(error) => {
                tracing::error!(%error, "a client gets no certificate");
                None
            }
        }
    }
}

/// TLS 1.2 and 1.3, inside it HTTP/2 for clients that have it, else HTTP/1.1.
pub fn server_config(certificates: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = Ticketer::new()?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificates(domain: &str) -> EndpointCertificates {
        let temp = tempfile::tempdir().unwrap();
        EndpointCertificates::new(LocalCa::load_or_create(temp.path()).unwrap(), domain)
    }

    #[test]
    fn one_wildcard_serves_a_region() {
        let certificates = certificates("localhost");
        let of = |name: &str| certificates.certificate(Some(name)).unwrap().unwrap();
        let first = of("0d2b.lambda-microvm.us-east-1.localhost");
        assert!(Arc::ptr_eq(&first, &of("FFFF.Lambda-MicroVM.us-east-1.localhost")));
        assert!(!Arc::ptr_eq(&first, &of("0d2b.lambda-microvm.eu-west-1.localhost")));
    }

    #[test]
    fn no_name_and_localhost_share_one() {
        let certificates = certificates("on.aws");
        let none = certificates.certificate(None).unwrap().unwrap();
        assert!(Arc::ptr_eq(&none, &certificates.certificate(Some("localhost")).unwrap().unwrap()));
    }

    #[test]
    fn other_names_get_none() {
        let certificates = certificates("on.aws");
        for name in [
            "example.com",
            "on.aws",
            "lambda-microvm.us-east-1.on.aws",
            "a.b.lambda-microvm.us-east-1.on.aws",
            "a.lambda-microvm.us-east-1.xon.aws",
            "a.lambda-microvm.us-east-1.on.aws.example.com",
            "a.lambda.us-east-1.on.aws",
        ] {
            assert!(certificates.certificate(Some(name)).unwrap().is_none(), "{name}");
        }
    }

    #[test]
    fn what_clients_make_us_keep_is_limited() {
        let certificates = certificates("localhost");
        for region in 0..MAX_KEPT + 5 {
            certificates.certificate(Some(&format!("a.lambda-microvm.r{region}.localhost"))).unwrap().unwrap();
        }
        assert_eq!(certificates.kept.lock().unwrap().len(), MAX_KEPT);
    }
}
