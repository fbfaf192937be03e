//! `[quotas]` and `[connectors]`: what each account may have and do in each region, and what MicroVMs may reach.
//!
//! ```toml
//! [quotas]
//! allocated_memory_mib = 16384
//! run = { per_second = 5, burst = 5 }
//!
//! [connectors.github]
//! allow = ["github.com:443", "*.githubusercontent.com:443"]
//! deny = ["10.0.0.0/8"]
//! ```

use hearth_control::quota::{MemoryAccounting, Quotas, Rate};
use hearth_machine::network::{EgressError, EgressPolicy};
use serde::Deserialize;

/// Amounts and rates, by AWS's names for them.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotasConfig {
    /// Memory of all MicroVMs that are not terminated and of all builds that run, in MiB; nothing more is run once it is reached. 409600.
    pub allocated_memory_mib: u64,
    /// What a MicroVM counts for, whatever its guest sees: `baseline`, which is what its image asks for, or `peak`, four times that, as AWS
    /// has it. `baseline`.
    pub memory_accounting: Accounting,
    /// Images. 100.
    pub images: u32,
    /// Versions of an image. 50.
    pub versions_per_image: u32,
    /// Network connectors. 100.
    pub connectors: u32,
    /// Calls of RunMicrovm. 50 per second, 100 at once.
    pub run: RateConfig,
    /// Calls of SuspendMicrovm. 50 per second, 100 at once.
    pub suspend: RateConfig,
    /// Calls of ResumeMicrovm. 50 per second, 100 at once.
    pub resume: RateConfig,
    /// Calls of TerminateMicrovm. 100 per second, 200 at once.
    pub terminate: RateConfig,
    /// Calls of GetMicrovm. 10000 per second, 20000 at once.
    pub get: RateConfig,
    /// Calls of CreateMicrovmAuthToken. 1000 per second, 2000 at once.
    pub auth_token: RateConfig,
    /// Calls of CreateMicrovmShellAuthToken. 100 per second, 200 at once.
    pub shell_token: RateConfig,
}

/// How often a call may be made.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateConfig {
    /// Calls in a second in the long run, above 0.
    pub per_second: f64,
    /// Calls at once after a quiet time, at least 1.
    pub burst: u32,
}

/// How memory is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accounting {
    Baseline,
    Peak,
}

/// What MicroVMs may reach through the connectors of a name, whatever those connectors' tags say.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectorConfig {
    /// Rules such as `example.com:443` or `10.0.0.0/8`. Everything, unless it is there.
    pub allow: Option<Vec<String>>,
    /// Rules of what may not be reached, whatever is allowed. None.
    #[serde(default)]
    pub deny: Vec<String>,
}

impl ConnectorConfig {
    /// The policy that the rules are.
    pub fn policy(&self) -> Result<EgressPolicy, EgressError> {
        let rules = |texts: &[String]| texts.iter().map(|text| text.parse()).collect::<Result<Vec<_>, _>>();
        let everything = ["*".to_owned()];
        EgressPolicy::new(rules(self.allow.as_deref().unwrap_or(&everything))?, rules(&self.deny)?)
    }
}

impl Default for QuotasConfig {
    fn default() -> Self {
        let Quotas {
            allocated_memory_mib,
            memory_accounting,
            images,
            versions_per_image,
            connectors,
            run,
            suspend,
            resume,
            terminate,
            get,
            auth_token,
            shell_token,
        } = Quotas::default();
        Self {
            allocated_memory_mib,
            memory_accounting: match memory_accounting {
                MemoryAccounting::Baseline => Accounting::Baseline,
                MemoryAccounting::Peak => Accounting::Peak,
            },
            images,
            versions_per_image,
            connectors,
            run: run.into(),
            suspend: suspend.into(),
            resume: resume.into(),
            terminate: terminate.into(),
            get: get.into(),
            auth_token: auth_token.into(),
            shell_token: shell_token.into(),
        }
    }
}

impl From<Rate> for RateConfig {
    fn from(Rate { per_second, burst }: Rate) -> Self {
        Self { per_second, burst }
    }
}

impl From<RateConfig> for Rate {
    fn from(RateConfig { per_second, burst }: RateConfig) -> Self {
        Self { per_second, burst }
    }
}

impl From<QuotasConfig> for Quotas {
    fn from(config: QuotasConfig) -> Self {
        Self {
            allocated_memory_mib: config.allocated_memory_mib,
            memory_accounting: match config.memory_accounting {
                Accounting::Baseline => MemoryAccounting::Baseline,
                Accounting::Peak => MemoryAccounting::Peak,
            },
            images: config.images,
            versions_per_image: config.versions_per_image,
            connectors: config.connectors,
            run: config.run.into(),
            suspend: config.suspend.into(),
            resume: config.resume.into(),
            terminate: config.terminate.into(),
            get: config.get.into(),
            auth_token: config.auth_token.into(),
            shell_token: config.shell_token.into(),
        }
    }
}

impl QuotasConfig {
    /// The first rate that lets nothing through, with its key.
    pub fn unusable(&self) -> Option<(&'static str, RateConfig)> {
        let rates = [
            ("quotas.run", self.run),
            ("quotas.suspend", self.suspend),
            ("quotas.resume", self.resume),
            ("quotas.terminate", self.terminate),
            ("quotas.get", self.get),
            ("quotas.auth_token", self.auth_token),
            ("quotas.shell_token", self.shell_token),
        ];
        let usable = |rate: RateConfig| rate.per_second.is_finite() && rate.per_second > 0.0 && rate.burst > 0;
        rates.into_iter().find(|(_, rate)| !usable(*rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_read_and_the_rest_keeps_its_default() {
        let config: QuotasConfig =
            toml::from_str("memory_accounting = \"peak\"\nimages = 3\nrun = { per_second = 0.5, burst = 2 }\n").unwrap();
        let quotas = Quotas::from(config);
        assert_eq!((quotas.memory_accounting, quotas.images), (MemoryAccounting::Peak, 3));
        assert_eq!((quotas.run, quotas.get), (Rate { per_second: 0.5, burst: 2 }, Quotas::default().get));
        assert_eq!(Quotas::from(QuotasConfig::default()), Quotas::default());
        assert!(toml::from_str::<QuotasConfig>("image = 3").is_err());
    }

    #[test]
    fn a_rate_that_lets_nothing_through_is_named() {
        let with = |run| QuotasConfig { run, ..QuotasConfig::default() };
        for run in [
            RateConfig { per_second: 0.0, burst: 1 },
            RateConfig { per_second: f64::INFINITY, burst: 1 },
            RateConfig { per_second: 1.0, burst: 0 },
        ] {
            assert_eq!(with(run).unusable().map(|(key, _)| key), Some("quotas.run"));
        }
        assert_eq!(QuotasConfig::default().unusable(), None);
    }

    #[test]
    fn connectors_are_policies() {
        let config: ConnectorConfig = toml::from_str("allow = [\"example.com:443\"]\ndeny = [\"10.0.0.0/8\"]").unwrap();
        assert_eq!(config.policy(), EgressPolicy::parse("example.com:443", "10.0.0.0/8"));
        let config: ConnectorConfig = toml::from_str("deny = [\"10.0.0.0/8\"]").unwrap();
        assert_eq!(config.policy(), EgressPolicy::parse("*", "10.0.0.0/8"));
        let config: ConnectorConfig = toml::from_str("allow = [\"a..b\"]").unwrap();
        assert!(config.policy().is_err());
    }
}
