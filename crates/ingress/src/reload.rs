//! Keeps the operator's certificates as their files are: read again when the files change or the operator says so (SIGHUP). Connections that
//! are there go on with what they were opened with, and files that cannot be used leave the ones before them at work.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::sleep};

use crate::{
    certificates::EndpointCertificates,
    chain::{Chain, ChainError, ChainFiles},
    watch::Watch,
};

/// Certificate and key are two files: the second one is replaced this long after the first, at most, by whatever renews them.
const SETTLE: Duration = Duration::from_millis(500);

/// Reads certificates, in order of preference.
pub fn read_chains(files: &[ChainFiles]) -> Result<Vec<Arc<Chain>>, ChainError> {
    files.iter().map(|files| Chain::read(files).map(Arc::new)).collect()
}

/// Reads the files again whenever they change or `hangup` is notified. Never returns.
pub async fn keep_reloading(files: Vec<ChainFiles>, certificates: Arc<EndpointCertificates>, hangup: Arc<Notify>) {
    let watch_files = || {
        Watch::new(files.iter().flat_map(|files| [files.chain.as_path(), files.key.as_path()]))
            .inspect_err(|error| tracing::warn!(%error, "changes of the certificate's files are noticed on SIGHUP only"))
            .ok()
    };
    let mut watch = watch_files();
    loop {
        let changed = async {
            let told = match &mut watch {
                Some(watch) => watch.changed().await.is_ok(),
                None => false,
            };
            if !told {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = changed => sleep(SETTLE).await,
            () = hangup.notified() => tracing::info!("SIGHUP: reading the certificates again"),
        }
        // Made anew each time: what a symbolic link leads to may be elsewhere now. What changes while the files are read is noticed.
        watch = watch_files();
        let read = files.clone();
        match tokio::task::spawn_blocking(move || read_chains(&read)).await {
            Ok(Ok(chains)) => certificates.install(chains),
            Ok(Err(error)) => tracing::error!(%error, "the certificates that are in use stay in use"),
            Err(error) => tracing::error!(%error, "reading certificates failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;
    use crate::{
        LocalCa,
        chain::tests::{files, issued},
    };

    const PATIENCE: Duration = Duration::from_secs(20);
    const NAME: &str = "a.lambda-microvm.us-east-1.example.com";

    fn write(files: &ChainFiles, (chain, key): (String, String)) {
        fs::write(&files.chain, chain).unwrap();
        fs::write(&files.key, key).unwrap();
    }

    #[tokio::test]
    async fn files_that_change_are_read_again_and_bad_ones_are_not_taken() {
        let temp = tempfile::tempdir().unwrap();
        let files = files(temp.path());
        write(&files, issued(&["*.lambda-microvm.us-east-1.example.com"]));
        let ca = LocalCa::load_or_create(&temp.path().join("ca"), "localhost").unwrap();
        let certificates = Arc::new(EndpointCertificates::new(ca, "example.com"));
        certificates.install(read_chains(std::slice::from_ref(&files)).unwrap());
        let served = || certificates.certificate(Some(NAME)).unwrap().unwrap();
        let first = served();
        let hangup = Arc::new(Notify::new());
        let reloading = tokio::spawn(keep_reloading(vec![files.clone()], certificates.clone(), hangup.clone()));

        fs::write(&files.chain, "rubbish").unwrap();
        hangup.notify_one();
        let mut installed = certificates.installs();
        assert!(timeout(4 * SETTLE, installed.changed()).await.is_err(), "rubbish is not taken");
        assert!(Arc::ptr_eq(&first, &served()));

        write(&files, issued(&["*.lambda-microvm.us-east-1.example.com"]));
        hangup.notify_one();
        timeout(PATIENCE, installed.changed()).await.expect("the new certificate is taken").unwrap();
        assert!(!Arc::ptr_eq(&first, &served()));
        reloading.abort();
    }
}
