//! A slot without a machine: what connects an image build, which runs in namespaces of its own.

use std::{io, net::SocketAddr, os::fd::OwnedFd};

use async_trait::async_trait;
use hearth_guest_protocol::Network;
use tokio_util::task::AbortOnDropHandle;

use super::{Egress, NetworkError, Slot, io_error, relay};
use crate::engine::Outlet;

/// A slot as an outlet.
#[derive(Debug)]
pub struct SlotOutlet {
    slot: Slot,
    plugged: Option<OwnedFd>,
    shared: Vec<AbortOnDropHandle<()>>,
}

impl SlotOutlet {
    pub(super) fn new(slot: Slot) -> Self {
        Self { slot, plugged: None, shared: Vec::new() }
    }
}

#[async_trait]
impl Outlet for SlotOutlet {
    fn network(&self) -> Network {
        self.slot.network()
    }

    async fn plug(&mut self, pid: u32) -> Result<(), NetworkError> {
        self.shared.clear();
        self.plugged = Some(self.slot.plug(pid).await?);
        Ok(())
    }

    async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError> {
        let unplugged = || io_error("sharing an address of the host")(io::ErrorKind::NotConnected.into());
        let listener = relay::listen(self.plugged.as_ref().ok_or_else(unplugged)?, address).await?;
        self.shared.push(relay::start(listener, address));
        Ok(())
    }

    async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError> {
        self.slot.restrict(egress).await
    }
}
