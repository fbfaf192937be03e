//! What an operator may set about the domain.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use hearth_machine::network::EgressPolicy;

use crate::{architecture::Architectures, capacity::HostMemory, images::Sizes, quota::Quotas};

/// Settings of [`crate::Control`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// The data directory: `images/`, `microvms/`, `tmp/` and `keys/` are kept in it.
    pub data_dir: PathBuf,
    /// Domain under which the endpoints' names are: `<uuid>.lambda-microvm.<region>.<domain>`.
    pub domain: String,
    /// Builds that run at once, at least 1; others wait in `PENDING`.
    pub max_concurrent_builds: usize,
    /// The virtual machine that each build runs in; none: they run in namespaces of the host.
    pub build_machine: Option<BuildMachineSettings>,
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
    /// How much of the host's memory MicroVMs may have.
    pub capacity: CapacitySettings,
    /// What guests see of the size that their image asks for. Applies to builds: a snapshot keeps what it was built with.
    pub guest_size: GuestSize,
    /// What becomes of images that ask for another architecture than the host's.
    pub architectures: Architectures,
    /// Largest code artifact, in bytes.
    pub max_artifact_bytes: u64,
    /// What keeps a MicroVM awake, beside bytes that cross its endpoint.
    pub activity: ActivitySettings,
    /// What each account may have and do in each region.
    pub quotas: Quotas,
    /// What MicroVMs may reach through connectors of these names, whatever the connectors' tags say.
    pub connectors: BTreeMap<String, EgressPolicy>,
    /// What guests may use of the server.
    pub guests: GuestSettings,
}

/// Size of the virtual machine that a build runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildMachineSettings {
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub vcpus: u8,
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

/// How much of the host's memory MicroVMs may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CapacitySettings {
    /// Memory of the host that this server may use, in MiB; all of it when absent.
    pub memory_mib: Option<u64>,
    /// What is kept of that for everything but MicroVMs, in MiB.
    pub reserve_mib: u64,
    /// How many times over memory is promised to MicroVMs that run, at least 1: they share with their image what they do not change.
    pub overcommit: f64,
}

/// What a guest sees of a MicroVM's size (SPEC 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestSize {
    /// The memory that its image asks for.
    Baseline,
    /// Four times that, and AWS's number of processors for it, as far as the host has them.
    Peak,
}

/// What keeps a MicroVM awake, beside bytes that cross its endpoint: extensions, all off by default. They are looked at when the idle timer
/// fires, for the time since it fired last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ActivitySettings {
    /// Bytes that it sends to the network by itself.
    pub outbound: bool,
    /// Processor time, from this share of one processor on.
    pub cpu_percent: Option<u8>,
    /// Requests and streams on its endpoint that are open, even if no byte moves.
    pub open_requests: bool,
}

impl Default for CapacitySettings {
    fn default() -> Self {
        Self { memory_mib: None, reserve_mib: 256, overcommit: 4.0 }
    }
}

impl CapacitySettings {
    /// What may be promised, in MiB.
    pub(crate) fn limit_mib(&self, host: Option<HostMemory>) -> Option<u64> {
        let total = self.memory_mib.or(host.map(|host| host.total_mib))?;
        Some(total.saturating_sub(self.reserve_mib))
    }
}

impl Settings {
    /// What the host has for one MicroVM.
    pub(crate) fn sizes(&self) -> Sizes {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Sizes {
            guest: self.guest_size,
            most_vcpus: u8::try_from(cores).unwrap_or(u8::MAX),
            most_memory_mib: self.capacity.limit_mib(HostMemory::read()).unwrap_or(u64::MAX),
        }
    }

    /// The defaults for a data directory.
    pub fn new(data_dir: PathBuf) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            data_dir,
            domain: "localhost".to_owned(),
            max_concurrent_builds: if cores <= 2 { 1 } else { 2 },
            build_machine: None,
            boot_timeout: Duration::from_secs(180),
            ready_timeout: Duration::from_secs(300),
            wake_timeout: Duration::from_secs(60),
            stop_grace: Duration::from_secs(2),
            terminated_retention: Duration::from_secs(24 * 3600),
            shutdown_timeout: Duration::from_secs(60),
            capacity: CapacitySettings::default(),
            guest_size: GuestSize::Baseline,
            architectures: Architectures::Host,
            max_artifact_bytes: 1 << 30,
            activity: ActivitySettings::default(),
            quotas: Quotas::default(),
            connectors: BTreeMap::new(),
            guests: GuestSettings::default(),
        }
    }
}
