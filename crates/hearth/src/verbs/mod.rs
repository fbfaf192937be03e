//! What the command line's verbs do. Each speaks to the server through [`crate::client`], and waits on the server's word, not on a clock.

pub mod cp;
pub mod endpoint;
pub mod env;
pub mod exec;
pub mod forward;
pub mod iam;
pub mod image;
pub mod logs;
pub mod microvm;
mod names;
mod printable;
mod table;
mod terminal;
pub mod trust;
mod tunnel;
