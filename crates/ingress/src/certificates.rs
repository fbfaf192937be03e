//! A certificate for whichever endpoint a client names: an installed one that covers the name, else the local authority's, one wildcard per
//! region, made when it is first asked for and kept.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rustls::{
    ServerConfig,
    crypto::ring::{Ticketer, default_provider},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use tokio::sync::watch;

use crate::{
    ca::{CaError, LEAF_LIFETIME, LocalCa},
    chain::Chain,
};

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
    /// In order of preference.
    installed: RwLock<Vec<Arc<Chain>>>,
    /// Counts the times that these changed.
    installs: watch::Sender<u64>,
    kept: Mutex<HashMap<String, Kept>>,
}

#[derive(Debug)]
struct Kept {
    certificate: Arc<CertifiedKey>,
    made: SystemTime,
}

impl EndpointCertificates {
    /// Certificates for `*.lambda-microvm.<any region>.<domain>`.
    pub fn new(ca: LocalCa, domain: &str) -> Self {
        Self {
            ca,
            domain: domain.trim_matches('.').to_ascii_lowercase(),
            installed: RwLock::default(),
            installs: watch::Sender::default(),
            kept: Mutex::default(),
        }
    }

    /// Prefers these to certificates of the local authority, from the next client on.
    pub fn install(&self, chains: Vec<Arc<Chain>>) {
        let mut installed = self.installed.write().unwrap_or_else(PoisonError::into_inner);
        if installed.len() == chains.len() && installed.iter().zip(&chains).all(|(old, new)| old.is(new)) {
            return;
        }
        for chain in &chains {
            tracing::info!(names = ?chain.names(), until = %time::OffsetDateTime::from(chain.not_after()), "a certificate is in use");
        }
        *installed = chains;
        drop(installed);
        self.installs.send_modify(|count| *count += 1);
    }

    /// What is installed.
    pub fn installed(&self) -> Vec<Arc<Chain>> {
        self.installed.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cfg(test)]
    pub(crate) fn installs(&self) -> watch::Receiver<u64> {
        self.installs.subscribe()
    }

    /// The certificate for a name, if it is one of ours.
    pub(crate) fn certificate(&self, server_name: Option<&str>) -> Result<Option<Arc<CertifiedKey>>, CaError> {
        if let Some(name) = server_name
            && let Some(chain) = self.installed.read().unwrap_or_else(PoisonError::into_inner).iter().find(|chain| chain.covers(name))
        {
            return Ok(Some(Arc::clone(&chain.certified)));
        }
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
        let (key, now) = (names[0].as_str(), SystemTime::now());
        if let Some(found) = kept.get(key).filter(|found| found.is_fresh(now)) {
            return Ok(found.certificate.clone());
        }
        let certificate = Arc::new(self.ca.issue(names)?);
        if kept.len() >= MAX_KEPT
            && let Some(oldest) = kept.iter().min_by_key(|(_, kept)| kept.made).map(|(name, _)| name.clone())
        {
            kept.remove(&oldest);
        }
        tracing::debug!(?names, "made a certificate");
        kept.insert(key.to_owned(), Kept { certificate: certificate.clone(), made: now });
        Ok(certificate)
    }
}

impl Kept {
    /// By the system's clock, which goes on while the host sleeps. One that was set back far makes what is there useless too.
    fn is_fresh(&self, now: SystemTime) -> bool {
        now.duration_since(self.made).is_ok_and(|age| age < RENEWED_AFTER)
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
    use std::path::Path;

    use super::*;
    use crate::chain::tests::{files, issued};

    fn certificates(domain: &str) -> EndpointCertificates {
        let temp = tempfile::tempdir().unwrap();
        EndpointCertificates::new(LocalCa::load_or_create(temp.path(), domain).unwrap(), domain)
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
    fn an_installed_certificate_is_preferred_where_it_covers_the_name() {
        let certificates = certificates("example.com");
        let [ours, theirs] = ["us-east-1", "eu-west-1"].map(|region| format!("a.lambda-microvm.{region}.example.com"));
        let (pem, key) = issued(&["*.lambda-microvm.us-east-1.example.com"]);
        let chain = Arc::new(Chain::from_pem(&files(Path::new("/")), pem.as_bytes(), key.as_bytes()).unwrap());
        certificates.install(vec![chain.clone()]);
        let of = |name: Option<&str>| certificates.certificate(name).unwrap().unwrap();
        assert!(Arc::ptr_eq(&of(Some(&ours)), &chain.certified));
        assert!(Arc::ptr_eq(&of(Some(&ours.to_uppercase())), &chain.certified));
        for name in [Some(theirs.as_str()), Some("localhost"), None] {
            assert!(!Arc::ptr_eq(&of(name), &chain.certified), "{name:?}");
        }
    }

    #[test]
    fn certificates_are_made_anew_before_they_end() {
        let certificates = certificates("localhost");
        let of = || certificates.certificate(Some("a.lambda-microvm.us-east-1.localhost")).unwrap().unwrap();
        let first = of();
        let age = |by: Duration| certificates.kept.lock().unwrap().values_mut().for_each(|kept| kept.made -= by);
        age(RENEWED_AFTER - Duration::from_secs(60));
        assert!(Arc::ptr_eq(&first, &of()));
        age(Duration::from_secs(60));
        assert!(!Arc::ptr_eq(&first, &of()));
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
