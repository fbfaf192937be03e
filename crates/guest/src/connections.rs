//! Ends TCP connections that lead out of the machine: after a clone or a resume their other ends are talking to somebody else, or have
//! given up. An application sees an error at once instead of waiting for a timeout. Listeners and loopback connections stay.
//!
//! Through the kernel's socket diagnosis (sock_diag(7)): a dump of all sockets, then `SOCK_DESTROY` for those chosen.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use hearth_guest_protocol::METADATA_ADDRESS;
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt::ReceiveTimeout},
        time::TimeVal,
    },
};

/// Sizes in bytes of `nlmsghdr`, of `inet_diag_req_v2`, and of `inet_diag_sockid` within it and within `inet_diag_msg`.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const SOCKET_ID: usize = 48;
/// Where the id begins in a request, and in an answer.
const ID_IN_REQUEST: usize = 8;
const ID_IN_ANSWER: usize = 4;
/// Where our own address begins in an id, after two ports, and the peer's after that.
const OWN_IN_ID: usize = 4;
const PEER_IN_ID: usize = 20;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Every state but `TCP_LISTEN` (10) and `TCP_CLOSE` (7), as bits.
const CONNECTED: u32 = 0xfff & !(1 << 10) & !(1 << 7) & !1;
/// The kernel answers at once; this only bounds a surprise.
const ANSWER_SECONDS: i64 = 5;

/// Identity of a socket, as the kernel wrote it.
type SocketId = [u8; SOCKET_ID];

/// The connections could not be ended.
#[derive(Debug, thiserror::Error)]
#[error("ending the connections of an earlier life: {0}")]
pub struct ConnectionsError(#[from] Errno);

/// Ends every TCP connection whose peer is not this machine.
pub fn end_outbound() -> Result<(), ConnectionsError> {
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0))?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).expect("address families are small");
        let dump = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).expect("netlink flags are 16 bits");
        send(socket.as_raw_fd(), &request(SOCK_DIAG_BY_FAMILY, dump, family, CONNECTED, &[0; SOCKET_ID]), MsgFlags::empty())?;
        for id in collect(&socket, family)? {
            let acknowledged = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).expect("netlink flags are 16 bits");
            send(socket.as_raw_fd(), &request(SOCK_DESTROY, acknowledged, family, CONNECTED, &id), MsgFlags::empty())?;
            match acknowledgement(&socket) {
                // It ended by itself in the meantime, or is a remainder that no process holds (TIME_WAIT).
                Ok(()) | Err(Errno::ENOENT | Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn request(kind: u16, flags: u16, family: u8, states: u32, id: &SocketId) -> Vec<u8> {
    let length = u32::try_from(HEADER + REQUEST).expect("72 bytes");
    let protocol = u8::try_from(libc::IPPROTO_TCP).expect("IPPROTO_TCP is 6");
    let mut message = Vec::with_capacity(HEADER + REQUEST);
    // nlmsghdr: length, type, flags, sequence number, port.
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    // inet_diag_req_v2: family, protocol, extensions, padding, states, id.
    message.extend_from_slice(&[family, protocol, 0, 0]);
    message.extend_from_slice(&states.to_ne_bytes());
    message.extend_from_slice(id);
    debug_assert_eq!(message.len(), HEADER + ID_IN_REQUEST + SOCKET_ID);
    message
}

/// Ids of the outbound connections in the answer to a dump.
fn collect(socket: &OwnedFd, family: u8) -> Result<Vec<SocketId>, Errno> {
    let mut found = Vec::new();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for (kind, body) in messages(&buffer[..count]) {
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => outcome(body)?,
                _ => found.extend(outbound(family, body)),
            }
        }
    }
}

/// The kernel's answer to a netlink request that asked for one.
pub fn acknowledgement(socket: &OwnedFd) -> Result<(), Errno> {
    let mut buffer = [0; 1024];
    let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    messages(&buffer[..count]).next().map_or(Err(Errno::EBADMSG), |(_, body)| outcome(body))
}

/// The messages of one read from a netlink socket: type and body. Ends at whatever does not fit.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// What an `NLMSG_ERROR` says: a negative error number, or zero for success.
fn outcome(body: &[u8]) -> Result<(), Errno> {
    let code = body.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    match code.ok_or(Errno::EBADMSG)? {
        0 => Ok(()),
        code => Err(Errno::from_raw(code.saturating_neg())),
    }
}

