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
/// Where the peer's address begins in an id, after two ports and our own address.
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
                // It ended by itself in the meantime.
                Ok(()) | Err(Errno::ENOENT) => {}
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
    let peer: [u8; 16] = id[PEER_IN_ID..PEER_IN_ID + 16].try_into().expect("the range has 16 bytes");
    let peer = if i32::from(family) == libc::AF_INET {
        IpAddr::V4(Ipv4Addr::new(peer[0], peer[1], peer[2], peer[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from(peer)).to_canonical()
    };
    let inside = peer.is_loopback() || peer == METADATA_ADDRESS;
    (!inside).then_some(id)
}

#[cfg(test)]
mod tests {
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
