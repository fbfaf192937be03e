//! The server's settings: a TOML file, and flags that win over it.
//!
//! ```toml
//! domain = "localhost"
//! min_idle_seconds = 60
//! engine = "auto"
//!
//! [[credentials]]
//! access_key_id = "AKIA…"
//! secret_access_key = "…"
//!
//! [network]
//! nameservers = ["192.0.2.53"]
//!
//! [logs]
//! retention_days = 14
//! slots = "10.201.0.0/16"
//! ```

mod builds;
mod endpoints;
mod guests;
mod machines;
mod quotas;
mod tls;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use hearth_build::ArchiveLimits;
use hearth_machine::network::EgressPolicy;
use hearth_machine::network::Links;
use serde::{Deserialize, Deserializer, de};

pub use builds::{BuildCacheConfig, RegistriesConfig};
pub use endpoints::EndpointsConfig;
pub use guests::{AwsConfig, ExtensionsConfig, RolesConfig};
pub use machines::{ActivityConfig, Architectures, BuildIsolation, CapacityConfig, GuestSize};
pub use quotas::{ConnectorConfig, QuotasConfig};
pub use tls::TlsConfig;

use crate::credentials::Credentials;

/// Where the MicroVMs' endpoints are unless the settings say otherwise.
pub const DEFAULT_ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8443);

/// Every setting of the server, with its unit and its default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    /// Address of the AWS APIs. `127.0.0.1:8470`; port 0 picks a free one.
    #[serde(deserialize_with = "address")]
    pub api: SocketAddr,
    /// Address of the MicroVMs' endpoints. When it is absent: `127.0.0.1:8443`, and `127.0.0.1:443` too if that is free, so that
    /// `https://<endpoint>/` works as it stands. Port 0 picks a free one.
    #[serde(deserialize_with = "some_address")]
    pub endpoint: Option<SocketAddr>,
    /// Domain under which the endpoints' names are: `<uuid>.lambda-microvm.<region>.<domain>`. `localhost`.
    pub domain: String,
    /// Region that the server is, and that its own command line uses. `us-east-1`.
    pub region: String,
    /// Further regions that are served, each with images and MicroVMs of its own. None.
    pub regions: Vec<String>,
    /// Account of the administrator, twelve digits. `000000000000`.
    pub account: String,
    /// Where the endpoints' certificates come from.
    pub tls: TlsConfig,
    /// Keys of the administrator. The first is what `hearth env` prints. When there are none: one pair, made at the first start.
    pub credentials: Vec<Credentials>,
    /// Users and roles, beside those that `hearth iam` makes. An account has images, MicroVMs and buckets of its own.
    pub accounts: Vec<AccountConfig>,
    /// Least value of `maxIdleDurationSeconds` that the API accepts, in seconds, at least 1. 60, as AWS has it.
    pub min_idle_seconds: u32,
    /// Virtual machine monitor's accelerator: `auto` (kvm if it runs kernels natively, else tcg), `kvm` or `tcg`. `auto`.
    pub engine: EngineChoice,
    /// Directory of the guest kit. `$HEARTH_KIT`, else `../kit` and `kit` beside the program, else `/usr/lib/hearth/kit`.
    pub kit: Option<PathBuf>,
    /// Directory of the image builder's layer cache. `build-cache` in the data directory.
    pub build_cache_dir: Option<PathBuf>,
    /// Builds that run at once, at least 1. 1 with up to two processors, else 2.
    pub max_concurrent_builds: Option<u32>,
    /// Longest time a Dockerfile may take, in seconds. 1800.
    pub build_timeout_seconds: u32,
    /// Most that an image's archive may unpack to, in MiB, without what its `.dockerignore` names. 2048.
    pub build_context_mib: u32,
    /// Most files, links and directories of an image's archive, without what its `.dockerignore` names. 100000.
    pub build_context_entries: u32,
    /// Longest time from the start of an image's app until it accepts connections, in seconds. 300.
    pub ready_timeout_seconds: u32,
    /// Longest time that a request to an endpoint is held while its MicroVM wakes, in seconds. 60.
    pub wake_timeout_seconds: u32,
    /// Longest time that the app of a MicroVM that is terminated may take to end after its stop signal, in seconds; 0 kills it at once. 2.
    pub stop_grace_seconds: u32,
    /// Time that terminated MicroVMs stay in lists, in seconds. 86400, a day.
    pub terminated_retention_seconds: u32,
    /// What guests see of the size that their image asks for: `baseline`, that size, or `peak`, four times its memory and AWS's processors for
    /// it, as far as the host has them. Applies to images that are built from then on. `baseline`.
    pub guest_size: GuestSize,
    /// What the steps of a Dockerfile run in: `namespaces` of this host, or a `microvm` of their own; `auto`: a MicroVM where the processor runs
    /// it, namespaces where it would be emulated. `auto`.
    pub build_isolation: BuildIsolation,
    /// Most memory of an image build, in MiB. In namespaces three quarters of the host's, in a MicroVM a quarter and 4096 at most, divided by the
    /// builds that may run at once.
    pub build_memory_mib: Option<u32>,
    /// Free space of the disk that image builds leave, in MiB: a build that takes more is ended. 0 lets them fill it. 1024.
    pub build_disk_reserve_mib: u32,
    /// What becomes of an image that asks for another architecture than the host's: with `host` it is built for the host's, and its log says
    /// so; with `strict` it is refused. `host`.
    pub architectures: Architectures,
    /// How much of the host's memory MicroVMs may have.
    pub capacity: CapacityConfig,
    /// What keeps MicroVMs awake, beside bytes that cross their endpoints.
    pub activity: ActivityConfig,
    /// What each account may have and do in each region.
    pub quotas: QuotasConfig,
    /// How much each MicroVM's endpoint may be used.
    pub endpoints: EndpointsConfig,
    /// What MicroVMs may reach through network connectors, by the connectors' names. None.
    pub connectors: BTreeMap<String, ConnectorConfig>,
    /// Limits of the image builds' layers.
    pub build_cache: BuildCacheConfig,
    /// How image builds reach registries.
    pub registries: RegistriesConfig,
    /// The MicroVMs' networks.
    pub network: NetworkConfig,
    /// What is kept of the logs of builds and MicroVMs.
    pub logs: LogsConfig,
    /// What is logged, on standard error.
    pub log: LogConfig,
    /// Where credentials of execution roles and build roles come from.
    pub roles: RolesConfig,
    /// What AWS does not have.
    pub extensions: ExtensionsConfig,
}

