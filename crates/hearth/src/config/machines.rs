//! `[capacity]` and `[activity]`: what of the host MicroVMs may have, and what keeps them awake.
//!
//! ```toml
//! guest_size = "peak"
//!
//! [capacity]
//! memory_mib = 16384
//! overcommit = 2
//!
//! [activity]
//! outbound = true
//! ```

use hearth_control::{ActivitySettings, CapacitySettings};
use hearth_machine::qemu::Accelerator;
use serde::Deserialize;

/// How much of the host's memory MicroVMs may have.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacityConfig {
    /// Memory of the host that this server may use, in MiB. The host's.
    pub memory_mib: Option<u32>,
    /// What is kept of that for everything but MicroVMs, in MiB. 256.
    pub reserve_mib: u32,
    /// How many times over memory is promised to MicroVMs that run, 1 to 64: they share with their image what they do not change. 4.
    pub overcommit: f64,
}

/// What a guest sees of a MicroVM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestSize {
    Baseline,
    Peak,
}

/// What becomes of images that ask for another architecture than the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architectures {
    Host,
    Strict,
}

/// What image builds run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BuildIsolation {
    Auto,
    Namespaces,
    Microvm,
}

impl BuildIsolation {
    /// Whether builds run in MicroVMs.
    pub fn is_microvm(self, accelerator: Accelerator) -> bool {
        match self {
            Self::Auto => accelerator == Accelerator::Kvm,
            Self::Namespaces => false,
            Self::Microvm => true,
        }
    }
}

/// What keeps a MicroVM awake, beside bytes that cross its endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivityConfig {
    /// Bytes that it sends to the network by itself. `false`.
    pub outbound: bool,
    /// Processor time, from this share of one processor on: 1 to 100 percent. None.
    pub cpu_percent: Option<u8>,
    /// Requests and streams on its endpoint that are open, even if no byte moves. `false`.
    pub open_requests: bool,
}

impl Default for CapacityConfig {
    fn default() -> Self {
        Self { memory_mib: None, reserve_mib: 256, overcommit: 4.0 }
    }
}

impl From<CapacityConfig> for CapacitySettings {
    fn from(config: CapacityConfig) -> Self {
        let CapacityConfig { memory_mib, reserve_mib, overcommit } = config;
        Self { memory_mib: memory_mib.map(u64::from), reserve_mib: reserve_mib.into(), overcommit }
    }
}

impl From<GuestSize> for hearth_control::GuestSize {
    fn from(size: GuestSize) -> Self {
        match size {
            GuestSize::Baseline => Self::Baseline,
            GuestSize::Peak => Self::Peak,
        }
    }
}

impl From<Architectures> for hearth_control::Architectures {
    fn from(architectures: Architectures) -> Self {
        match architectures {
            Architectures::Host => Self::Host,
            Architectures::Strict => Self::Strict,
        }
    }
}

impl From<ActivityConfig> for ActivitySettings {
    fn from(config: ActivityConfig) -> Self {
        let ActivityConfig { outbound, cpu_percent, open_requests } = config;
        Self { outbound, cpu_percent, open_requests }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_domain_s() {
        assert_eq!(CapacitySettings::from(CapacityConfig::default()), CapacitySettings::default());
        assert_eq!(ActivitySettings::from(ActivityConfig::default()), ActivitySettings::default());
    }
}
