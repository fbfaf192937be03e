//! One slot: how it is made, and how a policy is put in force in it.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use hearth_guest_protocol::Network;
use nix::sched::{CloneFlags, unshare};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::{
    Egress, EgressPolicy, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, Links, NetworkError,
    doors::Doors,
    host::Nameservers,
    io_error, relay,
    resolver::{self, Resolver, upstream::Upstream},
    rules,
    tools::{in_namespace, inside, nft, on_thread, run},
};

const DNS: u16 = 53;

/// What all slots of a host have in common.
#[derive(Debug)]
pub struct Surroundings {
    pub links: Links,
    pub nameservers: Nameservers,
    pub mtu: u16,
}

/// One slot. Dropping it removes everything that belongs to it.
#[derive(Debug)]
pub struct Slot {
    tap: OwnedFd,
    /// Keeps the namespace.
    namespace: Arc<OwnedFd>,
    /// Where the removal of the slot goes on after its drop.
    removals: TaskTracker,
    around: Arc<Surroundings>,
    nameservers: Vec<Ipv4Addr>,
    shared: Vec<AbortOnDropHandle<()>>,
    /// A process has been connected in the place of a machine.
    plugged: bool,
    _resolver: Option<AbortOnDropHandle<()>>,
    /// Number of the host's end, unique on the host while the slot lives.
    pub index: u32,
}

