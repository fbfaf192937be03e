//! What connects a build to the world. The network belongs to another crate; a build says only when it needs what.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
};

use async_trait::async_trait;

/// A build's connection to the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Resolvers that the build asks, in order; none if no name is answered.
    pub nameservers: Vec<Ipv4Addr>,
    /// Largest packet, in bytes.
    pub mtu: u16,
}

/// The network could not be connected.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UplinkError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Connects one build.
#[async_trait]
pub trait Uplink: fmt::Debug + Send + Sync {
    /// What the build will be told of its network.
    fn connection(&self) -> Connection;

    /// Connects the network namespace of a process. The namespace's `eth0` reaches what the host routes, but nothing of the host.
    async fn connect(&mut self, pid: u32) -> Result<(), UplinkError>;

    /// Makes an address of the host's loopback the same address in the connected namespace, for as long as the uplink lives.
    async fn share(&mut self, address: SocketAddr) -> Result<(), UplinkError>;

    /// From now on the build reaches what its image may reach, and nothing else.
    async fn restrict(&mut self) -> Result<(), UplinkError>;
}
