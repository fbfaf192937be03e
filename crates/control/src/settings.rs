//! What an operator may set about the domain.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use hearth_machine::network::EgressPolicy;

use crate::quota::Quotas;

/// Settings of [`crate::Control`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// The data directory: `images/`, `microvms/`, `tmp/` and `keys/` are kept in it.
    pub data_dir: PathBuf,
    /// Domain under which the endpoints' names are: `<uuid>.lambda-microvm.<region>.<domain>`.
    pub domain: String,
    /// Builds that run at once, at least 1; others wait in `PENDING`.
    pub max_concurrent_builds: usize,
    /// Longest time an image's first boot may take.
    pub boot_timeout: Duration,
    /// Longest time from the start of an image's app until it accepts connections.
    pub ready_timeout: Duration,
    /// Longest time that a request is held while its MicroVM wakes.
    pub wake_timeout: Duration,
    /// Longest time that the app of a MicroVM that is terminated may take to end after its stop signal.
    pub stop_grace: Duration,
    /// How long terminated MicroVMs stay in lists.
    pub terminated_retention: Duration,
    /// Longest time that [`crate::Control::shutdown`] spends on suspending MicroVMs.
    pub shutdown_timeout: Duration,
    /// Host memory in MiB that is never promised to a MicroVM.
    pub memory_reserve_mib: u64,
    /// Largest code artifact, in bytes.
    pub max_artifact_bytes: u64,
    /// What each account may have and do in each region.
    pub quotas: Quotas,
    /// What MicroVMs may reach through connectors of these names, whatever the connectors' tags say.
    pub connectors: BTreeMap<String, EgressPolicy>,
    /// What guests may use of the server.
    pub guests: GuestSettings,
}

/// What guests may use of the server.
#[derive(Debug, Clone, Copy, Default)]
pub struct GuestSettings {
    /// Where the server's API listens, for guests that have a role. None: they cannot reach it.
    pub api: Option<SocketAddr>,
    /// The environment of images says where the API is, so that SDKs find it.
    pub names_api: bool,
    /// A guest may suspend its own MicroVM.
    pub self_suspend: bool,
}

impl Settings {
    /// The defaults for a data directory.
    pub fn new(data_dir: PathBuf) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            data_dir,
            domain: "localhost".to_owned(),
            max_concurrent_builds: if cores <= 2 { 1 } else { 2 },
            boot_timeout: Duration::from_secs(180),
            ready_timeout: Duration::from_secs(300),
            wake_timeout: Duration::from_secs(60),
            stop_grace: Duration::from_secs(2),
            terminated_retention: Duration::from_secs(24 * 3600),
            shutdown_timeout: Duration::from_secs(60),
            memory_reserve_mib: 256,
            max_artifact_bytes: 1 << 30,
            quotas: Quotas::default(),
            connectors: BTreeMap::new(),
            guests: GuestSettings::default(),
        }
    }
}
