//! What a virtual machine monitor must be able to do for Hearth.
//!
//! ```text
//! boot ─▶ Machine ─▶ start_app ─▶ capture ─▶ Snapshot          (image build, once)
//! launch(Snapshot)  ─▶ Machine ─▶ suspend ─▶ Suspended on disk  (RunMicrovm, idle)
//! launch(Suspended) ─▶ Machine ─▶ …                             (next request)
//! ```

use std::{
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use hearth_guest_protocol::{
    Activity, App, Exec, ExitStatus, FileCopy, HookCall, HookReply, LogRecord, MetadataReply, MetadataRequest, Network,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{
    network::{Egress, NetworkError},
    snapshot::{Platform, Snapshot, SnapshotError},
};

/// A virtual machine monitor.
#[async_trait]
pub trait Engine: Send + Sync {
    /// What snapshots of this engine depend on.
    fn platform(&self) -> &Platform;

    /// Boots a machine from a root file system, up to the point where its guest waits for [`Machine::start_app`].
    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Machine>, BootError>;

    /// Starts a machine in the state of a snapshot, or in the state it was suspended in. The guest has said `Ready` when this returns.
    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Machine>, LaunchError>;

    /// Host memory, in bytes, that the next launch of this snapshot takes for all of its clones together; none if it is there already.
    async fn unloaded_bytes(&self, snapshot: &Snapshot) -> u64;

    /// Host memory, in bytes, that a machine with this directory takes at once when it is resumed, about; none if it is not suspended.
    async fn suspended_bytes(&self, dir: &Path) -> u64;

    /// A network slot for what is no machine, such as an image build.
    async fn outlet(&self) -> Result<Box<dyn Outlet>, NetworkError>;

    /// Releases what the engine keeps for a snapshot that is about to be deleted (shared memory, prepared machines).
    async fn forget(&self, snapshot: &Snapshot);

    /// Ends everything that the engine holds ready. Machines must be gone by then.
    async fn shutdown(&self);
}

/// One running virtual machine. Dropping it kills it and releases what it holds.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Starts the application. Once in the life of an image, before [`Machine::capture`].
    async fn start_app(&self, app: App) -> Result<(), GuestError>;

    /// A handle that connects to ports and calls hooks of the guest, for as long as this machine runs.
    fn dialer(&self) -> Arc<dyn Dial>;

    /// What happens in the machine, in order. Can be taken once; `None` after that. A reader that is slow to take log records slows their
    /// delivery down, never the guest: it drops and counts what does not fit.
    fn take_events(&mut self) -> Option<mpsc::Receiver<MachineEvent>>;

    /// Sends the application its stop signal; [`MachineEvent::AppExited`] follows when it obeys. Returns when the signal is on its way.
    async fn stop_app(&self) -> Result<(), GuestError>;

    /// Notes which pages this clone has touched so far, beside its snapshot: later launches of that read them ahead. Returns their bytes.
    async fn record_working_set(&self) -> io::Result<u64>;

    /// From now on the guest reaches only what `egress` says. Connections that are open stay open.
    async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError>;

    /// Lets the guest reach an address of the host's loopback, for as long as the machine runs: at its gateway, on the same port.
    async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError>;

    /// What the machine has used of its host in this life.
    fn usage(&self) -> io::Result<Usage>;

    /// Stops the machine and makes it the snapshot in `into`, a directory that does not exist yet. The machine ends either way.
    async fn capture(self: Box<Self>, into: PathBuf) -> Result<Snapshot, CaptureError>;

    /// Writes what differs from the snapshot into the machine's directory and ends the process: a suspended machine costs no memory.
    /// Until that state is complete the machine can still run on, and does so when `cancel` is cancelled in time: it is the same life, but a
    /// new session, with a dialer and events of its own. After an error the machine has ended and its state is lost.
    async fn suspend(self: Box<Self>, cancel: CancellationToken) -> Result<SuspendOutcome, SuspendError>;

    /// Ends the machine and waits until its process is gone. The application stops at once, and a guest that answers delivers first what the
    /// application has written. Tells whether it did.
    async fn kill(self: Box<Self>) -> bool;
}

/// A network slot without a machine. Dropping it disconnects what was plugged in.
#[async_trait]
pub trait Outlet: fmt::Debug + Send + Sync {
    /// What is behind the outlet must know of its network.
    fn network(&self) -> Network;

    /// Connects the network namespace of a process: its `eth0` reaches what the host routes, but nothing of the host. In
    /// the place of the one before, if there was one.
    async fn plug(&mut self, pid: u32) -> Result<(), NetworkError>;

    /// Makes an address of the host's loopback the same address inside what was plugged in.
    async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError>;

    /// From now on only what `egress` says is let out.
    async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError>;
}

/// What can be reached in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A TCP port, the way a client inside reaches it: through the loopback. The stream carries the connection's bytes.
    Port(u16),
    /// A new process beside the app. The stream carries [`hearth_guest_protocol::ExecInput`] and [`hearth_guest_protocol::ExecOutput`].
    Process(Exec),
    /// The container's files. The stream carries [`hearth_guest_protocol::CopyInput`] and [`hearth_guest_protocol::CopyOutput`].
    Files(FileCopy),
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(out, "port {port}"),
            Self::Process(_) => out.write_str("a new process"),
            Self::Files(_) => out.write_str("the container's files"),
        }
    }
}

