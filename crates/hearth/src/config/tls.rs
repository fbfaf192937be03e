//! Settings of the endpoints' certificates: the local authority's when there are none.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hearth_ingress::{AcmeConfig as Acme, ChainFiles, ExternalAccount};
use serde::Deserialize;

/// Let's Encrypt.
const DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// Where certificates come from. Without either: the local authority in the data directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// The operator's own; for each client the first that covers the name it asks for. The local authority serves what none covers.
    pub certificates: Vec<CertificateConfig>,
    /// An authority that issues them by itself.
    pub acme: Option<AcmeConfig>,
}

/// A certificate in two files, relative to the configuration file. They are read again when they change, and on SIGHUP.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateConfig {
    /// PEM: the certificate, then those that lead to its authority.
    pub chain: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// An authority that speaks ACME (RFC 8555).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcmeConfig {
    /// URL of its directory. Let's Encrypt's.
    #[serde(default = "lets_encrypt")]
    pub directory: String,
    /// The operator has read its terms of service and agrees. Must be `true`.
    #[serde(default)]
    pub agree_to_terms: bool,
    /// Mail addresses that it may write to. None.
    #[serde(default)]
    pub contacts: Vec<String>,
    /// Program that is run as `PROGRAM add|remove NAME VALUE` to publish a TXT record and to take it back.
    pub dns_hook: PathBuf,
    /// PEM of the authority that the directory's own certificate is from. The system's authorities.
    pub ca: Option<PathBuf>,
    /// Identifier and base64url HMAC key of an account that is there already. None.
    pub external_account: Option<ExternalAccountConfig>,
}

/// An account with the authority that ACME knows nothing of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExternalAccountConfig {
    pub id: String,
    pub key: String,
}

impl TlsConfig {
    /// Takes relative names to be beside the configuration file.
    pub(super) fn relative_to(&mut self, dir: &Path) {
        let files = self.certificates.iter_mut().flat_map(|files| [&mut files.chain, &mut files.key]);
        let acme = self.acme.iter_mut().flat_map(|acme| std::iter::once(&mut acme.dns_hook).chain(acme.ca.as_mut()));
        for path in files.chain(acme) {
            *path = dir.join(&*path);
        }
    }

    /// The first setting that makes no sense: its key, its value, and what would do.
    pub(super) fn unusable(&self, domain: &str) -> Option<(&'static str, String, &'static str)> {
        let acme = self.acme.as_ref()?;
        if !self.certificates.is_empty() {
            return Some(("tls.acme", acme.directory.clone(), "either [[tls.certificates]] or [tls.acme]; the other"));
        }
        if !acme.directory.starts_with("https://") {
            return Some(("tls.acme.directory", acme.directory.clone(), "an https:// URL"));
        }
        if !acme.agree_to_terms {
            return Some(("tls.acme.agree_to_terms", "false".to_owned(), "true, once you have read and accept the authority's terms,"));
        }
        if domain == "localhost" || domain.ends_with(".localhost") {
            return Some(("domain", domain.to_owned(), "a domain of your own: no authority issues certificates for localhost; it"));
        }
        let key = |account: &ExternalAccountConfig| URL_SAFE_NO_PAD.decode(account.key.trim_end_matches('=')).is_err();
        if acme.external_account.as_ref().is_some_and(key) {
            return Some((
                "tls.acme.external_account.key",
                "(not shown)".to_owned(),
                "the HMAC key in base64url as the authority shows it",
            ));
        }
        None
    }

    /// The operator's files.
    pub fn chain_files(&self) -> Vec<ChainFiles> {
        self.certificates.iter().map(|files| ChainFiles { chain: files.chain.clone(), key: files.key.clone() }).collect()
    }

    /// How to get certificates for the endpoints of these regions, if an authority issues them.
    pub fn acme(&self, regions: &[String], domain: &str, dir: PathBuf) -> Option<Acme> {
        let acme = self.acme.as_ref()?;
        let external = acme.external_account.as_ref().map(|account| ExternalAccount {
            id: account.id.clone(),
            // Refused when the file was read, if it is no key.
            key: URL_SAFE_NO_PAD.decode(account.key.trim_end_matches('=')).unwrap_or_default(),
        });
        Some(Acme {
            directory: acme.directory.clone(),
            contacts: acme.contacts.iter().map(|address| format!("mailto:{}", address.trim_start_matches("mailto:"))).collect(),
            ca: acme.ca.clone(),
            external_account: external,
            hook: acme.dns_hook.clone(),
            names: regions.iter().map(|region| format!("*.lambda-microvm.{region}.{domain}")).collect(),
            dir,
        })
    }
}

fn lets_encrypt() -> String {
    DIRECTORY.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> TlsConfig {
        toml::from_str(text).unwrap()
    }

    const ACME: &str = "[acme]\nagree_to_terms = true\ncontacts = ['ops@example.com']\ndns_hook = 'hook'";

    #[test]
    fn files_are_beside_the_configuration_file() {
        let mut config = parse("[[certificates]]\nchain = 'chain.pem'\nkey = '/etc/key.pem'");
        config.relative_to(Path::new("/conf"));
        assert_eq!(config.chain_files(), [ChainFiles { chain: "/conf/chain.pem".into(), key: "/etc/key.pem".into() }]);
        assert_eq!(config.unusable("localhost"), None);
        assert_eq!(config.acme(&[], "example.com", PathBuf::new()), None);
    }

    #[test]
    fn an_authority_is_asked_for_one_wildcard_per_region() {
        let mut config = parse(ACME);
        config.relative_to(Path::new("/conf"));
        assert_eq!(config.unusable("example.com"), None);
        let acme = config.acme(&["us-east-1".into(), "eu-west-1".into()], "example.com", "/data/acme".into()).unwrap();
        assert_eq!(acme.names, ["*.lambda-microvm.us-east-1.example.com", "*.lambda-microvm.eu-west-1.example.com"]);
        assert_eq!((acme.directory.as_str(), acme.hook.as_path()), (DIRECTORY, Path::new("/conf/hook")));
        assert_eq!(acme.contacts, ["mailto:ops@example.com"]);
    }

    #[test]
    fn what_no_authority_would_do_is_refused_with_the_key() {
        let key = |config: &TlsConfig, domain: &str| config.unusable(domain).unwrap().0;
        assert_eq!(key(&parse(ACME), "localhost"), "domain");
        assert_eq!(key(&parse(&ACME.replace("= true", "= false")), "example.com"), "tls.acme.agree_to_terms");
        assert_eq!(key(&parse(&format!("{ACME}\ndirectory = 'http://a/d'")), "example.com"), "tls.acme.directory");
        assert_eq!(key(&parse(&format!("{ACME}\n[[certificates]]\nchain = 'c'\nkey = 'k'")), "example.com"), "tls.acme");
        let external = parse(&format!("{ACME}\nexternal_account = {{ id = 'i', key = '*' }}"));
        assert_eq!(key(&external, "example.com"), "tls.acme.external_account.key");
    }
}
