//! Network slots: what connects one machine to the world and to nothing else.
//!
//! ```text
//! guest eth0 10.0.2.15 ── tap0 10.0.2.2 ┊ up0 10.201.x.y+1 ══ hth<n> 10.201.x.y ┊ host ── masquerade ── world
//!                         the slot's network namespace                          the host's namespace
//! ```
//!
//! Every guest has the same address, so clones need no renumbering. The slot's namespace has no name: it lives by its descriptor, and with
//! it go the tap and both ends of the veth, also when the daemon is killed. Slots are made ahead; one serves one life of one machine, because
//! the connections that a namespace tracks are its tenant's.
//!
//! A guest reaches what the host routes, but no address of the host itself, no other slot and no link-local address. A policy ([`Egress`])
//! narrows that further. It is put in force when a slot is taken, as one nftables transaction inside the slot; names in it are served by a
//! resolver of the slot's own.
//!
//! ```text
//! egress   policies and their text         slot      namespace, tap, link
//! rules    nftables                        resolver  the names of a policy
//! links    addresses between host and slots doors    addresses that names opened
//! outlet   a slot without a machine        relay     addresses of the host that are shared
//! host     what the host's network is like tools     ip and nft
//! ```

mod doors;
mod egress;
mod host;
mod links;
mod outlet;
mod relay;
mod resolver;
mod rules;
mod slot;
mod tools;

use std::{
    fs, io,
    net::Ipv4Addr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc},
    time::timeout,
};
use tokio_util::task::TaskTracker;

pub use self::{
    egress::{Egress, EgressError, EgressPolicy, EgressRule, MAX_RULES, PortRange, Protocol, Target},
    links::{Links, LinksError},
    outlet::SlotOutlet,
    slot::Slot,
};
use self::{host::Nameservers, slot::Surroundings, tools::run};

/// Address of every guest's network device.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Address of the slot on the guest's link.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Address of the guest's network device, and of the tap that it sees. Constant, because the guest's neighbour table is in its snapshot.
pub const GUEST_MAC: &str = "02:48:54:48:00:0f";
const GATEWAY_MAC: &str = "02:48:54:48:00:02";
/// How long the removal of slots may take. Each takes milliseconds; a busy host makes it take longer.
const REMOVAL: Duration = Duration::from_secs(10);

/// Slots could not be made, or not be given their policy.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// a step failed
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// a program refused its input
    #[error("`{program}` failed: {message}")]
    Program {
        /// Name of the program.
        program: &'static str,
        /// What it wrote to its standard error.
        message: String,
    },
    /// all links are in use
    #[error("all links to network slots in {0} are in use")]
    Exhausted(Links),
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Io { what, source }
}

/// Makes slots ahead of their use.
#[derive(Debug)]
pub struct Slots {
    ready: Mutex<mpsc::Receiver<Result<Slot, NetworkError>>>,
    removals: TaskTracker,
    table: Table,
    surroundings: Arc<Surroundings>,
}

impl Slots {
    /// Prepares the host (forwarding, filter, address translation) and begins to make slots. `instance` names the host's nftables table; a
    /// table of that name left by a killed process is replaced. Slots get their addresses from `links`. `ahead` slots are kept ready.
    pub async fn start(instance: &str, links: Links, nameservers: Vec<Ipv4Addr>, ahead: usize) -> Result<Self, NetworkError> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(io_error("enabling IPv4 forwarding"))?;
        let name = format!("hearth-{instance}");
        run(Command::new("nft").args(["-f", "-"]), "nft", &rules::host(&name, links.network())).await?;
        let table = Table { name, removed: AtomicBool::new(false) };
        let nameservers = if nameservers.is_empty() { Nameservers::of_host() } else { Nameservers::fixed(nameservers) };
        let surroundings = Arc::new(Surroundings { links, nameservers, mtu: host::uplink_mtu() });
        let (made, ready) = mpsc::channel(ahead.max(1));
        let removals = TaskTracker::new();
        let (around, tracker) = (Arc::clone(&surroundings), removals.clone());
        tokio::spawn(async move {
            // Ends when the queue is closed. A slot that is in the making then still finds its place.
            while let Ok(place) = made.reserve().await {
                place.send(Slot::make(&around, &tracker).await);
            }
        });
        Ok(Self { ready: Mutex::new(ready), removals, table, surroundings })
    }

    /// Takes a slot that lets out what `egress` says, and nothing else from its first packet on.
    pub async fn take(&self, egress: &Egress) -> Result<Slot, NetworkError> {
        let mut slot = self.next().await?;
        slot.restrict(egress).await?;
        Ok(slot)
    }

    /// Takes a slot for what is no machine. It lets out what the host routes, until it is restricted.
    pub async fn outlet(&self) -> Result<SlotOutlet, NetworkError> {
        Ok(SlotOutlet::new(self.next().await?))
    }

    async fn next(&self) -> Result<Slot, NetworkError> {
        let exhausted = || Err(NetworkError::Exhausted(self.surroundings.links));
        self.ready.lock().await.recv().await.unwrap_or_else(exhausted)
    }

    /// Ends the making of slots, waits until those that were dropped are gone, and removes the host's rules. IPv4 forwarding stays on:
    /// something else may rely on it by now.
    pub async fn shutdown(&self) {
        let mut ready = self.ready.lock().await;
        ready.close();
        while ready.recv().await.is_some() {}
        self.removals.close();
        if timeout(REMOVAL, self.removals.wait()).await.is_err() {
            tracing::warn!("network slots were not removed within {} s and are left to the kernel", REMOVAL.as_secs());
        }
        if !self.table.removed.swap(true, Ordering::AcqRel) {
            let removed = run(&mut self.table.removal(), "nft", "").await;
            self.table.report(removed);
        }
    }
}

/// The host's nftables table.
#[derive(Debug)]
struct Table {
    name: String,
    removed: AtomicBool,
}

impl Table {
    fn removal(&self) -> Command {
        let mut command = Command::new("nft");
        command.args(["delete", "table", "inet", &self.name]);
        command
    }

    fn report(&self, removed: Result<(), impl std::fmt::Display>) {
        if let Err(error) = removed {
            tracing::warn!(%error, table = self.name, "the nftables table was not removed");
        }
    }
}

/// Where nobody called [`Slots::shutdown`], as when a failure unwinds.
impl Drop for Table {
    fn drop(&mut self) {
        if !*self.removed.get_mut() {
            self.report(self.removal().stdin(Stdio::null()).status().map(drop));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slot_appears_and_vanishes() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: making a network slot needs root and /dev/net/tun");
            return;
        }
        let slots = Slots::start(&format!("unit-{}", std::process::id()), Links::default(), Vec::new(), 1).await.unwrap();
        let slot = slots.take(&Egress::Internet).await.unwrap();
        let device = format!("/sys/class/net/hth{}", slot.index);
        assert!(fs::exists(&device).unwrap(), "{device} must exist while the slot lives");
        drop(slot);
        slots.shutdown().await;
        assert!(!fs::exists(&device).unwrap(), "{device} must be gone when the shutdown has returned");
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
        assert!(!tables.contains(&format!("hearth-unit-{}", std::process::id())), "{tables}");
    }
}
