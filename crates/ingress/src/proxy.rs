//! The way of one request: authenticate, hold while the MicroVM wakes, route to the port, pass both bodies on.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use hearth_control::{
    plane::{Admission, DataPlane, Refusal},
    token::TokenKind,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, uri::PathAndQuery};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, client::conn::http1, upgrade};
use hyper_util::rt::TokioIo;
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tracing::{Instrument, Span, debug, debug_span, field};
use uuid::Uuid;

use crate::{
    body::{Download, Upload},
    credentials::{Credentials, Offer},
    error::RequestError,
    headers, host,
    linger::StillSending,
    meter::Metered,
    tunnel::Tunnel,
    upgrade as websocket,
};

pub(crate) type ResponseBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// What all requests share.
pub(crate) struct Proxy {
    pub(crate) plane: Arc<dyn DataPlane>,
    /// Tunnels, which outlive their requests.
    pub(crate) tasks: TaskTracker,
    /// Ends what has not ended by itself when the server stops.
    pub(crate) cut: CancellationToken,
}

/// The connection that a request came by.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// The name that the TLS client asked for.
    pub(crate) server_name: Option<String>,
    pub(crate) sending: StillSending,
}

impl Proxy {
    /// Answers a request, with the application's answer or with our own.
    pub(crate) async fn handle(self: Arc<Self>, peer: Peer, request: Request<Incoming>) -> Response<ResponseBody> {
        let id = Uuid::new_v4();
        let started = Instant::now();
        let span = debug_span!("request", %id, method = %request.method(), vm = field::Empty, port = field::Empty);
        let outcome = self.forward(id, &peer, request).instrument(span.clone()).await;
        let _entered = span.enter();
        let mut response = match outcome {
            Ok(response) => {
                debug!(status = response.status().as_u16(), duration = ?started.elapsed(), "answered");
                response
            }
            Err(error) => {
                let response = error.answer();
                let cause = std::error::Error::source(&error).map(field::display);
                debug!(status = response.status().as_u16(), duration = ?started.elapsed(), side = %error.side(), %error, cause, "failed");
                response.map(|body| body.map_err(|never| match never {}).boxed_unsync())
            }
        };
        headers::identify(response.headers_mut(), id);
        response
    }

    async fn forward(&self, id: Uuid, peer: &Peer, mut request: Request<Incoming>) -> Result<Response<ResponseBody>, RequestError> {
        let is_websocket = websocket::is_websocket(&request);
        let offer = match is_websocket {
            Ok(true) => Offer::take(request.headers_mut()),
            _ => Offer::default(),
        };
        let client_upgrade = upgrade::on(&mut request);
        let mut request = request.map(|body| Upload::new(body, peer.sending.clone()));

        if request.method() == Method::CONNECT {
            return Err(RequestError::MethodNotAllowed);
        }
        let endpoint = host::endpoint(&request, peer.server_name.as_deref())?;
        let admission = self.authenticate(&endpoint, &request, &offer)?;
        let is_websocket = is_websocket?;
        if admission.kind == TokenKind::Shell {
            return Err(RequestError::ShellToken);
        }

        let mut guest = self.connect(&admission).await?;
        prepare(&mut request, &endpoint, id, is_websocket);
        let mut response = guest.send(request).await?;

        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            if !is_websocket {
                return Err(RequestError::UnaskedUpgrade);
            }
            let guest_upgrade = upgrade::on(&mut response);
            let mut response = response.map(|_| ResponseBody::default());
            tidy(&mut response, id);
            websocket::set(response.headers_mut());
            if offer.marker {
                websocket::select_subprotocol(response.headers_mut());
            }
            let tunnel = Tunnel { client: client_upgrade, guest: guest_upgrade, connection: guest.connection };
            self.tasks.spawn(tunnel.run(self.cut.clone()).in_current_span());
            return Ok(response);
        }
        tidy(&mut response, id);
        Ok(response.map(|body| Download::new(body, guest.connection).boxed_unsync()))
    }

    fn authenticate<B>(&self, endpoint: &str, request: &Request<B>, offer: &Offer) -> Result<Admission, RequestError> {
        let credentials = Credentials::read(request.headers(), offer)?;
        let token = credentials.token.ok_or(Refusal::MissingAuthentication)?;
        let admission = self.plane.admit(endpoint, &token, credentials.port)?;
        Span::current().record("vm", field::display(&admission.microvm_id)).record("port", admission.port);
        Ok(admission)
    }

    /// Holds the request until the MicroVM is awake. Dropped when the client leaves meanwhile.
    async fn connect(&self, admission: &Admission) -> Result<Guest, RequestError> {
        let stream = self.plane.connect(admission).await?;
        let stream = Metered::new(stream, admission.activity.clone());
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(RequestError::NoAnswer)?;
        let connection = async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%error, "the connection to the guest ended");
            }
        };
        Ok(Guest { sender, connection: AbortOnDropHandle::new(tokio::spawn(connection.in_current_span())) })
    }
}

/// A connection to the application. It carries one request: over the channel a new one costs no round trip, and one that was kept
/// could die with a suspend just when it is needed.
struct Guest {
    sender: http1::SendRequest<Upload>,
    connection: AbortOnDropHandle<()>,
}

impl Guest {
    async fn send(&mut self, request: Request<Upload>) -> Result<Response<Incoming>, RequestError> {
        self.sender.send_request(request).await.map_err(|error| {
            // hyper calls what the request's body does the user's doing, and we pass the client's on.
            if error.is_user() { RequestError::Upload(error) } else { RequestError::NoAnswer(error) }
        })
    }
}

/// Makes a client's request the application's.
fn prepare(request: &mut Request<Upload>, endpoint: &str, id: Uuid, is_websocket: bool) {
    *request.version_mut() = Version::HTTP_11;
    let named = request.uri().authority().map_or(endpoint, |authority| authority.as_str()).to_owned();
    if request.uri().authority().is_some() || !request.headers().contains_key(header::HOST) {
        let host = HeaderValue::try_from(named).expect("an authority is visible ASCII");
        request.headers_mut().insert(header::HOST, host);
    }
    // An absolute target is for proxies; the application gets the path.
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);

    headers::toward_guest(request.headers_mut(), id);
    if is_websocket {
        websocket::set(request.headers_mut());
    } else {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Makes an application's answer the client's.
fn tidy<B>(response: &mut Response<B>, id: Uuid) {
    // hyper fits it to what the client speaks.
    *response.version_mut() = Version::HTTP_11;
    headers::toward_client(response.headers_mut(), id);
}
