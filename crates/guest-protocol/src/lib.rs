//! What host and guest say to each other.
//!
//! One virtio-serial port carries one yamux session at a time. The host is the yamux client, the guest the server, and either side opens
//! streams. Every stream begins with a [`StreamHeader`] that says what it is for. The first stream is the control stream:
//!
//! ```text
//! host                                   guest
//!  │── StreamHeader::Control ──────────────▶│  session begins: after boot, after every launch and resume
//!  │── HostMessage::Hello ─────────────────▶│  clock, entropy, network put right
//!  │◀───────────────── GuestMessage::Ready ─│
//!  │── HostMessage::Start ─────────────────▶│  once, at image build
//!  │◀─────────────── GuestMessage::Started ─│
//!  │◀───────────── GuestMessage::Listening ─│  a TCP port of the app begins to accept connections
//!  │◀──────────────── GuestMessage::Exited ─│  the app's main process ended
//!  │── HostMessage::Detach ────────────────▶│  before capture and suspend: the guest closes the port, which ends the session
//! ```
//!
//! The close of the port is what ends a session: the kernel then discards what was in flight, QEMU reports the close to the host, and the
//! VM can be stopped with no session open. The guest opens the port again and waits for the next `Hello`.

#![forbid(unsafe_code)]

pub mod message;
pub mod mux;
pub mod wire;

pub use message::{App, DialReply, ExitStatus, GuestMessage, Hello, HostMessage, LogRecord, LogSource, Network, Ready, StreamHeader};
pub use mux::{Mux, MuxError, Stream};
pub use wire::{WireError, read_message, write_message};

/// Version of this protocol. A host refuses a guest that speaks another one: the image must be rebuilt with the present guest kit.
pub const VERSION: u32 = 1;

/// Name of the virtio-serial port: `/dev/virtio-ports/hearth` where udev runs, `/sys/class/virtio-ports/*/name` everywhere.
pub const PORT_NAME: &str = "hearth";

/// Largest encoded message, in bytes: bounds what a hostile peer can make the other side allocate.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