/// An account's users and roles.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountConfig {
    /// Twelve digits; may be the administrator's.
    pub id: String,
    #[serde(default)]
    pub users: Vec<UserConfig>,
    #[serde(default)]
    pub roles: Vec<RoleConfig>,
}

/// A user. Policy documents are JSON, or the name of a file that has it, relative to the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserConfig {
    /// 1–64 letters, digits and `_+=,.@-`.
    pub name: String,
    /// May do everything in the account. `false`.
    #[serde(default)]
    pub administrator: bool,
    /// What the user may do. Nothing.
    pub policy: Option<String>,
    /// What the user signs with. None.
    #[serde(default)]
    pub keys: Vec<Credentials>,
}

/// A role.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleConfig {
    /// As for users.
    pub name: String,
    /// Who may assume it.
    pub trust: String,
    /// What its sessions may do.
    pub policy: String,
}

/// The MicroVMs' networks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Resolvers for the guests. When there are none: the host's, those on its loopback left out.
    pub nameservers: Vec<Ipv4Addr>,
    /// Range of addresses between the host and the MicroVMs' network slots, four for each; one that nothing else on the host's networks
    /// uses. `10.201.0.0/16`.
    pub slots: Links,
}

/// What is kept of the logs of builds and MicroVMs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogsConfig {
    /// Days after which lines are removed, 1 to 3653. 14.
    pub retention_days: u32,
    /// Largest size of a log group in MiB, 1 to 1048576; the oldest lines go when it is reached. 256.
    pub group_mib: u32,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,hearth_control=debug`. `info`. `HEARTH_LOG` wins over it.
    pub level: String,
    /// `text` or `json`. `text`.
    pub format: LogFormat,
}

/// Which accelerator to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    Auto,
    Kvm,
    Tcg,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// The settings that have a flag. An absent one leaves the file's value.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Address of the AWS APIs; port 0 picks a free one [default: 127.0.0.1:8470].
    #[arg(long, value_name = "ADDRESS")]
    pub api: Option<SocketAddr>,
    /// Address of the MicroVMs' endpoints; port 0 picks a free one [default: 127.0.0.1:8443, and 127.0.0.1:443 if it is free].
    #[arg(long, value_name = "ADDRESS")]
    pub endpoint: Option<SocketAddr>,
    /// Domain of the endpoints' names [default: localhost].
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Region that the server is [default: us-east-1].
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// Account that everything belongs to [default: 000000000000].
    #[arg(long, value_name = "DIGITS")]
    pub account: Option<String>,
    /// Least idle time that the API accepts [default: 60].
    #[arg(long, value_name = "SECONDS")]
    pub min_idle_seconds: Option<u32>,
}

/// The settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// the file cannot be read
    #[error("reading the configuration file {path}: {source}")]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the file is not TOML, or a key in it is unknown or of another type
    #[error("the configuration file {path} is not understood: {source}")]
    Parse {
        /// The configuration file.
        path: PathBuf,
        /// Which line, which key, what was expected.
        source: Box<toml::de::Error>,
    },
    /// a document of a user or a role is not a policy
    #[error("accounts in {origin}: {source}; `hearth iam policy validate FILE` checks a document")]
    Policy {
        /// The file.
        origin: String,
        /// Where, and what was expected.
        source: hearth_identity::PolicyError,
    },
    /// a rule of a connector is not one
    #[error("connectors.{name} in {origin}: {source}")]
    Connector {
        /// The connector.
        name: String,
        /// The file.
        origin: String,
        /// Which rule, and what was expected.
        source: hearth_machine::network::EgressError,
    },
    /// a value is outside what makes sense
    #[error("{key} = {found} in {origin}: write {expected} instead")]
    Value {
        /// The setting.
        key: &'static str,
        /// Its value.
        found: String,
        /// The file, or the command line.
        origin: String,
        /// What would do.
        expected: &'static str,
    },
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            api: SocketAddr::from(([127, 0, 0, 1], 8470)),
            endpoint: None,
            domain: "localhost".to_owned(),
            region: "us-east-1".to_owned(),
            regions: Vec::new(),
            account: "000000000000".to_owned(),
            tls: TlsConfig::default(),
            credentials: Vec::new(),
            accounts: Vec::new(),
            min_idle_seconds: 60,
            engine: EngineChoice::Auto,
            kit: None,
            build_cache_dir: None,
            max_concurrent_builds: None,
            build_timeout_seconds: 1800,
            build_context_mib: 2048,
            build_context_entries: 100_000,
            ready_timeout_seconds: 300,
            wake_timeout_seconds: 60,
            stop_grace_seconds: 2,
            terminated_retention_seconds: 86_400,
            guest_size: GuestSize::Baseline,
            build_isolation: BuildIsolation::Auto,
            build_memory_mib: None,
            build_disk_reserve_mib: 1024,
            architectures: Architectures::Host,
            capacity: CapacityConfig::default(),
            activity: ActivityConfig::default(),
            quotas: QuotasConfig::default(),
            endpoints: EndpointsConfig::default(),
            connectors: BTreeMap::new(),
            build_cache: BuildCacheConfig::default(),
            registries: RegistriesConfig::default(),
            network: NetworkConfig::default(),
            logs: LogsConfig::default(),
            log: LogConfig::default(),
            roles: RolesConfig::default(),
            extensions: ExtensionsConfig::default(),
        }
    }
}

impl Default for LogsConfig {
    fn default() -> Self {
        Self { retention_days: 14, group_mib: 256 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

impl ServeConfig {
    /// Reads the file, if there is one, and lets the flags win over it.
    pub fn load(file: Option<&Path>, flags: Flags) -> Result<Self, ConfigError> {
        let mut config = match file {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        let origin = file.map_or_else(|| "the defaults".to_owned(), |path| path.display().to_string());
        config.check(&origin)?;
        config.apply(flags);
        config.check("the command line")?;
        Ok(config)
    }

    /// Every region that is served, the server's own first.
    pub fn served_regions(&self) -> Vec<String> {
        let others = self.regions.iter().filter(|region| **region != self.region);
        std::iter::once(&self.region).chain(others).cloned().collect()
    }

    /// Longest time a Dockerfile may take.
    pub fn build_timeout(&self) -> Duration {
        Duration::from_secs(self.build_timeout_seconds.into())
    }

    /// What an image's archive may hold.
    pub fn archive_limits(&self) -> ArchiveLimits {
        ArchiveLimits { unpacked_bytes: u64::from(self.build_context_mib) << 20, entries: self.build_context_entries.into() }
    }

    /// Longest time until an image's app accepts connections.
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_secs(self.ready_timeout_seconds.into())
    }

    /// Longest time that a request waits for its MicroVM to wake.
    pub fn wake_timeout(&self) -> Duration {
        Duration::from_secs(self.wake_timeout_seconds.into())
    }

    /// What MicroVMs may reach through connectors, by their names.
    pub fn egress_policies(&self) -> BTreeMap<String, EgressPolicy> {
        // A rule that is none was refused when the file was read.
        self.connectors.iter().filter_map(|(name, connector)| Some((name.clone(), connector.policy().ok()?))).collect()
    }

    /// How long an app may take to end after its stop signal.
    pub fn stop_grace(&self) -> Duration {
        Duration::from_secs(self.stop_grace_seconds.into())
    }

    /// How long terminated MicroVMs stay in lists.
    pub fn terminated_retention(&self) -> Duration {
        Duration::from_secs(self.terminated_retention_seconds.into())
    }

    /// What is kept of logs.
    pub fn log_retention(&self) -> hearth_control::logs::Retention {
        hearth_control::logs::Retention {
            age: Duration::from_secs(u64::from(self.logs.retention_days) * 24 * 3600),
            group_bytes: u64::from(self.logs.group_mib) << 20,
        }
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let parsed = toml::from_str(&text);
        let mut config: Self = parsed.map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        let beside = path.parent().unwrap_or(Path::new("."));
        config.tls.relative_to(beside);
        for account in &mut config.accounts {
            let of_users = account.users.iter_mut().filter_map(|user| user.policy.as_mut());
            let of_roles = account.roles.iter_mut().flat_map(|role| [&mut role.trust, &mut role.policy]);
            for document in of_users.chain(of_roles) {
                if !document.trim_start().starts_with('{') {
                    let path = beside.join(&*document);
                    *document = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path, source })?;
                }
            }
        }
        Ok(config)
    }

    fn apply(&mut self, flags: Flags) {
        let Flags { api, endpoint, domain, region, account, min_idle_seconds } = flags;
        self.api = api.unwrap_or(self.api);
        self.endpoint = endpoint.or(self.endpoint);
        self.min_idle_seconds = min_idle_seconds.unwrap_or(self.min_idle_seconds);
        for (setting, flag) in [(&mut self.domain, domain), (&mut self.region, region), (&mut self.account, account)] {
            if let Some(flag) = flag {
                *setting = flag;
            }
        }
    }

    fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let refuse = |key, found: &dyn fmt::Display, expected| {
            Err(ConfigError::Value { key, found: found.to_string(), origin: origin.to_owned(), expected })
        };
        if self.account.len() != 12 || !self.account.bytes().all(|byte| byte.is_ascii_digit()) {
            return refuse("account", &self.account, "twelve digits, such as \"000000000000\",");
        }
        let region = "lower-case letters, digits and hyphens, such as \"us-east-1\",";
        if !is_region(&self.region) {
            return refuse("region", &self.region, region);
        }
        if let Some(bad) = self.regions.iter().find(|name| !is_region(name)) {
            return refuse("regions", bad, region);
        }
        if !is_domain(&self.domain) {
            return refuse("domain", &self.domain, "a domain name in lower case without a dot at either end, such as \"localhost\",");
        }
        let seconds = [
            ("min_idle_seconds", self.min_idle_seconds, 28_800, "a number of seconds from 1 to 28800"),
            ("build_timeout_seconds", self.build_timeout_seconds, 86_400, "a number of seconds from 1 to 86400"),
            ("build_context_mib", self.build_context_mib, 1 << 20, "a number of MiB from 1 to 1048576"),
            ("build_context_entries", self.build_context_entries, 10_000_000, "a number from 1 to 10000000"),
            ("ready_timeout_seconds", self.ready_timeout_seconds, 3_600, "a number of seconds from 1 to 3600"),
            ("wake_timeout_seconds", self.wake_timeout_seconds, 600, "a number of seconds from 1 to 600"),
            ("logs.retention_days", self.logs.retention_days, 3_653, "a number of days from 1 to 3653"),
            ("logs.group_mib", self.logs.group_mib, 1 << 20, "a number of MiB from 1 to 1048576"),
            ("build_cache.max_mib", self.build_cache.max_mib, u32::MAX, "a number of MiB above 0"),
            ("build_cache.max_days", self.build_cache.max_days, 3_650, "a number of days from 1 to 3650"),
            ("capacity.memory_mib", self.capacity.memory_mib.unwrap_or(1), u32::MAX, "a number of MiB above 0"),
            ("activity.cpu_percent", self.activity.cpu_percent.unwrap_or(1).into(), 100, "a number of percent from 1 to 100"),
            ("max_concurrent_builds", self.max_concurrent_builds.unwrap_or(1), 64, "a number from 1 to 64"),
        ];
        for (key, value, most, expected) in seconds {
            if !(1..=most).contains(&value) {
                return refuse(key, &value, expected);
            }
        }
        if let Some(bad) = self.build_memory_mib.filter(|mib| !(256..=1 << 20).contains(mib)) {
            return refuse("build_memory_mib", &bad, "a number of MiB from 256 to 1048576");
        }
        if !(1.0..=64.0).contains(&self.capacity.overcommit) {
            return refuse("capacity.overcommit", &self.capacity.overcommit, "a number from 1 to 64");
        }
        if let Some(bad) = self.registries.unusable() {
            return refuse("registries.local", &bad, "an address and port of the loopback, such as \"127.0.0.1:5000\",");
        }
        if let Some(bad) = self.credentials.iter().find(|pair| !pair.is_usable()) {
            return refuse("credentials.access_key_id", &bad.access_key_id, "3 to 128 letters and digits, and a secret that is not empty,");
        }
        let keys = self.accounts.iter().flat_map(|account| &account.users).flat_map(|user| &user.keys);
        if let Some(bad) = keys.into_iter().find(|pair| !pair.is_usable()) {
            return refuse(
                "accounts.users.keys.access_key_id",
                &bad.access_key_id,
                "3 to 128 letters and digits, and a secret that is not empty,",
            );
        }
        let documents = crate::iam::configured(&self.accounts);
        documents.map_err(|source| ConfigError::Policy { origin: origin.to_owned(), source })?;
        if let Some((key, rate)) = self.quotas.unusable() {
            let found = format!("{{ per_second = {}, burst = {} }}", rate.per_second, rate.burst);
            return refuse(key, &found, "a per_second above 0 and a burst of at least 1");
        }
        if let Some(key) = self.endpoints.unusable() {
            return refuse(key, &0, "a number above 0");
        }
        for (name, connector) in &self.connectors {
            connector.policy().map_err(|source| ConfigError::Connector { name: name.clone(), origin: origin.to_owned(), source })?;
        }
        if let Some((key, found, expected)) = self.tls.unusable(&self.domain) {
            return refuse(key, &found, expected);
        }
        if let Some((key, found, expected)) = self.roles.unusable() {
            return refuse(key, &found, expected);
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.level).is_err() {
            return refuse("log.level", &self.log.level, "\"error\", \"warn\", \"info\", \"debug\" or \"trace\"");
        }
        Ok(())
    }
}

/// Where a client on this host finds a listener: an address that stands for all of them stands for loopback too.
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| de::Error::custom(format!("expected an address and a port such as \"127.0.0.1:8470\", found \"{text}\"")))
}

fn some_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    address(deserializer).map(Some)
}

fn is_region(text: &str) -> bool {
    !text.is_empty() && text.len() <= 32 && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    // With `<uuid>.lambda-microvm.<region>.` before it, the whole name must stay within 253 bytes.
    text.len() <= 160 && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, flags: Flags) -> Result<ServeConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hearth.toml");
        std::fs::write(&path, text).unwrap();
        ServeConfig::load(Some(&path), flags)
    }

    fn refusal(text: &str) -> String {
        load(text, Flags::default()).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(load("", Flags::default()).unwrap(), ServeConfig::default());
    }

    #[test]
    fn every_setting_can_be_written() {
        let config = load(
            r#"
            api = "127.0.0.1:0"
            endpoint = "0.0.0.0:443"
            domain = "on.aws"
            region = "eu-central-1"
            account = "123456789012"
            min_idle_seconds = 1
            engine = "tcg"
            kit = "/kit"
            build_cache_dir = "/cache"
            max_concurrent_builds = 2
            build_timeout_seconds = 60
            build_context_mib = 63
            build_context_entries = 64
            ready_timeout_seconds = 61
            wake_timeout_seconds = 62
            terminated_retention_seconds = 0
            [[credentials]]
            access_key_id = "AKIAEXAMPLE"
            secret_access_key = "s3cret"
            [build_cache]
            max_mib = 100
            max_days = 1
            [registries]
            auth_file = "/logins.json"
            insecure = ["registry.lan:5000"]
            local = ["127.0.0.1:5000"]
            [network]
            nameservers = ["192.0.2.1"]
            slots = "192.168.64.0/20"
            [logs]
            retention_days = 3
            group_mib = 64
            [log]
            level = "debug"
            format = "json"
            "#,
            Flags::default(),
        )
        .unwrap();
        assert_eq!(config.endpoint.unwrap().port(), 443);
        assert_eq!(config.engine, EngineChoice::Tcg);
        assert_eq!(config.credentials[0].access_key_id, "AKIAEXAMPLE");
        assert_eq!(config.network.nameservers, [Ipv4Addr::new(192, 0, 2, 1)]);
        assert_eq!(config.network.slots.to_string(), "192.168.64.0/20");
        assert_eq!(config.build_cache.limits().bytes, 100 << 20);
        assert_eq!(config.registries.registries().local, ["127.0.0.1:5000".parse().unwrap()]);
        assert_eq!(config.logs, LogsConfig { retention_days: 3, group_mib: 64 });
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.wake_timeout(), Duration::from_secs(62));
        assert_eq!(config.archive_limits(), ArchiveLimits { unpacked_bytes: 63 << 20, entries: 64 });
    }

    #[test]
    fn archive_limits_default_is_the_builder_s() {
        assert_eq!(ServeConfig::default().archive_limits(), ArchiveLimits::default());
    }

    const ACCOUNTS: &str = r#"
        regions = ["eu-west-1", "us-east-1"]
        [[accounts]]
        id = "111111111111"
        [[accounts.users]]
        name = "ann"
        policy = """{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "lambda:*", "Resource": "*"}}"""
        keys = [{ access_key_id = "AKIAANN", secret_access_key = "s" }]
        [[accounts.roles]]
        name = "worker"
        trust = """{"Statement": {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}}"""
        policy = "POLICY"
    "#;

    #[test]
    fn accounts_have_users_and_roles_with_documents_written_out_or_in_files() {
        let dir = tempfile::tempdir().unwrap();
        let allow = r#"{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:Get*", "Resource": "*"}}"#;
        std::fs::write(dir.path().join("worker.json"), allow).unwrap();
        let path = dir.path().join("hearth.toml");
        std::fs::write(&path, ACCOUNTS.replace("POLICY", "worker.json")).unwrap();
        let config = ServeConfig::load(Some(&path), Flags::default()).unwrap();
        assert_eq!(config.served_regions(), ["us-east-1", "eu-west-1"]);
        assert_eq!(config.accounts[0].roles[0].policy, allow);
        assert_eq!(config.accounts[0].users[0].keys[0].access_key_id, "AKIAANN");

        let missing = refusal(&ACCOUNTS.replace("POLICY", "none.json"));
        assert!(missing.contains("none.json"), "{missing}");
        std::fs::write(&path, ACCOUNTS.replace("POLICY", "worker.json").replace("\"lambda:*\"", "\"lambda\"")).unwrap();
        let malformed = ServeConfig::load(Some(&path), Flags::default()).unwrap_err().to_string();
        assert!(malformed.contains("MalformedPolicyDocument: Statement[0]") && malformed.contains("hearth.toml"), "{malformed}");
    }

    #[test]
    fn flags_win_over_the_file_and_absent_flags_leave_it() {
        let flags = Flags { region: Some("eu-west-1".to_owned()), min_idle_seconds: Some(2), ..Flags::default() };
        let config = load("region = \"us-west-2\"\ndomain = \"on.aws\"\nmin_idle_seconds = 30", flags).unwrap();
        assert_eq!((config.region.as_str(), config.domain.as_str(), config.min_idle_seconds), ("eu-west-1", "on.aws", 2));
    }

    #[test]
    fn an_unknown_key_is_named_with_the_line_the_file_and_the_known_ones() {
        let error = refusal("domain = \"localhost\"\nmin_idle = 3");
        for part in ["hearth.toml", "line 2", "unknown field `min_idle`", "`min_idle_seconds`"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_value_of_another_kind_is_named_with_what_was_expected() {
        assert!(refusal("engine = \"xen\"").contains("expected one of `auto`, `kvm`, `tcg`"));
        assert!(refusal("network.slots = \"10.0.0.0/16\"").contains("10.0.0.0/16 has addresses of the guests' own link"));
        assert!(refusal("api = \"8470\"").contains("an address and a port such as \"127.0.0.1:8470\""));
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_key_file_and_what_to_write() {
        for (line, key) in [
            ("account = \"12\"", "account = 12"),
            ("region = \"US\"", "region = US"),
            ("domain = \".localhost\"", "domain = .localhost"),
            ("min_idle_seconds = 0", "min_idle_seconds = 0"),
            ("wake_timeout_seconds = 601", "wake_timeout_seconds = 601"),
            ("capacity.overcommit = 0.5", "capacity.overcommit = 0.5"),
            ("activity.cpu_percent = 0", "activity.cpu_percent = 0"),
            ("max_concurrent_builds = 0", "max_concurrent_builds = 0"),
            ("build_memory_mib = 255", "build_memory_mib = 255"),
            ("build_context_mib = 0", "build_context_mib = 0"),
            ("build_context_entries = 0", "build_context_entries = 0"),
            ("logs.retention_days = 0", "logs.retention_days = 0"),
            ("logs.group_mib = 0", "logs.group_mib = 0"),
            ("tls.acme = { dns_hook = \"h\" }", "tls.acme.agree_to_terms = false"),
            ("endpoints.connections_per_gib = 0", "endpoints.connections_per_gib = 0"),
            ("log.level = \"a=b=c\"", "log.level = a=b=c"),
            ("credentials = [{ access_key_id = \"AKIA\", secret_access_key = \"\" }]", "credentials.access_key_id = AKIA"),
        ] {
            let error = refusal(line);
            assert!(error.starts_with(key) && error.contains("hearth.toml: write "), "{error}");
        }
    }

    #[test]
    fn a_bad_flag_is_blamed_on_the_command_line() {
        let flags = Flags { account: Some("x".to_owned()), ..Flags::default() };
        let error = load("", flags).unwrap_err().to_string();
        assert!(error.contains("account = x in the command line"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ServeConfig::load(Some(Path::new("/nonexistent/hearth.toml")), Flags::default()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/hearth.toml"));
    }

    #[test]
    fn a_listener_on_every_address_is_reached_on_loopback() {
        assert_eq!(reachable("0.0.0.0:1".parse().unwrap()).to_string(), "127.0.0.1:1");
        assert_eq!(reachable("192.0.2.1:1".parse().unwrap()).to_string(), "192.0.2.1:1");
    }
}
