//! `[endpoints]`: how much each MicroVM's endpoint may be used. Every amount is for one GiB of the memory that the MicroVM's image asks for.
//!
//! ```toml
//! # As AWS has it.
//! [endpoints]
//! connections_per_gib = 16
//! requests_per_second_per_gib = 20
//! bytes_per_second_per_gib = 2000000
//! ```

use hearth_ingress::Limits;
use serde::Deserialize;

/// How much each MicroVM's endpoint may be used; beyond it, clients are answered 429 or wait.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EndpointsConfig {
    /// Connections of clients at once, at least 1. 16384.
    pub connections_per_gib: u32,
    /// Requests in a second, at least 1. No limit.
    pub requests_per_second_per_gib: Option<u32>,
    /// Bytes in a second, both directions together, at least 1. No limit.
    pub bytes_per_second_per_gib: Option<u64>,
}

impl Default for EndpointsConfig {
    fn default() -> Self {
        let Limits { connections_per_gib, requests_per_second_per_gib, bytes_per_second_per_gib } = Limits::default();
        Self { connections_per_gib, requests_per_second_per_gib, bytes_per_second_per_gib }
    }
}

impl From<EndpointsConfig> for Limits {
    fn from(config: EndpointsConfig) -> Self {
        let EndpointsConfig { connections_per_gib, requests_per_second_per_gib, bytes_per_second_per_gib } = config;
        Self { connections_per_gib, requests_per_second_per_gib, bytes_per_second_per_gib }
    }
}

impl EndpointsConfig {
    /// The first limit that lets nothing through.
    pub fn unusable(&self) -> Option<&'static str> {
        let limits = [
            ("endpoints.connections_per_gib", self.connections_per_gib == 0),
            ("endpoints.requests_per_second_per_gib", self.requests_per_second_per_gib == Some(0)),
            ("endpoints.bytes_per_second_per_gib", self.bytes_per_second_per_gib == Some(0)),
        ];
        limits.into_iter().find_map(|(key, none)| none.then_some(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_the_rest_keeps_its_default() {
        let config: EndpointsConfig = toml::from_str("requests_per_second_per_gib = 20").unwrap();
        assert_eq!(Limits::from(config), Limits { requests_per_second_per_gib: Some(20), ..Limits::default() });
        assert_eq!(config.unusable(), None);
        let nothing: EndpointsConfig = toml::from_str("bytes_per_second_per_gib = 0").unwrap();
        assert_eq!(nothing.unusable(), Some("endpoints.bytes_per_second_per_gib"));
        assert!(toml::from_str::<EndpointsConfig>("connections = 3").is_err());
    }
}