impl Slot {
    /// Makes a slot. It lets out whatever the host routes until it is restricted.
    pub(super) async fn make(around: &Arc<Surroundings>, removals: &TaskTracker) -> Result<Self, NetworkError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let links = around.links;
        let (namespace, tap) = make_namespace().await?;
        for _ in 0..links.count() {
            let index = NEXT.fetch_add(1, Ordering::Relaxed) % links.count();
            match connect(&namespace, links, index).await {
                Ok(()) => {
                    let slot = Self {
                        tap,
                        namespace: Arc::new(namespace),
                        removals: removals.clone(),
                        around: Arc::clone(around),
                        nameservers: around.nameservers.for_guests.clone(),
                        shared: Vec::new(),
                        plugged: false,
                        _resolver: None,
                        index,
                    };
                    nft(&slot.namespace, &rules::slot(links.network())).await?;
                    return Ok(slot);
                }
                // The name of the host's end is the lock on the index: another server on this host has it.
                Err(NetworkError::Program { message, .. }) if message.contains("File exists") => {}
                Err(error) => return Err(error),
            }
        }
        Err(NetworkError::Exhausted(links))
    }

    /// Puts a policy in force, once. Connections that are open stay open.
    pub async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError> {
        match egress {
            Egress::Internet => {}
            Egress::None => {
                self.nameservers.clear();
                nft(&self.namespace, rules::nothing()).await?;
            }
            Egress::Policy(policy) if policy.answers_names() => {
                let rules = rules::policy(policy) + &rules::resolver(&self.nameservers);
                self.nameservers = vec![GATEWAY];
                nft(&self.namespace, &rules).await?;
                self.start_resolver(policy).await?;
            }
            Egress::Policy(policy) => nft(&self.namespace, &rules::policy(policy)).await?,
        }
        Ok(())
    }

    /// Lets the guest reach an address of the host's loopback at its gateway, on the same port.
    pub async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError> {
        let listener = relay::listen(&self.namespace, (GATEWAY, address.port()).into()).await?;
        nft(&self.namespace, &rules::shared(address.port())).await?;
        self.shared.push(relay::start(listener, address));
        Ok(())
    }

    /// Connects the network namespace of a process in the place of a machine: its `eth0` is what a guest's is. What was connected before is not any
    /// more.
    pub(super) async fn plug(&mut self, pid: u32) -> Result<OwnedFd, NetworkError> {
        let path = format!("/proc/{pid}/ns/net");
        let plugged = OwnedFd::from(File::open(path).map_err(io_error("opening a build's network namespace"))?);
        // The rules know the guest's side by the name of the tap.
        if self.plugged {
            // It may have gone with the namespace of its other end, or be about to.
            let _ = run(inside(&self.namespace, Command::new("ip").args(["link", "delete", "tap0"])), "ip", "").await;
        } else {
            let aside = "addr flush dev tap0\nlink set tap0 down\nlink set tap0 name spare0\n";
            run(inside(&self.namespace, Command::new("ip").args(["-batch", "-"])), "ip", aside).await?;
            self.plugged = true;
        }
        let slot = format!(
            "link add tap0 address {GATEWAY_MAC} type veth peer name eth0 address {GUEST_MAC} netns {pid}
addr add {GATEWAY}/24 dev tap0
link set tap0 up
"
        );
        run(inside(&self.namespace, Command::new("ip").args(["-batch", "-"])), "ip", &slot).await?;
        let mtu = self.around.mtu;
        let guest = format!("link set lo up\naddr add {GUEST}/24 dev eth0\nlink set eth0 mtu {mtu} up\nroute add default via {GATEWAY}\n");
        run(inside(&plugged, Command::new("ip").args(["-batch", "-"])), "ip", &guest).await?;
        Ok(plugged)
    }

    async fn start_resolver(&mut self, policy: &EgressPolicy) -> Result<(), NetworkError> {
        let what = "opening the slot's resolver";
        let bind = || {
            let sockets = (UdpSocket::bind((GATEWAY, DNS))?, TcpListener::bind((GATEWAY, DNS))?);
            sockets.0.set_nonblocking(true)?;
            sockets.1.set_nonblocking(true)?;
            Ok(sockets)
        };
        let (udp, tcp) = in_namespace(&self.namespace, what, bind).await?;
        let udp = tokio::net::UdpSocket::from_std(udp).map_err(io_error(what))?;
        let tcp = tokio::net::TcpListener::from_std(tcp).map_err(io_error(what))?;
        let doors = Doors::new(self.namespace.clone(), policy.doors().len());
        let servers = self.around.nameservers.for_host.iter().map(|server| (*server, DNS).into()).collect();
        let resolver = Resolver { policy: policy.clone(), doors, upstream: Upstream::new(servers) };
        self._resolver = Some(AbortOnDropHandle::new(tokio::spawn(resolver::serve(udp, tcp, resolver))));
        Ok(())
    }

    /// The slot's network namespace.
    #[cfg(test)]
    pub(super) fn namespace(&self) -> &Arc<OwnedFd> {
        &self.namespace
    }

    /// The tap device, for a machine's monitor.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }

    /// Bytes that went out of the slot since it was made.
    pub fn sent_bytes(&self) -> io::Result<u64> {
        // What the slot sends, the host's end of the veth receives.
        let text = fs::read_to_string(format!("/sys/class/net/hth{}/statistics/rx_bytes", self.index))?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// What the guest must know of its network.
    pub fn network(&self) -> Network {
        Network { address: GUEST, prefix: 24, gateway: GATEWAY, nameservers: self.nameservers.clone(), mtu: self.around.mtu }
    }
}

/// The kernel removes the devices with their namespace, but only some time after its last descriptor is closed: whoever waits for the removals
/// finds the host as it was.
impl Drop for Slot {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let namespace = self.namespace.clone();
        let remove = async move {
            let removed = run(inside(&namespace, Command::new("ip").args(["link", "del", "up0"])), "ip", "").await;
            if let Err(error) = removed {
                tracing::warn!(%error, "a network slot's link is left to the kernel");
            }
        };
        self.removals.spawn_on(remove, &runtime);
    }
}

/// Makes a network namespace with a tap device in it.
async fn make_namespace() -> Result<(OwnedFd, OwnedFd), NetworkError> {
    on_thread("making a network namespace", || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from).map_err(io_error("making a network namespace"))?;
        let namespace = File::open("/proc/thread-self/ns/net").map_err(io_error("opening a network namespace"))?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(io_error("enabling IPv4 forwarding in a network namespace"))?;
        Ok((OwnedFd::from(namespace), open_tap().map_err(io_error("making a tap device"))?))
    })
    .await
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
async fn connect(namespace: &OwnedFd, links: Links, index: u32) -> Result<(), NetworkError> {
    let (host, slot) = links.ends(index);
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
