//! One virtual machine: engine, memory file, disk chain, network slot, snapshot.
//!
//! [`Engine`] boots a machine from a root file system and launches clones of a [`Snapshot`]; a [`Machine`] is one that runs. Nothing here
//! knows of AWS, and nothing above this crate knows of QEMU.

mod changes;
pub mod engine;
pub mod kit;
mod memory;
pub mod network;
pub mod probe;
pub mod qemu;
mod requests;
mod session;
pub mod snapshot;
mod working_set;

pub use engine::{
    BootError, BootSpec, CaptureError, Dial, DialError, Disk, Engine, GuestError, GuestServices, GuestStream, HookError, LaunchError,
    LaunchSource, LaunchSpec, Machine, MachineEvent, NoServices, Outlet, SuspendError, SuspendOutcome, Suspended, Target, Usage,
};
pub use network::{Egress, NetworkError};
pub use snapshot::{Platform, Snapshot, SnapshotError, SnapshotManifest};
