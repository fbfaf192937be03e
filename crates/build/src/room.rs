//! Where a build runs: what connects it, or the virtual machine that it is in. Both belong to other crates; a build says what it needs and when.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{Uplink, UplinkError};

/// What a build runs in.
#[derive(Debug)]
pub enum Room {
    /// Namespaces of this host, connected to the network by this.
    Namespaces(Box<dyn Uplink>),
    /// A virtual machine of its own.
    Machine(Arc<dyn BuildMachine>),
}

impl Room {
    /// From now on the build reaches what its image may reach, and nothing else.
    pub(crate) async fn restrict(&mut self) -> Result<(), RestrictError> {
        match self {
            Self::Namespaces(uplink) => Ok(uplink.restrict().await?),
            Self::Machine(machine) => Ok(machine.restrict().await?),
        }
    }
}

/// A build's network could not be narrowed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestrictError {
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A virtual machine for one build.
#[async_trait]
pub trait BuildMachine: std::fmt::Debug + Send + Sync {
    /// Boots it and starts its main process, as root with every right in there. Again only after [`BuildMachine::kill`]. Until it is
    /// restricted, it reaches what the host routes, but nothing of the host.
    async fn boot(&self, spec: MachineSpec) -> Result<(), MachineError>;

    /// Makes an address of the host's loopback one of its gateway's, on the same port, for as long as it runs.
    async fn share(&self, address: SocketAddr) -> Result<(), MachineError>;

    /// From now on it reaches what its image may reach, and nothing else.
    async fn restrict(&self) -> Result<(), MachineError>;

    /// Runs a program beside the main process to its end. Returns its exit code, as a shell has it.
    async fn run(&self, program: Program, output: mpsc::Sender<Output>) -> Result<i32, MachineError>;

    /// Ends it and waits until its process is gone. Nothing happens if it does not run.
    async fn kill(&self);
}

/// A machine to boot.
#[derive(Debug)]
pub struct MachineSpec {
    /// Identifier, for names of temporary things.
    pub id: String,
    /// Directory of the machine's own; created if missing, and the builder's to delete.
    pub dir: PathBuf,
    /// Raw ext4 image of its root file system, which stays as it is.
    pub rootfs: PathBuf,
    /// Disks beside that one.
    pub disks: Vec<MachineDisk>,
    /// The main process, which the machine lives as long as.
    pub argv: Vec<String>,
    /// Its environment, and that of what runs beside it.
    pub env: Vec<(String, String)>,
    /// How long the boot may take.
    pub timeout: Duration,
}

/// A disk that is a file's bytes.
#[derive(Debug)]
pub struct MachineDisk {
    /// Its serial number.
    pub serial: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What the machine writes goes into the file.
    pub writable: bool,
}

/// A program to run in a machine.
#[derive(Debug)]
pub struct Program {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Where it starts.
    pub dir: String,
}

/// A piece of what a program prints.
#[derive(Debug)]
pub enum Output {
    /// To its standard output.
    Stdout(Vec<u8>),
    /// To its standard error.
    Stderr(Vec<u8>),
}

/// A build's machine could not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// it does not run, or not any more
    #[error("the build's machine is gone: {0}")]
    Gone(String),
    /// what ran in it took all of its memory
    #[error("the build needs more than the {0} MiB of memory that it may have (`build_memory_mib`)")]
    OutOfMemory(u32),
    /// the host has no memory for it
    #[error("{0}")]
    Capacity(String),
    /// anything else
    #[error("{0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}
