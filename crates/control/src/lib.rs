//! The domain: images and their builds, MicroVMs, their state machines, idle policy.
//!
//! [`plane::ControlPlane`] is what the API calls, [`plane::DataPlane`] what the endpoint proxy calls. Nothing here knows HTTP or QEMU.

#![forbid(unsafe_code)]

mod architecture;
pub mod arn;
mod capacity;
mod connectors;
mod control;
mod control_plane;
mod cursor;
mod data_plane;
pub mod error;
mod hooks;
mod images;
pub mod logs;
mod managed;
mod microvm;
pub mod plane;
mod pump;
pub mod quota;
mod records;
mod recovery;
mod registry;
pub mod roles;
mod services;
mod settings;
mod sweep;
mod tags;
#[cfg(test)]
mod testing;
pub mod token;
pub mod types;
mod versions;

pub use architecture::{Architecture, Architectures};
pub use capacity::HostMemory;
pub use control::{Control, Deps, StartError};
pub use error::ControlError;
pub use settings::{ActivitySettings, BuildMachineSettings, CapacitySettings, GuestSettings, GuestSize, Settings};
