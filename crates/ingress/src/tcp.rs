//! Raw TCP to a port of the MicroVM, an extension for `hearth forward`: an HTTP/1.1 request with `Upgrade: hearth-tcp` and a token for the
//! port. After `101 Switching Protocols` the bytes are the connection's, and each direction ends on its own.

use std::sync::Arc;

use hearth_control::plane::Admission;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tracing::{Instrument, debug};

use crate::{
    error::RequestError,
    headers::lists,
    limits::Pace,
    meter::Metered,
    proxy::{Peer, Proxy, ResponseBody},
};

const PROTOCOL: &str = "hearth-tcp";

/// Whether a request asks for raw TCP.
pub(crate) fn is_asked_for<B>(request: &Request<B>) -> bool {
    lists(request.headers(), &header::CONNECTION, "upgrade") && lists(request.headers(), &header::UPGRADE, PROTOCOL)
}

impl Proxy {
    /// Connects, then switches.
    pub(crate) async fn tcp(
        &self,
        admission: &Admission,
        peer: &Arc<Peer>,
        pace: Option<Pace>,
        client: OnUpgrade,
    ) -> Result<Response<ResponseBody>, RequestError> {
        let mut guest = Metered::new(self.plane.connect(admission).await?, admission.activity.clone(), pace);
        let peer = peer.clone();
        let cut = self.cut.clone();
        let tunnel = async move {
            // The connection counts for its MicroVM as long as this lives.
            let _peer = peer;
            let copied = async {
                let mut client = TokioIo::new(client.await.map_err(std::io::Error::other)?);
                copy_bidirectional(&mut client, &mut guest).await
            };
            match cut.run_until_cancelled(copied).await {
                Some(Ok((from_client, from_guest))) => debug!(from_client, from_guest, "the connection ended"),
                Some(Err(error)) => debug!(%error, "the connection broke"),
                None => debug!("the connection was cut: the server stops"),
            }
        };
        self.tasks.spawn(tunnel.in_current_span());

        let mut response = Response::new(ResponseBody::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
        Ok(response)
    }
}
