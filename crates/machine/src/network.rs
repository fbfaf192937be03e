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
//! A guest reaches what the host routes, but no address of the host itself, no other slot and no link-local address.

use std::{
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use hearth_guest_protocol::Network;
use nix::sched::{CloneFlags, setns, unshare};
use tokio::{
    io::AsyncWriteExt,
    sync::{Mutex, mpsc},
};

/// Address of every guest's network device.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Address of the slot on the guest's link.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Address of the guest's network device, and of the tap that it sees. Constant, because the guest's neighbour table is in its snapshot.
pub const GUEST_MAC: &str = "02:48:54:48:00:0f";
const GATEWAY_MAC: &str = "02:48:54:48:00:02";
/// Links between host and slots; four addresses each.
const LINKS: Ipv4Addr = Ipv4Addr::new(10, 201, 0, 0);
const LINK_COUNT: u32 = 1 << 14;

/// Slots could not be made.
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
    #[error("all {LINK_COUNT} links to network slots are in use")]
    Exhausted,
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Io { what, source }
}

/// Makes slots ahead of their use.
#[derive(Debug)]
pub struct Slots {
    ready: Mutex<mpsc::Receiver<Result<Slot, NetworkError>>>,
    maker: tokio::task::JoinHandle<()>,
    table: Table,
    nameservers: Vec<Ipv4Addr>,
    mtu: u16,
}

/// One slot. Dropping it removes everything that belongs to it.
#[derive(Debug)]
pub struct Slot {
    tap: OwnedFd,
    /// Keeps the namespace.
    _namespace: OwnedFd,
    /// Number of the host's end, unique on the host while the slot lives.
    pub index: u32,
}

impl Slot {
    /// The tap device, for a machine's monitor.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }
}

impl Slots {
    /// Prepares the host (forwarding, filter, address translation) and begins to make slots. `instance` names the host's nftables table; a
    /// table of that name left by a killed process is replaced. `ahead` slots are kept ready.
    pub async fn start(instance: &str, nameservers: Vec<Ipv4Addr>, ahead: usize) -> Result<Self, NetworkError> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(io_error("enabling IPv4 forwarding"))?;
        let name = format!("hearth-{instance}");
        run(Command::new("nft").args(["-f", "-"]), "nft", &host_rules(&name)).await?;
        let table = Table { name, removed: AtomicBool::new(false) };
        let nameservers = if nameservers.is_empty() { host_nameservers() } else { nameservers };
        let (made, ready) = mpsc::channel(ahead.max(1));
        let maker = tokio::spawn(async move {
            // One is always in the making while the queue is full; `reserve` waits until it may be handed over.
            while let Ok(place) = made.reserve().await {
                place.send(make_slot().await);
            }
        });
        Ok(Self { ready: Mutex::new(ready), maker, table, nameservers, mtu: uplink_mtu() })
    }

    /// Takes a slot.
    pub async fn take(&self) -> Result<Slot, NetworkError> {
        self.ready.lock().await.recv().await.unwrap_or(Err(NetworkError::Exhausted))
    }

    /// What the guest must know of its network.
    pub fn guest_network(&self) -> Network {
        Network { address: GUEST, prefix: 24, gateway: GATEWAY, nameservers: self.nameservers.clone(), mtu: self.mtu }
    }

    /// Ends the making of slots and removes the host's rules. IPv4 forwarding stays on: something else may rely on it by now.
    pub async fn shutdown(&self) {
        self.maker.abort();
        let mut ready = self.ready.lock().await;
        ready.close();
        while ready.recv().await.is_some() {}
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

/// Nothing that comes out of a slot may reach the host itself or another slot; what it sends on leaves with the host's address.
fn host_rules(table: &str) -> String {
    format!(
        r#"table inet {table}
delete table inet {table}
table inet {table} {{
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        iifname "hth*" counter drop
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "hth*" oifname "hth*" counter drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        iifname "hth*" ip saddr {LINKS}/16 masquerade
    }}
}}
"#
    )
}

/// The guest may open connections outwards, with its own address only, and not to link-local addresses, the slot or other slots' links.
fn slot_rules() -> String {
    format!(
        r#"table ip slot {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "tap0" oifname "up0" ip saddr {GUEST} ip daddr != {{ 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, {LINKS}/16 }} accept
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "up0" masquerade
    }}
}}
table ip6 slot {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"#
    )
}

async fn make_slot() -> Result<Slot, NetworkError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let (namespace, tap) = make_namespace().await?;
    for _ in 0..LINK_COUNT {
        let index = NEXT.fetch_add(1, Ordering::Relaxed) % LINK_COUNT;
        match connect(&namespace, index).await {
            Ok(()) => {
                run(inside(&namespace, Command::new("nft").args(["-f", "-"])), "nft", &slot_rules()).await?;
                return Ok(Slot { tap, _namespace: namespace, index });
            }
            // The name of the host's end is the lock on the index: another server on this host has it.
            Err(NetworkError::Program { message, .. }) if message.contains("File exists") => {}
            Err(error) => return Err(error),
        }
    }
    Err(NetworkError::Exhausted)
}

