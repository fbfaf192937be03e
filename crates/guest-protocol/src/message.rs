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
    /// Opened by the host: the guest calls the app's hook server, answers [`HookReply`], and the stream ends.
    Hook(HookCall),
    /// Opened by the host: a process in the app's container. The guest answers [`DialReply`], then [`ExecInput`]s go one way,
    /// [`ExecOutput`]s the other, until [`ExecOutput::Exited`] or [`ExecOutput::Failed`].
    Exec(Exec),
    /// Opened by the host: the container's files. The guest answers [`DialReply`], then [`CopyInput`]s go one way, [`CopyOutput`]s the
    /// other, until [`CopyOutput::Done`] or [`CopyOutput::Failed`].
    Copy(FileCopy),
    /// Opened by the guest: one [`MetadataRequest`], answered by one [`MetadataReply`].
    Metadata,
    /// Opened by the guest: bytes flow between a client in the guest and the host's API listener.
    Api,
}

/// Answer to [`StreamHeader::Dial`], [`StreamHeader::Exec`] and [`StreamHeader::Copy`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DialReply {
    /// What follows is as the stream's header says.
    Connected,
    /// Nothing listens on the port, or there is no app.
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
    ///
    /// Before it answers, the guest freezes the app; it runs again after the next session's `Hello`.
    Detach {
        /// Random bytes, new for each `Detach`.
        marker: Marker,
        /// What for.
        parting: Parting,
    },
    /// Answer to [`GuestMessage::AskTime`].
    Time {
        /// Host's wall clock, nanoseconds since the Unix epoch, read just before sending.
        wall_clock_ns: u64,
    },
    /// Send the app its stop signal. [`GuestMessage::Exited`] follows when it obeys.
    Stop,
}

/// What a session ends for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parting {
    /// This life goes on, now or later.
    Pause,
    /// A snapshot is to be taken that every clone will carry: first give back files that were not used lately, and fill with zeros the memory
    /// that nobody uses any more.
    Capture {
        /// How many bytes of its memory the machine has touched so far: the rest is zero already.
        touched: u64,
    },
    /// The machine will be killed: the beginning of a line is a line now.
    End,
}

/// What the guest says on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// What time is it? Between `Hello` and [`GuestMessage::Ready`]; the guest knows how long the answer took, and asks again if that was
    /// too long.
    AskTime,
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
    /// The application's container has come to rest, or is busy again. It begins busy. Sent at each change until the first `Detach` after
    /// `Start`.
    Activity(Activity),
    /// The application's main process ended. Sent again at the start of each later session.
    Exited(ExitStatus),
    /// Instead of [`GuestMessage::Ready`]: what `Hello` said could not be taken over, and the application stands still.
    NotReady {
        /// Which part, and why.
        reason: String,
    },
}

/// Whether the application's container does anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Its processes use the processor, the disk or the network.
    Busy,
    /// Its processes have hardly used them for a moment.
    AtRest,
}

/// How the main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code, or 128 + signal number as a shell reports it.
    pub code: i32,
    /// The kernel killed it, or a process of its container, for want of memory.
    pub out_of_memory: bool,
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

/// A lifecycle hook to call: `POST` to the app's own server over plain HTTP/1.1 from `127.0.0.1` (SPEC 8.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookCall {
    /// TCP port of the hook server.
    pub port: u16,
    /// Path of the request.
    pub path: String,
    /// Further header fields; `Host` among them.
    pub headers: Vec<(String, String)>,
    /// Body, which may be empty.
    pub body: Vec<u8>,
    /// How long the whole exchange may take, in milliseconds.
    pub timeout_ms: u64,
}

/// How a hook was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HookReply {
    /// With a complete response of this HTTP status.
    Status(u16),
    /// Nothing listens on the port.
    Refused,
    /// Not completely within the time allowed.
    TimedOut,
    /// With something that is no HTTP response, or the connection broke.
    Invalid {
        /// What was wrong with it.
        reason: String,
    },
}

