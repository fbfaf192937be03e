//! The real builder.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::{BuildError, BuildRequest, BuilderConfig, Built, ImageBuilder, PrepareError};

/// Builds images with buildah.
#[derive(Debug)]
pub struct Builder {
    config: BuilderConfig,
}

impl Builder {
    /// A builder that keeps its things as `config` says. Call [`Builder::prepare`] before the first build.
    pub fn new(config: BuilderConfig) -> Self {
        Self { config }
    }

    /// Makes the cache ready: removes what a killed predecessor left and imports the managed base image if it is new or has changed.
    pub async fn prepare(&self) -> Result<(), PrepareError> {
        Err(PrepareError(format!("{} is not used yet", self.config.cache_dir.display())))
    }
}

#[async_trait]
impl ImageBuilder for Builder {
    async fn build(&self, _request: BuildRequest, _cancel: CancellationToken) -> Result<Built, BuildError> {
        Err(BuildError::Platform("the builder is not connected yet".to_owned()))
    }
}
