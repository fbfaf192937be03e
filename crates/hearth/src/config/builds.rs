//! `[build_cache]` and `[registries]`: what image builds keep, and how they reach registries.
//!
//! ```toml
//! [build_cache]
//! max_mib = 20480
//! max_days = 7
//!
//! [registries]
//! auth_file = "/root/.docker/config.json"
//! insecure = ["registry.lan:5000"]
//! local = ["127.0.0.1:5000"]
//! base_mirror = "127.0.0.1:5000/lambda/microvms"
//! ```

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use hearth_build::{CacheLimits, Registries};
use serde::Deserialize;

/// Limits of the layer cache.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BuildCacheConfig {
    /// Most MiB of all accounts' layers together. 20480.
    pub max_mib: u32,
    /// Most days that a layer is used again. 7.
    pub max_days: u32,
}

impl Default for BuildCacheConfig {
    fn default() -> Self {
        Self { max_mib: 20_480, max_days: 7 }
    }
}

impl BuildCacheConfig {
    /// As the builder takes them.
    pub fn limits(&self) -> CacheLimits {
        CacheLimits { bytes: u64::from(self.max_mib) << 20, age: Duration::from_secs(u64::from(self.max_days) * 24 * 3600) }
    }
}

/// How image builds reach registries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistriesConfig {
    /// Logins, in the form of Docker's `config.json`; without credential helpers. None.
    pub auth_file: Option<PathBuf>,
    /// Registries (`host:port`) without TLS, or with a certificate that is not known. None.
    pub insecure: Vec<String>,
    /// Registries on this host's loopback, which builds do not reach otherwise. None.
    pub local: Vec<SocketAddr>,
    /// Repository that has the managed base image, such as `registry.lan:5000/lambda/microvms`; its own if there is none.
    pub base_mirror: Option<String>,
}

impl RegistriesConfig {
    /// An address that is not of the loopback.
    pub fn unusable(&self) -> Option<SocketAddr> {
        self.local.iter().copied().find(|address| !address.ip().is_loopback() || address.port() == 0)
    }

    /// As the builder takes them.
    pub fn registries(&self) -> Registries {
        Registries {
            auth_file: self.auth_file.clone(),
            insecure: self.insecure.clone(),
            local: self.local.clone(),
            base_mirror: self.base_mirror.clone(),
        }
    }
}
