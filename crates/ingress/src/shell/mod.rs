//! What a shell's token opens: WebSockets that end at processes and files of the MicroVM instead of at the application (SPEC 11).
//!
//! | subprotocol offered | what it is | module |
//! |---|---|---|
//! | `lambda-microvms` alone | the service's shell: a root terminal, no exit code | [`process`] |
//! | `hearth.exec.v1` | any process, with exit code and separate outputs | [`process`] |
//! | `hearth.copy.v1` | files, as a tar stream | [`copy`] |
//!
//! The `hearth.` ones are extensions; `docs/shell-protocols.md` describes them.

mod copy;
mod process;
mod socket;

use std::sync::Arc;

use hearth_control::plane::{Admission, DataPlane};
use hearth_guest_protocol::{Exec, TerminalSize, WireError};
use hearth_machine::Target;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::{self, handshake::derive_accept_key};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug};

use crate::{
    credentials::{MARKER, Offer},
    error::RequestError,
    headers::items,
    meter::Metered,
    proxy::{Peer, Proxy, ResponseBody},
    upgrade::Handshake,
};
use socket::{Farewell, Socket};

const EXEC: &str = "hearth.exec.v1";
const COPY: &str = "hearth.copy.v1";

/// What is under a WebSocket's messages: a stream to the guest that counts as activity.
type GuestIo = Metered<Box<dyn hearth_machine::GuestStream>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Shell,
    Exec,
    Copy,
}

impl Protocol {
    /// The first that is ours among those offered.
    fn offered(headers: &HeaderMap) -> Self {
        let ours = |item: &str| match item {
            EXEC => Some(Self::Exec),
            COPY => Some(Self::Copy),
            _ => None,
        };
        items(headers, &header::SEC_WEBSOCKET_PROTOCOL).find_map(ours).unwrap_or(Self::Shell)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shell => MARKER,
            Self::Exec => EXEC,
            Self::Copy => COPY,
        }
    }
}

/// Opens streams for one admitted client.
struct Opener {
    plane: Arc<dyn DataPlane>,
    admission: Admission,
}

impl Opener {
    async fn open(&self, target: &Target) -> Result<GuestIo, RequestError> {
        let stream = self.plane.open(&self.admission, target).await?;
        Ok(Metered::new(stream, self.admission.activity.clone(), None))
    }
}

/// Why one direction of a session stopped.
enum Stopped {
    Client,
    Guest,
    Ended(Farewell),
}

impl From<WireError> for Stopped {
    fn from(_: WireError) -> Self {
        Self::Guest
    }
}

impl From<tungstenite::Error> for Stopped {
    fn from(_: tungstenite::Error) -> Self {
        Self::Client
    }
}

/// How a session ends of which one direction has stopped.
fn farewell(stopped: Result<(), Stopped>) -> Farewell {
    match stopped {
        Err(Stopped::Guest) => Farewell::guest_gone(),
        Err(Stopped::Ended(farewell)) => farewell,
        Ok(()) | Err(Stopped::Client) => Farewell::client_left(),
    }
}

impl Proxy {
    /// Answers the handshake of a client with a shell's token. A shell is there before the handshake is answered: until then the client is
    /// held as every request is, and hears in HTTP what went wrong.
    pub(crate) async fn shell(
        &self,
        admission: Admission,
        peer: &Arc<Peer>,
        asked: &HeaderMap,
        handshake: Handshake,
        offer: &Offer,
        client: OnUpgrade,
    ) -> Result<Response<ResponseBody>, RequestError> {
        let protocol = Protocol::offered(asked);
        let opener = Opener { plane: self.plane.clone(), admission };
        let shell = match protocol {
            Protocol::Shell => Some(opener.open(&Target::Process(root_shell())).await?),
            Protocol::Exec | Protocol::Copy => None,
        };
        let session = serve(protocol, opener, shell, client, self.cut.clone());
        let peer = peer.clone();
        let session = async move {
            session.await;
            // The connection counts for its MicroVM as long as the session lives.
            drop(peer);
        };
        self.tasks.spawn(session.in_current_span());

        let mut response = Response::new(ResponseBody::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        if let Some(key) = asked.get(header::SEC_WEBSOCKET_KEY) {
            let accept = derive_accept_key(key.as_bytes());
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(accept).expect("base64 is visible ASCII"));
        }
        if protocol != Protocol::Shell || offer.marker {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol.name()));
        }
        handshake.grant(&mut response);
        Ok(response)
    }
}

/// As the service starts it: root's, on a terminal without a size yet.
fn root_shell() -> Exec {
    let terminal = Some(TerminalSize { columns: 0, rows: 0 });
    Exec { argv: Vec::new(), env: Vec::new(), cwd: None, user: Some("0".to_owned()), terminal }
}

async fn serve(protocol: Protocol, opener: Opener, shell: Option<GuestIo>, client: OnUpgrade, cut: CancellationToken) {
    let client = tokio::select! {
        client = client => client,
        () = cut.cancelled() => return,
    };
    let mut socket = match client {
        Ok(client) => Socket::new(client).await,
        Err(error) => return debug!(%error, "the switch to a shell was not completed"),
    };
    let farewell = tokio::select! {
        farewell = async {
            match (protocol, shell) {
                (Protocol::Copy, _) => copy::run(&mut socket, &opener).await,
                (_, Some(shell)) => process::shell(&mut socket, shell).await,
                (_, None) => process::exec(&mut socket, &opener).await,
            }
        } => farewell,
        () = cut.cancelled() => Farewell::going_away("the server stops"),
    };
    debug!(code = farewell.code, reason = %farewell.reason, "the session ended");
    socket.close(farewell).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_ours_or_the_service_s() {
        let offered = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value));
            Protocol::offered(&headers)
        };
        assert_eq!(Protocol::offered(&HeaderMap::new()), Protocol::Shell);
        assert_eq!(offered("something.else"), Protocol::Shell);
        assert_eq!(offered("something.else, hearth.exec.v1"), Protocol::Exec);
        assert_eq!(offered("hearth.copy.v1"), Protocol::Copy);
    }
}