/// Makes a network namespace with a tap device in it. A thread of its own does it, because a thread cannot leave a namespace it unshared
/// without keeping a way back.
async fn make_namespace() -> Result<(OwnedFd, OwnedFd), NetworkError> {
    let (reply, answer) = tokio::sync::oneshot::channel();
    let work = move || {
        let made = (|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from).map_err(io_error("making a network namespace"))?;
            let namespace = File::open("/proc/thread-self/ns/net").map_err(io_error("opening a network namespace"))?;
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(io_error("enabling IPv4 forwarding in a network namespace"))?;
            Ok((OwnedFd::from(namespace), open_tap().map_err(io_error("making a tap device"))?))
        })();
        let _ = reply.send(made);
    };
    thread::Builder::new().name("slot".into()).spawn(work).map_err(io_error("starting a thread"))?;
    answer.await.map_err(|_| NetworkError::Io { what: "making a network namespace", source: io::ErrorKind::BrokenPipe.into() })?
}

fn open_tap() -> io::Result<OwnedFd> {
    nix::ioctl_write_int!(tun_set_iff, b'T', 202);
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).expect("the flags of tun.h fit in 16 bits");
    // SAFETY: TUNSETIFF reads and writes the ifreq that it is given the address of, which outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), (&raw mut request) as nix::libc::c_ulong) }?;
    Ok(tun.into())
}

/// Joins the slot to the host by a veth and configures both ends.
async fn connect(namespace: &OwnedFd, index: u32) -> Result<(), NetworkError> {
    let link = u32::from(LINKS) + index * 4;
    let (host, slot) = (Ipv4Addr::from(link + 1), Ipv4Addr::from(link + 2));
    let pid = std::process::id();
    let inner = format!(
        "link add up0 type veth peer name hth{index} netns {pid}
link set lo up
link set tap0 address {GATEWAY_MAC}
addr add {GATEWAY}/24 dev tap0
link set tap0 up
addr add {slot}/30 dev up0
link set up0 up
route add default via {host}
"
    );
    run(inside(namespace, Command::new("ip").args(["-batch", "-"])), "ip", &inner).await?;
    let outer = format!("addr add {host}/30 dev hth{index}\nlink set hth{index} up\n");
    run(Command::new("ip").args(["-batch", "-"]), "ip", &outer).await
}

/// Makes a command run inside a network namespace.
fn inside<'a>(namespace: &OwnedFd, command: &'a mut Command) -> &'a mut Command {
    let namespace = namespace.as_raw_fd();
    // SAFETY: setns is async-signal-safe, and the descriptor is open: the caller holds it until the command has ended.
    unsafe {
        command.pre_exec(move || {
            let namespace = std::os::fd::BorrowedFd::borrow_raw(namespace);
            Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
        })
    }
}

/// Runs a program that reads its orders from standard input.
async fn run(command: &mut Command, program: &'static str, input: &str) -> Result<(), NetworkError> {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(std::mem::replace(command, Command::new(program)));
    let mut child = command.kill_on_drop(true).spawn().map_err(io_error("starting a network tool (ip, nft)"))?;
    let mut stdin = child.stdin.take().expect("standard input was requested as a pipe");
    // A program that ends early closes its input; what it has to say is on its standard error.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(io_error("waiting for a network tool"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetworkError::Program { program, message })
}

/// The host's resolvers, as far as a guest can reach them: not those on the host's loopback.
fn host_nameservers() -> Vec<Ipv4Addr> {
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|text| parse_nameservers(&text))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

fn parse_nameservers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback())
        .collect()
}

/// MTU of the device of the default route: a guest that believes in more would lose its large packets there.
fn uplink_mtu() -> u16 {
    let device = fs::read_to_string("/proc/net/route").ok().and_then(|table| default_device(&table).map(str::to_owned));
    device
        .and_then(|name| fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok())
        .and_then(|text| text.trim().parse::<u16>().ok())
        .map_or(1500, |mtu| mtu.min(1500))
}

fn default_device(route_table: &str) -> Option<&str> {
    route_table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let (device, destination) = (fields.next()?, fields.next()?);
        (destination == "00000000").then_some(device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_on_loopback_are_left_out() {
        let text = "# comment\nsearch lan\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1\n";
        assert_eq!(parse_nameservers(text), [Ipv4Addr::new(192, 0, 2, 1)]);
    }

    #[test]
    fn the_default_route_names_the_uplink() {
        let table = "Iface\tDestination\tGateway\nlan0\t000200C0\t00000000\neth0\t00000000\t010200C0\n";
        assert_eq!(default_device(table), Some("eth0"));
        assert_eq!(default_device("Iface\tDestination\n"), None);
    }

    #[tokio::test]
    async fn a_slot_appears_and_vanishes() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: making a network slot needs root and /dev/net/tun");
            return;
        }
        let slots = Slots::start(&format!("unit-{}", std::process::id()), Vec::new(), 1).await.unwrap();
        let slot = slots.take().await.unwrap();
        let device = format!("/sys/class/net/hth{}", slot.index);
        assert!(fs::exists(&device).unwrap(), "{device} must exist while the slot lives");
        slots.shutdown().await;
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
        assert!(!tables.contains(&format!("hearth-unit-{}", std::process::id())), "{tables}");
        drop(slot);
        // The kernel removes a namespace's devices some time after its last descriptor is closed.
        let gone = async {
            while fs::exists(&device).unwrap() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), gone).await.expect("the slot's devices are removed with it");
    }
}
