//! Copies bytes both ways between a client and an application that have switched protocols, until both are done or the server stops.

use std::{io, sync::Arc, time::Duration};

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{app::App, proxy::Peer};

/// How long a client may take to accept our last bytes.
const FAREWELL: Duration = Duration::from_secs(1);

/// Both ends, once their answers have been written, and what keeps the guest's going until then.
pub(crate) struct Tunnel {
    pub(crate) client: OnUpgrade,
    pub(crate) guest: OnUpgrade,
    pub(crate) app: App,
    /// What the client's connection holds, as long as any of it lives.
    pub(crate) peer: Arc<Peer>,
}

impl Tunnel {
    /// Runs until both directions have ended, one broke, or `cut`.
    pub(crate) async fn run(self, cut: CancellationToken) {
        let Self { client, guest, app, peer: _peer } = self;
        let ends = tokio::select! {
            ends = async { tokio::try_join!(client, guest) } => ends,
            () = cut.cancelled() => return,
        };
        drop(app);
        let (client, guest) = match ends {
            Ok(ends) => ends,
            Err(error) => return debug!(%error, "the switch of protocols was not completed"),
        };
        let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
        tokio::select! {
            copied = copy_bidirectional(&mut client, &mut guest) => log(copied),
            () = cut.cancelled() => debug!("the tunnel was cut: the server stops"),
        }
        farewell(client).await;
    }
}

/// Ends the client's side in order even where the guest's broke: TLS tells an end from an accident.
async fn farewell(mut client: TokioIo<Upgraded>) {
    // A client that is gone already is no news.
    let _ = timeout(FAREWELL, client.shutdown()).await;
}

fn log(copied: io::Result<(u64, u64)>) {
    match copied {
        Ok((from_client, from_guest)) => debug!(from_client, from_guest, "the tunnel ended"),
        Err(error) => debug!(%error, "the tunnel broke"),
    }
}
