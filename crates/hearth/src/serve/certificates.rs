//! The endpoints' certificates in a running server: read at the start, kept good in the background.

use std::sync::Arc;

use hearth_ingress::{AcmeConfig, ChainFiles, EndpointCertificates, LocalCa};
use tokio::sync::Notify;

use crate::{config::ServeConfig, data_dir::DataDir};

/// The certificates and where they come from.
pub struct Certificates {
    served: Arc<EndpointCertificates>,
    source: Source,
    reload: Arc<Notify>,
}

enum Source {
    /// The local authority alone, which makes them as they are asked for.
    Local,
    Files(Vec<ChainFiles>),
    Acme(AcmeConfig),
}

impl Certificates {
    /// Reads what there is.
    pub fn read(config: &ServeConfig, dir: &DataDir, ca: LocalCa) -> anyhow::Result<Self> {
        let files = config.tls.chain_files();
        let acme = config.tls.acme(&config.served_regions(), &config.domain, dir.acme());
        if files.is_empty() && acme.is_none() {
            ca.require(&config.domain)?;
        }
        let served = Arc::new(EndpointCertificates::new(ca, &config.domain));
        let source = if let Some(acme) = acme {
            served.install(hearth_ingress::kept_chain(&acme)?.into_iter().collect());
            Source::Acme(acme)
        } else if files.is_empty() {
            Source::Local
        } else {
            served.install(hearth_ingress::read_chains(&files)?);
            Source::Files(files)
        };
        Ok(Self { served, source, reload: Arc::default() })
    }

    /// What clients are shown.
    pub fn served(&self) -> Arc<EndpointCertificates> {
        Arc::clone(&self.served)
    }

    /// Notify it to have everything looked at again.
    pub fn reload(&self) -> Arc<Notify> {
        Arc::clone(&self.reload)
    }

    /// Keeps them good. Never returns.
    pub async fn keep(self) {
        match self.source {
            Source::Local => std::future::pending().await,
            Source::Files(files) => hearth_ingress::keep_reloading(files, self.served, self.reload).await,
            Source::Acme(acme) => hearth_ingress::keep_issuing(acme, self.served, self.reload).await,
        }
    }
}
