//! The messages, as postcard encodes them. Fields are only ever added together with a new [`crate::VERSION`].

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::Marker;

/// First message on every stream: what the stream is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamHeader {
    /// Opened by the host, once per session: [`HostMessage`]s one way, [`GuestMessage`]s the other.
    Control,
    /// Opened by the host: the guest connects to `127.0.0.1:port` (then `[::1]:port`), answers [`DialReply`], then bytes flow both ways.
    Dial {
        /// TCP port, 1–65535.
        port: u16,
    },
    /// Opened by the guest, once per session: [`LogRecord`]s until the session ends.
    Log,
}

/// Answer to [`StreamHeader::Dial`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DialReply {
    /// The bytes that follow are the application's.
    Connected,
    /// Nothing listens on the port, or the app is gone.
    Refused,
    /// The connection failed for another reason.
    Failed {
        /// What the guest's kernel said.
        reason: String,
    },
}

/// What the host says on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// First message of every session.
    Hello(Hello),
    /// Start the application. Sent once, at image build; a clone's application is already running.
    Start(App),
    /// End the session at once: drop every stream, write the marker as raw bytes, then wait for the same marker, which begins the next session.
    Detach {
        /// Random bytes, new for each `Detach`.
        marker: Marker,
    },
}

/// What the guest says on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The guest has taken over what `Hello` said.
    Ready(Ready),
    /// The application's main process runs.
    Started {
        /// Process id in the guest's outermost pid namespace.
        pid: u32,
    },
    /// The application could not be started; the text says which step failed.
    StartFailed {
        /// For the build log and the build's state reason.
        reason: String,
    },
    /// A process of the guest began to listen on this TCP port. Sent for each new port until the first `Detach` after `Start`.
    Listening {
        /// TCP port.
        port: u16,
    },
    /// The application's main process ended. Sent again at the start of each later session.
    Exited(ExitStatus),
}

/// How the main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code, or 128 + signal number as a shell reports it.
    pub code: i32,
}

/// Identity and surroundings of this life of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::VERSION`] of the host.
    pub protocol: u32,
    /// The MicroVM's id.
    pub vm_id: String,
    /// Counts launches and resumes of this MicroVM; another number means that time has passed elsewhere.
    pub generation: u64,
    /// Host's wall clock, nanoseconds since the Unix epoch, read just before sending.
    pub wall_clock_ns: u64,
    /// Fresh random bytes for the kernel's generator, at least 32.
    pub entropy: Vec<u8>,
    /// The guest's network, if it has a network device.
    pub network: Option<Network>,
}

/// Address of the guest's one network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Prefix length of the link, in bits.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// Resolvers for `/etc/resolv.conf`.
    pub nameservers: Vec<Ipv4Addr>,
    /// Largest packet, in bytes.
    pub mtu: u16,
}

/// Answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// [`crate::VERSION`] of the guest.
    pub protocol: u32,
    /// Release of the guest's kernel.
    pub kernel: String,
}

/// The application as its image describes it, with container semantics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct App {
    /// ENTRYPOINT followed by CMD. Never empty.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// WORKDIR; created if it is missing.
    pub cwd: String,
    /// USER as the Dockerfile wrote it: `name`, `uid`, `name:group`, `uid:gid`, or empty for root.
    pub user: String,
    /// STOPSIGNAL as a signal number.
    pub stop_signal: i32,
    /// Every capability instead of Docker's default set.
    pub all_capabilities: bool,
    /// Host name in the application's UTS namespace.
    pub hostname: String,
}

/// Some output of the application's main process or its children.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Which descriptor it was written to.
    pub source: LogSource,
    /// When the guest read it, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// A line without its newline, or a piece of a line longer than the guest's buffer.
    pub line: Vec<u8>,
    /// Lines lost before this one because nobody read them in time.
    pub dropped: u64,
}

/// Source of a [`LogRecord`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogSource {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The guest itself.
    System,
}