/// The id of an `inet_diag_msg`, if its peer is another machine.
fn outbound(family: u8, body: &[u8]) -> Option<SocketId> {
    let id: SocketId = body.get(ID_IN_ANSWER..ID_IN_ANSWER + SOCKET_ID)?.try_into().ok()?;
    let address = |start: usize| {
        let bytes: [u8; 16] = id[start..start + 16].try_into().expect("the range has 16 bytes");
        if i32::from(family) == libc::AF_INET {
            IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
        } else {
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
    };
    let (own, peer) = (address(OWN_IN_ID), address(PEER_IN_ID));
    // Whoever dials an address of this machine does so from the same address.
    let inside = peer.is_loopback() || peer == METADATA_ADDRESS || peer == own;
    (!inside).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::{SocketAddr, TcpListener, TcpStream},
    };

    use nix::{
        sched::{CloneFlags, unshare},
        sys::socket::{SockaddrStorage, bind, connect},
    };

    use super::*;

    fn answer(peer: &[u8]) -> Vec<u8> {
        let mut body = vec![0; 72];
        body[ID_IN_ANSWER + PEER_IN_ID..][..peer.len()].copy_from_slice(peer);
        body
    }

    #[test]
    fn only_peers_elsewhere_are_chosen() {
        let (four, six) = (2, 10);
        assert!(outbound(four, &answer(&[10, 0, 2, 2])).is_some());
        assert!(outbound(four, &answer(&[127, 0, 0, 1])).is_none());
        assert!(outbound(six, &answer(&Ipv6Addr::LOCALHOST.octets())).is_none());
        assert!(outbound(four, &answer(&[169, 254, 169, 254])).is_none(), "the machine's own service");
        assert!(outbound(six, &answer(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets())).is_none());
        assert!(outbound(six, &answer(&[0xfd, 0, 0, 1])).is_some());
        assert!(outbound(four, &[0; 20]).is_none(), "a short answer is not read past its end");
    }

    #[test]
    fn a_peer_at_our_own_address_is_this_machine() {
        let mut body = answer(&[10, 0, 2, 1]);
        body[ID_IN_ANSWER + OWN_IN_ID..][..4].copy_from_slice(&[10, 0, 2, 1]);
        assert!(outbound(2, &body).is_none());
    }

    /// Both ends of a connection that was made from one address to another.
    fn connection(from: IpAddr, to: IpAddr) -> (TcpStream, TcpStream) {
        let (domain, listener) = match to {
            IpAddr::V4(_) => (AddressFamily::Inet, TcpListener::bind((to, 0)).unwrap()),
            IpAddr::V6(_) => (AddressFamily::Inet6, TcpListener::bind((to, 0)).unwrap()),
        };
        let near = socket(domain, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(near.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from((from, 0)))).unwrap();
        connect(near.as_raw_fd(), &SockaddrStorage::from(listener.local_addr().unwrap())).unwrap();
        (near.into(), listener.accept().unwrap().0)
    }

    fn ip(arguments: &str) {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    /// Needs root, for a network of its own.
    #[test]
    fn outbound_connections_end_and_those_within_the_machine_stay() {
        // The namespace is this thread's, and goes with it.
        let thread = std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: making a network namespace: {error}");
                return;
            }
            ip("link set lo up");
            // To the kernel's socket tables, two addresses of one machine look like two machines.
            let [here, there] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
            let [here6, there6] = ["2001:db8::1", "2001:db8::2"].map(|text| text.parse().unwrap());
            for address in [here, there, here6, there6] {
                let length = if IpAddr::is_ipv4(&address) { "32" } else { "128 nodad" };
                ip(&format!("addr add {address}/{length} dev lo"));
            }
            let loopbacks = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            // One that the application closed first leaves a remainder in TIME_WAIT, which cannot be ended and must not end the work.
            let (first, second) = connection(here, there);
            drop(first);
            drop(second);
            let stay = [(loopbacks[0], loopbacks[0]), (loopbacks[1], loopbacks[1]), (here, here), (here6, here6)];
            let stay = stay.map(|(from, to)| (to, connection(from, to)));
            let end = [(here, there), (here6, there6)].map(|(from, to)| (to, connection(from, to)));

            end_outbound().unwrap();

            for (to, (mut near, mut far)) in stay {
                near.write_all(b"x").unwrap();
                assert_eq!(far.read(&mut [0; 8]).unwrap(), 1, "the connection to {to} lives on");
            }
            for (to, (mut near, _far)) in end {
                near.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
                let error = near.read(&mut [0; 8]).unwrap_err();
                // Aborted if this end was found first, reset if the other was.
                assert!(
                    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset),
                    "the connection to {to}: {error}"
                );
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn messages_are_taken_apart() {
        let mut bytes = Vec::new();
        for (kind, body) in [(20_u16, &b"abcde"[..]), (3, &b"fghi"[..])] {
            bytes.extend_from_slice(&u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes());
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(body);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        assert_eq!(messages(&bytes).collect::<Vec<_>>(), [(20, &b"abcde"[..]), (3, b"fghi")]);
        assert_eq!(messages(&bytes[..20]).count(), 0);
        assert_eq!(messages(&[0; 16]).count(), 0, "a length of zero ends the walk");
    }
}
