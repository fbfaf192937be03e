//! What host and guest say to each other.
//!
//! One virtio-serial port carries one yamux session at a time. The host is the yamux client, the guest the server, and either side opens
//! streams. Every stream begins with a [`StreamHeader`] that says what it is for. The first stream is the control stream:
//!
//! ```text
//! host                                   guest
//!  │── marker ─────────────────────────────▶│  raw bytes; the guest discards everything before them
//!  │── StreamHeader::Control ──────────────▶│  session begins: after boot, after every launch and resume
//!  │── HostMessage::Hello ─────────────────▶│  entropy, network put right
//!  │◀─────────────── GuestMessage::AskTime ─│
//!  │── HostMessage::Time ──────────────────▶│  clock put right, by the time that question and answer took; app thawed
//!  │◀───────────────── GuestMessage::Ready ─│
//!  │── HostMessage::Start ─────────────────▶│  once, at image build
//!  │◀─────────────── GuestMessage::Started ─│
//!  │◀───────────── GuestMessage::Listening ─│  a TCP port of the app begins to accept connections
//!  │◀────────────── GuestMessage::Activity ─│  the app's container has come to rest, or is busy again; until the capture
//!  │◀──────────────── GuestMessage::Exited ─│  the app's main process ended
//!  │── HostMessage::Detach { marker, … } ──▶│  before capture and suspend: the guest freezes the app, drops the session in the middle of whatever it does …
//!  │◀─────────────────────────────── marker ─│  … and says so with raw bytes; the host discards everything before them
//! ```
//!
//! The marker of `Detach` also begins the next session, so neither side can mistake what was in flight when a session ended for the start
//! of the next one, and no tenant can forge it. The first session after boot begins with [`BOOT_MARKER`]. The port stays open throughout.

#![forbid(unsafe_code)]

use std::net::Ipv4Addr;

pub mod carrier;
pub mod marker;
pub mod message;
pub mod mux;
pub mod wire;

pub use carrier::Carrier;
pub use marker::{BOOT_MARKER, Marker, MarkerTrigger, MarkerWatch, await_marker, new_marker};
pub use message::{
    Activity, App, CopyInput, CopyOutput, Credentials, DialReply, Exec, ExecInput, ExecOutput, ExitStatus, FileCopy, FileKind,
    GuestMessage, Hello, HookCall, HookReply, HostMessage, LogRecord, LogSource, MetadataReply, MetadataRequest, Network, Parting, Ready,
    StreamHeader, TerminalSize,
};
pub use mux::{Mux, MuxError, Stream};
pub use wire::{WireError, read_message, write_message, write_messages};

/// Version of this protocol. A host refuses a guest that speaks another one: the image must be rebuilt with the present guest kit.
pub const VERSION: u32 = 5;

/// Name of the virtio-serial port: `/dev/virtio-ports/hearth` where udev runs, `/sys/class/virtio-ports/*/name` everywhere.
pub const PORT_NAME: &str = "hearth";

/// How much standard input may be on its way to a process: both sides can hear more than data while the process does not read.
pub const EXEC_WINDOW_BYTES: u32 = 256 << 10;

/// Where the guest's metadata service is, as on EC2: link-local, and never seen outside the guest.
pub const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// TCP port at that address that leads to the API of the guest's own server.
pub const API_PORT: u16 = 8470;

/// Longest line in a log record, in bytes; a longer line is several records.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// Largest encoded message, in bytes: bounds what a hostile peer can make the other side allocate.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
