//! Certificates from an authority that speaks ACME (RFC 8555), by configuration: one for the wildcards of all served regions, renewed in the
//! background. Wildcards are proved by DNS records (dns-01), which a program of the operator's adds and removes.
//!
//! ```text
//! kept certificate still good? ─▶ wait ─▶ account ─▶ order ─▶ hook: add records ─▶ authority looks ─▶ hook: remove ─▶ certificate ─▶ kept, installed
//!                                  ▲───────────────────── failed: wait longer each time ─────────────────────┘
//! ```

mod hook;
mod order;
mod store;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::Notify, time::timeout};

use self::store::Store;
use crate::{
    certificates::EndpointCertificates,
    chain::{Chain, ChainError},
};

/// Longest time that an order may take, with all that the hook does.
const ORDER_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Wait after a first failure. It doubles with each further one: authorities count failures by the hour, and stop answering.
const FIRST_RETRY: Duration = Duration::from_secs(5 * 60);
const LAST_RETRY: Duration = Duration::from_secs(6 * 3600);

/// No wait is longer: clocks are set, and hosts sleep.
const LONGEST_WAIT: Duration = Duration::from_secs(12 * 3600);

/// How to get certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcmeConfig {
    /// URL of the authority's directory.
    pub directory: String,
    /// Where the authority may write to, `mailto:` URLs.
    pub contacts: Vec<String>,
    /// PEM of the authority that the directory's own certificate is from; the system's, when absent.
    pub ca: Option<PathBuf>,
    /// Some authorities want to know whose account it is.
    pub external_account: Option<ExternalAccount>,
    /// Program that is called as `HOOK add|remove NAME VALUE` for a TXT record, and ends when the record is there, or gone.
    pub hook: PathBuf,
    /// The names to have in the certificate.
    pub names: Vec<String>,
    /// Directory for the account and the certificate.
    pub dir: PathBuf,
}

/// An account that the operator has with the authority already (RFC 8555, 7.3.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalAccount {
    /// Identifier of the key.
    pub id: String,
    /// The HMAC key itself.
    pub key: Vec<u8>,
}

/// There is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
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
    /// the authority, or the way to it
    #[error("{action}: {source}")]
    Authority {
        /// What was being done.
        action: &'static str,
        /// What it said.
        source: instant_acme::Error,
    },
    /// the authority offers no DNS challenge for a name
    #[error("the authority does not offer dns-01 for {0}, and wildcards can be proved by nothing else")]
    NoDnsChallenge(String),
    /// the authority did not find what it looked for
    #[error("the authority did not accept the records: {0}")]
    Refused(String),
    /// the operator's program failed
    #[error("{} {action} {record}: {reason}", hook.display())]
    Hook {
        /// The program.
        hook: PathBuf,
        /// `add` or `remove`.
        action: &'static str,
        /// Name of the record.
        record: String,
        /// How it failed.
        reason: String,
    },
    /// the certificate is none
    #[error("what the authority sent cannot be used: {0}")]
    Unusable(#[from] ChainError),
    /// nothing came of it in time
    #[error("the order was not done within {} minutes", .0.as_secs() / 60)]
    TooLong(Duration),
}

/// The certificate that was kept from an earlier life, if there is one that can be used. One that cannot is had anew.
pub fn kept_chain(config: &AcmeConfig) -> Result<Option<Arc<Chain>>, AcmeError> {
    Ok(Store::new(config).certificate()?.map(|kept| Arc::new(kept.chain)))
}

/// Sees to it that there is a certificate that is good. `hangup` makes it look, and try, at once. Never returns.
pub async fn keep_issuing(config: AcmeConfig, certificates: Arc<EndpointCertificates>, hangup: Arc<Notify>) {
    let mut failures = 0;
    loop {
        let wait = match due_in(&config, SystemTime::now()) {
            Ok(wait) if !wait.is_zero() => wait.min(LONGEST_WAIT),
            Ok(_) => match timeout(ORDER_LIMIT, order::issue(&config)).await.unwrap_or(Err(AcmeError::TooLong(ORDER_LIMIT))) {
                Ok(chain) => {
                    failures = 0;
                    certificates.install(vec![Arc::new(chain)]);
                    continue;
                }
                Err(error) => failed(&mut failures, &error),
            },
            Err(error) => failed(&mut failures, &error),
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = hangup.notified() => tracing::info!("SIGHUP: looking after the certificate"),
        }
    }
}

fn failed(failures: &mut u32, error: &AcmeError) -> Duration {
    let wait = retry_in(*failures);
    *failures = failures.saturating_add(1);
    tracing::error!(%error, retry_in_seconds = wait.as_secs(), "no certificate could be had; the one in use stays in use, or the local authority's");
    wait
}

fn retry_in(failures: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures)).min(LAST_RETRY)
}

/// How long the kept certificate will do.
fn due_in(config: &AcmeConfig, now: SystemTime) -> Result<Duration, AcmeError> {
    let Some(kept) = Store::new(config).certificate()? else { return Ok(Duration::ZERO) };
    if kept.directory != config.directory || !covers_all(&kept.chain, &config.names) {
        return Ok(Duration::ZERO);
    }
    Ok(renewal(&kept.chain).duration_since(now).unwrap_or_default())
}

/// When two thirds of the life are over, as authorities recommend.
fn renewal(chain: &Chain) -> SystemTime {
    let life = chain.not_after().duration_since(chain.not_before()).unwrap_or_default();
    chain.not_before() + life * 2 / 3
}

fn covers_all(chain: &Chain, names: &[String]) -> bool {
    names.iter().all(|name| chain.names().contains(name))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::chain::tests::issued;

    const NAME: &str = "*.lambda-microvm.us-east-1.example.com";

    pub(super) fn config(dir: &Path) -> AcmeConfig {
        AcmeConfig {
            directory: "https://acme.example.com/directory".into(),
            contacts: Vec::new(),
            ca: None,
            external_account: None,
            hook: dir.join("hook"),
            names: vec![NAME.into()],
            dir: dir.join("acme"),
        }
    }

    #[test]
    fn a_certificate_is_due_when_it_is_missing_old_or_for_something_else() {
        let temp = tempfile::tempdir().unwrap();
        let config = config(temp.path());
        let now = SystemTime::now();
        assert_eq!(due_in(&config, now).unwrap(), Duration::ZERO, "there is none");
        let (chain, key) = issued(&[NAME]);
        let chain = Store::new(&config).keep_certificate(&chain, &key).unwrap();
        assert!(!due_in(&config, now).unwrap().is_zero());
        assert!(due_in(&config, renewal(&chain)).unwrap().is_zero());
        assert_eq!(kept_chain(&config).unwrap().unwrap().names(), [NAME]);

        let elsewhere = AcmeConfig { directory: "https://other.example.com/directory".into(), ..config.clone() };
        assert!(due_in(&elsewhere, now).unwrap().is_zero(), "from another authority");
        let more = AcmeConfig { names: vec![NAME.into(), "*.lambda-microvm.eu-west-1.example.com".into()], ..config };
        assert!(due_in(&more, now).unwrap().is_zero(), "lacks a region");
    }

    #[test]
    fn failures_are_retried_ever_more_slowly() {
        let minutes: Vec<u64> = [0, 1, 2, 6, 7, 100].map(|failures| retry_in(failures).as_secs() / 60).into();
        assert_eq!(minutes, [5, 10, 20, 320, 360, 360]);
    }
}
