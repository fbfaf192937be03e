//! A network namespace for the service, joined to the app's by a veth, and the service's listeners in it.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, RawFd},
    thread,
};

use hearth_guest_protocol::{API_PORT, METADATA_ADDRESS};
use nix::{
    errno::Errno,
    libc,
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket},
};

use crate::{connections::acknowledgement, network};

/// The service's ports.
#[derive(Debug)]
pub struct Listeners {
    pub http: TcpListener,
    pub api: TcpListener,
}

/// The app's end of the link, and the service's.
const NEAR: &str = "hearth";
const FAR: &str = "service";
/// The app's address on the link.
const NEAR_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
/// Just these two addresses.
const PREFIX: u8 = 30;
const HTTP_PORT: u16 = 80;

/// From `linux/if_link.h` and `linux/veth.h`.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
/// Size of `ifinfomsg`. All zero: any device, and nothing to be changed about it.
const DEVICE: [u8; 16] = [0; 16];

/// Makes the namespace, the link and the listeners. The listeners keep the namespace alive.
pub fn listen() -> io::Result<Listeners> {
    let home = File::open("/proc/self/ns/net")?;
    // A thread leaves its namespace alone.
    let made = thread::spawn(move || far_end(&home)).join();
    let listeners = made.map_err(|_| io::Error::other("making a network namespace panicked"))??;
    without_ipv6(NEAR);
    network::set_up(NEAR, NEAR_ADDRESS, PREFIX).map_err(io::Error::other)?;
    Ok(listeners)
}

fn far_end(home: &File) -> io::Result<Listeners> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    make_veth(home.as_raw_fd())?;
    without_ipv6(FAR);
    network::set_up(FAR, METADATA_ADDRESS, PREFIX).map_err(io::Error::other)?;
    let listen = |port| {
        let listener = TcpListener::bind(SocketAddr::from((METADATA_ADDRESS, port)))?;
        listener.set_nonblocking(true)?;
        Ok::<_, io::Error>(listener)
    };
    Ok(Listeners { http: listen(HTTP_PORT)?, api: listen(API_PORT)? })
}

/// Link-local addresses of IPv6 would only be noise to apps that look at their interfaces. There may be no IPv6 at all.
fn without_ipv6(device: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1");
}

/// Makes a pair of devices, one here and one in the namespace `home` (rtnetlink(7)).
fn make_veth(home: RawFd) -> Result<(), Errno> {
    let peer = [DEVICE.to_vec(), attribute(IFLA_IFNAME, &name(NEAR)), attribute(IFLA_NET_NS_FD, &home.to_ne_bytes())].concat();
    let info = [attribute(IFLA_INFO_KIND, b"veth"), attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer))].concat();
    let body = [DEVICE.to_vec(), attribute(IFLA_IFNAME, &name(FAR)), attribute(IFLA_LINKINFO, &info)].concat();

    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let flags = u16::try_from(flags).expect("netlink flags are 16 bits");
    let length = u32::try_from(16 + body.len()).expect("some hundred bytes");
    // nlmsghdr: length, type, flags, sequence number, port.
    let header = [&length.to_ne_bytes()[..], &libc::RTM_NEWLINK.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(socket.as_raw_fd(), &[header, body].concat(), MsgFlags::empty())?;
    acknowledgement(&socket)
}

fn name(device: &str) -> Vec<u8> {
    [device.as_bytes(), &[0]].concat()
}

/// One `rtattr`, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("attributes are short");
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_their_length_without_that() {
        assert_eq!(attribute(3, b"lo\0"), [&7_u16.to_ne_bytes()[..], &3_u16.to_ne_bytes(), b"lo\0\0"].concat());
        assert_eq!(attribute(1, &[]).len(), 4);
    }

    /// Both ends are made in namespaces that only this test's threads see.
    #[test]
    fn the_service_is_reached_over_the_link_and_leaves_the_app_its_ports() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return;
        }
        thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let home = File::open("/proc/thread-self/ns/net").unwrap();
            let listeners = thread::spawn(move || far_end(&home)).join().unwrap();
            let listeners = match listeners {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    eprintln!("skipped: the kernel has no veth");
                    return;
                }
                listeners => listeners.unwrap(),
            };
            network::set_up(NEAR, NEAR_ADDRESS, PREFIX).unwrap();
            let _all = TcpListener::bind((Ipv4Addr::UNSPECIFIED, HTTP_PORT)).expect("port 80 of every address is the app's");
            for port in [HTTP_PORT, API_PORT] {
                std::net::TcpStream::connect((METADATA_ADDRESS, port)).unwrap();
            }
            drop(listeners);
        })
        .join()
        .unwrap();
    }
}
