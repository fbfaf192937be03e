//! Address and default route of the one network device, through the classic socket ioctls (netdevice(7)). Applying the same network twice
//! changes nothing.

use std::{
    mem,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use hearth_guest_protocol::Network;
use nix::{
    errno::Errno,
    libc::{self, c_int, c_ulong},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

const DEVICE: &str = "eth0";
const LOOPBACK: &str = "lo";
/// More default routes than anybody adds; bounds a loop.
const MOST_DEFAULT_ROUTES: usize = 16;

/// The network could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{doing} of {device}: {error}")]
pub struct NetworkError {
    doing: &'static str,
    device: &'static str,
    error: Errno,
}

/// Brings `lo` up: the proxy reaches the application through it.
pub fn bring_up_loopback() -> Result<(), NetworkError> {
    Device::open(LOOPBACK)?.bring_up()
}

/// Gives a device of this namespace an address, and brings it up.
pub fn set_up(name: &'static str, own: Ipv4Addr, prefix: u8) -> Result<(), NetworkError> {
    let device = Device::open(name)?;
    device.set("setting the address", libc::SIOCSIFADDR, address(own))?;
    device.set("setting the netmask", libc::SIOCSIFNETMASK, address(netmask(prefix)))?;
    device.bring_up()
}

/// Gives the machine's network device its address, and the machine its default route.
pub fn apply(network: &Network) -> Result<(), NetworkError> {
    let device = Device::open(DEVICE)?;
    device.set("setting the MTU", libc::SIOCSIFMTU, libc::__c_anonymous_ifr_ifru { ifru_mtu: c_int::from(network.mtu) })?;
    device.set("setting the address", libc::SIOCSIFADDR, address(network.address))?;
    device.set("setting the netmask", libc::SIOCSIFNETMASK, address(netmask(network.prefix)))?;
    device.bring_up()?;
    device.forget_neighbour(network.gateway)?;
    device.replace_default_route(network.gateway)
}

struct Device {
    name: &'static str,
    socket: OwnedFd,
}

impl Device {
    fn open(name: &'static str) -> Result<Self, NetworkError> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(|error| NetworkError {
            doing: "opening a socket for the settings",
            device: name,
            error,
        })?;
        Ok(Self { name, socket })
    }

    fn bring_up(&self) -> Result<(), NetworkError> {
        let flags = libc::IFF_UP | libc::IFF_RUNNING;
        let flags = libc::c_short::try_from(flags).expect("the flags of ifreq are 16 bits");
        self.set("bringing up the link", libc::SIOCSIFFLAGS, libc::__c_anonymous_ifr_ifru { ifru_flags: flags })
    }

    fn set(&self, doing: &'static str, request: c_ulong, value: libc::__c_anonymous_ifr_ifru) -> Result<(), NetworkError> {
        let argument = libc::ifreq { ifr_name: interface_name(self.name), ifr_ifru: value };
        // SAFETY: the SIOCSIF* requests read one `ifreq`.
        unsafe { self.ioctl(request, &argument) }.map_err(|error| self.failed(doing, error))
    }

    /// The gateway of another life may have had another hardware address.
    fn forget_neighbour(&self, gateway: Ipv4Addr) -> Result<(), NetworkError> {
        // SAFETY: all-zero bytes are a valid `arpreq`.
        let mut entry: libc::arpreq = unsafe { mem::zeroed() };
        entry.arp_pa = socket_address(gateway);
        entry.arp_dev = interface_name(self.name);
        // SAFETY: SIOCDARP reads one `arpreq`.
        match unsafe { self.ioctl(libc::SIOCDARP, &entry) } {
            // There was none, or it was never answered.
            Ok(()) | Err(Errno::ENXIO | Errno::ENOENT) => Ok(()),
            Err(error) => Err(self.failed("forgetting the old gateway", error)),
        }
    }

    fn replace_default_route(&self, gateway: Ipv4Addr) -> Result<(), NetworkError> {
        for _ in 0..MOST_DEFAULT_ROUTES {
            // SAFETY: SIOCDELRT reads one `rtentry`, whose `rt_dev` may be null.
            match unsafe { self.ioctl(libc::SIOCDELRT, &default_route(None)) } {
                Ok(()) => {}
                Err(Errno::ESRCH) => break,
                Err(error) => return Err(self.failed("removing the old default route", error)),
            }
        }
        // SAFETY: SIOCADDRT reads one `rtentry`, whose `rt_dev` may be null.
        unsafe { self.ioctl(libc::SIOCADDRT, &default_route(Some(gateway))) }
            .map_err(|error| self.failed("adding the default route", error))
    }

    /// # Safety
    /// `request` must only read, and no more than a `T` with what it points to.
    unsafe fn ioctl<T>(&self, request: c_ulong, argument: &T) -> Result<(), Errno> {
        // SAFETY: the descriptor is a socket of ours, and the caller vouches for the rest.
        Errno::result(unsafe { libc::ioctl(self.socket.as_raw_fd(), request, argument) }).map(drop)
    }

    fn failed(&self, doing: &'static str, error: Errno) -> NetworkError {
        NetworkError { doing, device: self.name, error }
    }
}

fn default_route(gateway: Option<Ipv4Addr>) -> libc::rtentry {
    // SAFETY: all-zero bytes are a valid `rtentry`: its one pointer may be null.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_flags = libc::RTF_UP;
    if let Some(gateway) = gateway {
        route.rt_gateway = socket_address(gateway);
        route.rt_flags |= libc::RTF_GATEWAY;
    }
    route
}

fn address(address: Ipv4Addr) -> libc::__c_anonymous_ifr_ifru {
    libc::__c_anonymous_ifr_ifru { ifru_addr: socket_address(address) }
}

/// An IPv4 address in the layout of `sockaddr_in`: two bytes of port, then the address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (byte, octet) in data[2..6].iter_mut().zip(address.octets()) {
        *byte = octet.cast_signed();
    }
    libc::sockaddr { sa_family: libc::sa_family_t::try_from(libc::AF_INET).expect("AF_INET is 2"), sa_data: data }
}

fn interface_name(name: &str) -> [libc::c_char; libc::IFNAMSIZ] {
    let mut field = [0; libc::IFNAMSIZ];
    // The last byte stays zero.
    for (byte, character) in field[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *byte = character.cast_signed();
    }
    field
}

/// Prefix lengths over 32 mean a single address.
fn netmask(prefix: u8) -> Ipv4Addr {
    let host_bits = 32_u32.saturating_sub(prefix.into());
    Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_follow_prefixes() {
        assert_eq!(netmask(30), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(netmask(0), Ipv4Addr::UNSPECIFIED);
        assert_eq!(netmask(32), Ipv4Addr::BROADCAST);
        assert_eq!(netmask(200), Ipv4Addr::BROADCAST);
    }

    #[test]
    fn addresses_have_the_layout_of_sockaddr_in() {
        let address = socket_address(Ipv4Addr::new(169, 254, 0, 2));
        assert_eq!(address.sa_family, 2);
        assert_eq!(address.sa_data[..6], [0, 0, -87, -2, 0, 2]);
    }
}
