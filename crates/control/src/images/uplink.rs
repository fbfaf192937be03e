//! A build's connection to the network: a slot of the engine's with the policy of the image.

use std::net::SocketAddr;

use async_trait::async_trait;
use hearth_build::{Connection, Uplink, UplinkError};
use hearth_machine::{Egress, Outlet};

/// Connects one build. Until the build restricts it, it lets out what the host routes: the managed base image is the server's matter.
#[derive(Debug)]
pub struct BuildUplink {
    outlet: Box<dyn Outlet>,
    egress: Egress,
}

impl BuildUplink {
    /// `egress` is what the image may reach.
    pub fn new(outlet: Box<dyn Outlet>, egress: Egress) -> Self {
        Self { outlet, egress }
    }
}

#[async_trait]
impl Uplink for BuildUplink {
    fn connection(&self) -> Connection {
        let network = self.outlet.network();
        Connection { nameservers: network.nameservers, mtu: network.mtu }
    }

    async fn connect(&mut self, pid: u32) -> Result<(), UplinkError> {
        self.outlet.plug(pid).await.map_err(|error| UplinkError(Box::new(error)))
    }

    async fn share(&mut self, address: SocketAddr) -> Result<(), UplinkError> {
        self.outlet.share(address).await.map_err(|error| UplinkError(Box::new(error)))
    }

    async fn restrict(&mut self) -> Result<(), UplinkError> {
        self.outlet.restrict(&self.egress).await.map_err(|error| UplinkError(Box::new(error)))
    }
}
