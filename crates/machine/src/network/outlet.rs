//! A slot without a machine: what connects an image build, which runs in namespaces of its own.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::Arc,
};

use async_trait::async_trait;
use hearth_guest_protocol::Network;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::{Egress, NetworkError, Slot, io_error, slot::Surroundings, tools::in_namespace};
use crate::engine::Outlet;

/// Most connections at once to one shared address.
const MOST_SHARED: usize = 64;

/// A slot as an outlet.
#[derive(Debug)]
pub struct SlotOutlet {
    slot: Slot,
    around: Arc<Surroundings>,
    plugged: Option<OwnedFd>,
    shared: Vec<AbortOnDropHandle<()>>,
}

impl SlotOutlet {
    pub(super) fn new(slot: Slot, around: Arc<Surroundings>) -> Self {
        Self { slot, around, plugged: None, shared: Vec::new() }
    }
}

#[async_trait]
impl Outlet for SlotOutlet {
    fn network(&self) -> Network {
        self.slot.network()
    }

    async fn plug(&mut self, pid: u32) -> Result<(), NetworkError> {
        self.plugged = Some(self.slot.plug(pid).await?);
        Ok(())
    }

    async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError> {
        let what = "sharing an address of the host";
        let plugged = self.plugged.as_ref().ok_or_else(|| io_error(what)(std::io::ErrorKind::NotConnected.into()))?;
        let listener = in_namespace(plugged, what, move || {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = tokio::net::TcpListener::from_std(listener.await?).map_err(io_error(what))?;
        self.shared.push(AbortOnDropHandle::new(tokio::spawn(relay(listener, address))));
        Ok(())
    }

    async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError> {
        self.slot.restrict(egress, &self.around).await
    }
}

/// Takes each connection to the host's address.
async fn relay(listener: tokio::net::TcpListener, address: SocketAddr) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        let Ok((mut inner, _)) = accepted else { continue };
        if connections.len() >= MOST_SHARED {
            tracing::warn!(%address, "a build has {MOST_SHARED} connections to a shared address; one more is refused");
            continue;
        }
        connections.spawn(async move {
            if let Ok(mut outer) = TcpStream::connect(address).await {
                // Each side sees how the other one ended.
                let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
            }
        });
    }
}
