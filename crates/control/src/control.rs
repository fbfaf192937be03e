//! The composition of the domain: what it is started with, and how it ends.

use std::sync::Arc;

use hearth_build::ImageBuilder;
use hearth_machine::Engine;
use hearth_objects::Objects;
use hearth_store::{Store, StoreError};

use crate::{logs::LogStore, settings::Settings, token::Keyring};

/// What [`Control`] works with.
#[derive(Clone)]
pub struct Deps {
    pub store: Store,
    pub engine: Arc<dyn Engine>,
    pub builder: Arc<dyn ImageBuilder>,
    pub objects: Arc<dyn Objects>,
    pub logs: Arc<LogStore>,
    pub keyring: Arc<Keyring>,
    pub settings: Settings,
}

/// The domain cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// the data directory cannot be used
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the database cannot be used
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The domain, as the API ([`crate::plane::ControlPlane`]) and the endpoint proxy ([`crate::plane::DataPlane`]) see it.
pub struct Control {
    #[expect(dead_code, reason = "the planes are not connected yet")]
    deps: Deps,
}

impl Control {
    /// Takes up what an earlier server left in the data directory, and starts. One server at a time; the caller holds the lock.
    pub async fn start(deps: Deps) -> Result<Arc<Self>, StartError> {
        Ok(Arc::new(Self { deps }))
    }

    /// Suspends running MicroVMs, gives up builds, ends the engine's reserves and closes logs and store. No call may come after it.
    pub async fn shutdown(&self) {}
}