/// A process to start in the app's container, beside the app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments. Empty: the container's shell.
    pub argv: Vec<String>,
    /// Variables beside those of the app.
    pub env: Vec<(String, String)>,
    /// Working directory; the app's if absent.
    pub cwd: Option<String>,
    /// As a Dockerfile's USER; the app's if absent.
    pub user: Option<String>,
    /// A terminal of this size instead of pipes.
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// What the host says on an [`StreamHeader::Exec`] stream. If the stream ends, the process is hung up on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecInput {
    /// For its standard input. At most [`crate::EXEC_WINDOW_BYTES`] may be under way: sent, but not yet told as [`ExecOutput::StdinTaken`].
    Stdin(Vec<u8>),
    /// Its standard input ends here.
    StdinEnd,
    /// Its terminal has another size.
    Resize(TerminalSize),
    /// Send it a signal, by number.
    Signal(i32),
}

/// What the guest says on an [`StreamHeader::Exec`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecOutput {
    /// The process runs.
    Started,
    /// From its standard output, or its terminal.
    Stdout(Vec<u8>),
    /// From its standard error.
    Stderr(Vec<u8>),
    /// So many more bytes of [`ExecInput::Stdin`] have reached it.
    StdinTaken(u32),
    /// It ended, and this was all of its output. Last message.
    Exited(ExitStatus),
    /// It could not be started; the text says which step failed. Last message.
    Failed {
        /// For the user.
        reason: String,
    },
}

/// What to do with the container's files. Paths are the container's; relative ones begin at its root, as with `docker cp`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileCopy {
    /// The guest says what is there, as [`CopyOutput::Found`].
    Look {
        /// Anything.
        path: String,
    },
    /// The host sends a tar stream, which the guest unpacks.
    Into {
        /// An existing directory.
        directory: String,
        /// Owners and special mode bits as the stream has them, instead of root's and none.
        archive: bool,
    },
    /// The guest sends a tar stream.
    OutOf {
        /// A file, a directory or a symbolic link, which is not followed.
        path: String,
        /// What it is called in the stream; `.` for a directory's content alone.
        name: String,
    },
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// Nothing.
    Missing,
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A device, a socket or a pipe.
    Special,
}

/// What the host says on a [`StreamHeader::Copy`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyInput {
    /// Of the tar stream.
    Data(Vec<u8>),
    /// The tar stream was whole.
    End,
}

/// What the guest says on a [`StreamHeader::Copy`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyOutput {
    /// Answer to [`FileCopy::Look`], before [`CopyOutput::Done`].
    Found {
        /// What is there, symbolic links followed.
        kind: FileKind,
        /// The path's last part is itself a symbolic link.
        link: bool,
    },
    /// Of the tar stream.
    Data(Vec<u8>),
    /// This was left out.
    Skipped {
        /// Its path, and why.
        what: String,
    },
    /// All is done. Last message.
    Done,
    /// It failed. Last message.
    Failed {
        /// On what and why, for the user.
        reason: String,
    },
}

/// What the guest's metadata service asks the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetadataRequest {
    /// Credentials of the MicroVM's execution role.
    Credentials,
    /// The region that the MicroVM is in.
    Region,
    /// Suspend this MicroVM, as a call of the API would.
    Suspend,
}

/// The host's answer to a [`MetadataRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetadataReply {
    /// Temporary credentials.
    Credentials(Credentials),
    /// For example `us-east-1`.
    Region(String),
    /// There is no such thing for this MicroVM: it has no execution role, or the operator has not enabled it.
    Absent,
    /// It was done.
    Done,
    /// The role does not let itself be assumed.
    Refused {
        /// What the guest may know of it.
        reason: String,
    },
    /// It failed on the host's side; worth another try.
    Failed {
        /// What the guest may know of it.
        reason: String,
    },
}

/// Temporary credentials of a role.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Id of the access key.
    pub access_key_id: String,
    /// Its secret.
    pub secret_access_key: String,
    /// Token that goes with it.
    pub session_token: String,
    /// When it was issued, seconds since the Unix epoch.
    pub issued_at: u64,
    /// When it ends, seconds since the Unix epoch.
    pub expires_at: u64,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { access_key_id, issued_at, expires_at, .. } = self;
        out.debug_struct("Credentials")
            .field("access_key_id", access_key_id)
            .field("issued_at", issued_at)
            .field("expires_at", expires_at)
            .finish_non_exhaustive()
    }
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
