//! The domain: images and their builds, MicroVMs, their state machines, idle policy.
//!
//! [`plane::ControlPlane`] is what the API calls, [`plane::DataPlane`] what the endpoint proxy calls. Nothing here knows HTTP or QEMU.

#![forbid(unsafe_code)]

pub mod arn;
mod control;
pub mod error;
pub mod logs;
pub mod plane;
mod settings;
pub mod token;
pub mod types;

pub use control::{Control, Deps, StartError};
pub use error::ControlError;
pub use settings::Settings;
