//! Waits for devices by listening to the kernel's own announcements (netlink `KOBJECT_UEVENT`).

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};

/// The multicast group the kernel announces to.
const KERNEL_GROUP: u32 = 1;

/// A device did not appear.
#[derive(Debug, thiserror::Error)]
pub enum UeventError {
    /// the subscription failed
    #[error("listening to the kernel's device events: {0}")]
    Socket(#[from] Errno),
    /// the deadline passed
    #[error("{what} did not appear in time")]
    Deadline {
        /// The device.
        what: &'static str,
    },
}

/// A subscription to every device event of the machine.
#[derive(Debug)]
pub struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Subscribes. Events from now on are kept until they are waited for.
    pub fn subscribe() -> Result<Self, UeventError> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// Looks now, and again after each event, until `look` finds something.
    pub fn wait_for<T>(&mut self, what: &'static str, deadline: Instant, look: impl Fn() -> Option<T>) -> Result<T, UeventError> {
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            self.wait(what, deadline)?;
        }
    }

    fn wait(&mut self, what: &'static str, deadline: Instant) -> Result<(), UeventError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(UeventError::Deadline { what }),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // What an event says does not matter, only that something changed: take all that are there.
        let mut event = [0; 8192];
        loop {
            match recv(self.socket.as_raw_fd(), &mut event, MsgFlags::empty()) {
                // An overrun lost events, which is as good as having seen them.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_there_needs_no_event() {
        let mut events = Uevents::subscribe().unwrap();
        assert_eq!(events.wait_for("nothing", Instant::now(), || Some(7)).unwrap(), 7);
    }

    #[test]
    fn the_wait_ends_at_its_deadline() {
        let mut events = Uevents::subscribe().unwrap();
        let error = events.wait_for("a unicorn", Instant::now() + Duration::from_millis(20), || None::<()>).unwrap_err();
        assert_eq!(error.to_string(), "a unicorn did not appear in time");
    }
}
