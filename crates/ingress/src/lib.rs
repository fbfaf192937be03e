//! The endpoint proxy: what stands between a client and the application in a MicroVM (SPEC section 10).
//!
//! ```text
//! TLS ─▶ authenticate ─▶ hold while waking ─▶ route to a port ─▶ copy bytes and meter them
//! listen,        host,         DataPlane::connect    proxy, headers,     body, meter,
//! certificates   credentials                         upgrade             tunnel, linger
//! ```
//!
//! Clients with a shell's token end at processes and files of the MicroVM instead ([`shell`]); those that ask for raw TCP at a port ([`tcp`]).
//!
//! Nothing here knows what a MicroVM is: [`hearth_control::plane::DataPlane`] decides who may talk to which port and hands out a
//! stream to it, waking whoever sleeps.

#![forbid(unsafe_code)]

mod acme;
mod app;
mod body;
mod bundle;
mod ca;
mod certificates;
mod chain;
mod client;
mod credentials;
mod error;
mod exchange;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod headers;
mod host;
mod limits;
mod linger;
mod listen;
mod meter;
mod outbound;
mod ports;
mod proxy;
mod reload;
mod shell;
mod tcp;
mod tunnel;
mod upgrade;
mod watch;

pub use acme::{AcmeConfig, AcmeError, ExternalAccount, keep_issuing, kept_chain};
pub use bundle::{system_bundle, write_bundle};
pub use ca::{CaError, LocalCa};
pub use certificates::{EndpointCertificates, server_config};
pub use chain::{Chain, ChainError, ChainFiles, any_endpoint, certificate_der, ends};
pub use error::Side;
pub use limits::Limits;
pub use listen::{IngressConfig, serve};
pub use reload::{keep_reloading, read_chains};