/// Bytes to and from something in the guest.
pub trait GuestStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> GuestStream for T {}

/// Opens streams to one guest.
#[async_trait]
pub trait Dial: Send + Sync {
    /// Opens a stream to a target. The guest has agreed to it when this returns.
    async fn open(&self, target: &Target) -> Result<Box<dyn GuestStream>, DialError>;

    /// Connects to a TCP port.
    async fn dial(&self, port: u16) -> Result<Box<dyn GuestStream>, DialError> {
        self.open(&Target::Port(port)).await
    }

    /// Has the guest call the application's hook server. Ends a little after the call's timeout at the latest, whatever the guest does.
    async fn call_hook(&self, call: HookCall) -> Result<HookReply, HookError>;
}

/// What a guest may ask of its host. One for each machine, so that no guest can ask for another.
#[async_trait]
pub trait GuestServices: fmt::Debug + Send + Sync {
    /// Answers the guest's metadata service.
    async fn metadata(&self, request: MetadataRequest) -> MetadataReply;

    /// Connects to the server's API; the bytes are the guest's. Refused where the guest has no use for it.
    async fn api(&self) -> io::Result<Box<dyn GuestStream>>;
}

/// For machines that have nobody to ask.
#[derive(Debug, Clone, Copy)]
pub struct NoServices;

#[async_trait]
impl GuestServices for NoServices {
    async fn metadata(&self, _request: MetadataRequest) -> MetadataReply {
        MetadataReply::Absent
    }

    async fn api(&self) -> io::Result<Box<dyn GuestStream>> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Something that happened in a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The application began to listen on a TCP port. Only between `start_app` and `capture`.
    Listening(u16),
    /// The application's container has come to rest, or is busy again. It begins busy. Only between `start_app` and `capture`.
    Activity(Activity),
    /// The application's main process ended.
    AppExited(ExitStatus),
    /// The host could not read or write the machine's disk, and the guest was told so: an I/O error. Once in a life.
    DiskFailed {
        /// Because the host's disk is full.
        full: bool,
    },
    /// Output of the application.
    Log(LogRecord),
    /// The machine is gone, and not because it was asked to be. Always the last event.
    Died {
        /// What the engine knows about it.
        reason: String,
    },
}

/// A machine to boot.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Identifier, for the guest, the log and file names.
    pub id: String,
    /// Directory of the machine's own; created if missing, and the caller's to delete.
    pub dir: PathBuf,
    /// Raw ext4 image of the root file system. Stays unchanged; what the boot writes goes to an overlay in `dir`.
    pub rootfs: PathBuf,
    /// Further disks. A machine that has any cannot be captured.
    pub disks: Vec<Disk>,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// What the guest may reach.
    pub egress: Egress,
    /// What the guest may ask.
    pub services: Arc<dyn GuestServices>,
    /// How long the guest may take until it waits for its application.
    pub timeout: Duration,
}

/// A disk beside the root file system: a file's bytes, and what the guest writes goes into the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its serial number, by which the guest finds it: at most 20 bytes of ASCII.
    pub serial: String,
    /// The file.
    pub path: PathBuf,
    /// The guest may write. The file then belongs to the machine's user, until the caller takes it back.
    pub writable: bool,
}

/// A machine to launch.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// Identifier, for the guest, the log and file names.
    pub id: String,
    /// Directory of the machine's own; created if missing, and the caller's to delete. Holds its disk overlay and, while it is
    /// suspended, its state.
    pub dir: PathBuf,
    /// The snapshot that the machine is, or once was, a clone of.
    pub snapshot: Arc<Snapshot>,
    /// From the snapshot, or from what the last suspend left in `dir`.
    pub source: LaunchSource,
    /// What the guest may reach in this life.
    pub egress: Egress,
    /// What the guest may ask in this life.
    pub services: Arc<dyn GuestServices>,
    /// Counts launches and resumes of this machine, from 1.
    pub generation: u64,
}

/// What state a machine is launched in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchSource {
    /// A fresh clone.
    Snapshot,
    /// What [`Machine::suspend`] left in the machine's directory.
    Suspended,
}

/// What a machine has used of its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Bytes that it sent to the network by itself; what crosses its endpoint is not among them.
    pub sent_bytes: u64,
}

/// What came of a suspend.
pub enum SuspendOutcome {
    /// The machine's state is on disk, its process is gone.
    Suspended(Suspended),
    /// It was cancelled in time: the machine runs, and its guest has said `Ready` again.
    Cancelled(Box<dyn Machine>),
}

/// What a suspend wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspended {
    /// Bytes of guest memory that differ from the snapshot.
    pub dirty_bytes: u64,
    /// Bytes of device state.
    pub device_state_bytes: u64,
}

/// A machine could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// a host resource is missing
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the monitor refused
    #[error("the virtual machine monitor failed: {0}")]
    Monitor(String),
    /// the guest did not come up
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// A machine could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// a host resource is missing
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the snapshot, or the suspended state, is missing, damaged, or made by another engine
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// the monitor refused
    #[error("the virtual machine monitor failed: {0}")]
    Monitor(String),
    /// the guest did not answer
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// A machine could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// a host resource is missing
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the monitor refused
    #[error("the virtual machine monitor failed: {0}")]
    Monitor(String),
    /// the guest did not let go of its session
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// A machine could not be suspended.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    /// a host resource is missing
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the monitor refused
    #[error("the virtual machine monitor failed: {0}")]
    Monitor(String),
    /// the guest did not let go of its session
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// The guest did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// the guest did not answer in time
    #[error("the guest did not {what} within {} ms", timeout.as_millis())]
    Timeout {
        /// What was waited for, as a verb: "say ready".
        what: &'static str,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// the guest speaks another protocol
    #[error("the guest speaks protocol {guest}, this host {host}: rebuild the image with the present guest kit")]
    Protocol {
        /// The guest's version.
        guest: u32,
        /// Ours.
        host: u32,
    },
    /// the guest could not begin this life
    #[error("the guest is not ready: {0}")]
    NotReady(String),
    /// the session with the guest broke
    #[error("the session with the guest broke: {0}")]
    Session(String),
    /// the application could not be started
    #[error("the application could not be started: {0}")]
    App(String),
}

/// A port of the guest could not be connected to.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// nothing listens on the port, or there is no app
    #[error("{0} refuses connections")]
    Refused(Target),
    /// the machine is not there any more
    #[error("the machine is gone: {0}")]
    Gone(String),
    /// the connection failed for another reason
    #[error("connecting to {target} failed: {reason}")]
    Failed {
        /// To what.
        target: Target,
        /// What the guest said.
        reason: String,
    },
}

/// A hook could not be called.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// the machine is not there any more
    #[error("the machine is gone: {0}")]
    Gone(String),
}
