//! The way of one request: authenticate, hold while the MicroVM wakes, route to the port, pass both bodies on.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use hearth_control::{
    plane::{Admission, DataPlane, Refusal},
    token::TokenKind,
};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, upgrade};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span, debug, debug_span, field};
use uuid::Uuid;

use crate::{
    app::{App, AppTls, Speech, Version},
    body::{Download, Upload},
    credentials::{Credentials, Offer},
    error::RequestError,
    headers, host,
    linger::StillSending,
    meter::Metered,
    outbound, tcp,
    tunnel::Tunnel,
    upgrade::{self as websocket, Handshake},
};

pub(crate) type ResponseBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// What all requests share.
pub(crate) struct Proxy {
    pub(crate) plane: Arc<dyn DataPlane>,
    pub(crate) tls: AppTls,
    /// Tunnels, which outlive their requests.
    pub(crate) tasks: TaskTracker,
    /// Ends what has not ended by itself when the server stops.
    pub(crate) cut: CancellationToken,
}

/// The connection that a request came by.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The name that the TLS client asked for.
    server_name: Option<String>,
    sending: StillSending,
}

impl Peer {
    pub(crate) fn new(stream: &TlsStream<TcpStream>, sending: StillSending) -> Self {
        Self { server_name: stream.get_ref().1.server_name().map(str::to_owned), sending }
    }
}

impl Proxy {
    /// Answers a request, with the application's answer or with our own.
    pub(crate) async fn handle(self: Arc<Self>, peer: Arc<Peer>, request: Request<Incoming>) -> Response<ResponseBody> {
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

    async fn forward(&self, id: Uuid, peer: &Arc<Peer>, mut request: Request<Incoming>) -> Result<Response<ResponseBody>, RequestError> {
        let handshake = Handshake::of(&request);
        let offer = match handshake {
            Ok(Some(_)) => Offer::take(request.headers_mut()),
            _ => Offer::default(),
        };
        let client_upgrade = upgrade::on(&mut request);
        let mut request = request.map(|body| Upload::new(body, peer.sending.clone()));

        let endpoint = host::endpoint(&request, peer.server_name.as_deref())?;
        let admission = self.authenticate(&endpoint, &request, &offer)?;
        if admission.kind == TokenKind::Http && tcp::is_asked_for(&request) {
            return self.tcp(&admission, client_upgrade).await;
        }
        let handshake = handshake?;
        if admission.kind == TokenKind::Shell {
            let handshake = handshake.ok_or(RequestError::ShellToken)?;
            return self.shell(admission, request.headers(), handshake, &offer, client_upgrade).await;
        }

        let mut speech = Speech::asked(request.headers());
        if handshake.is_some() {
            speech.version = Version::Http1;
        }
        outbound::prepare(&mut request, &endpoint, speech, handshake, id);
        let mut app = self.connect(&admission, &endpoint, speech).await?;
        let mut response = app.send(request).await?;

        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(handshake) = handshake else { return Err(RequestError::UnaskedUpgrade) };
            let guest_upgrade = upgrade::on(&mut response);
            let mut response = response.map(|_| ResponseBody::default());
            outbound::tidy(&mut response, id);
            handshake.grant(&mut response);
            if offer.marker {
                websocket::select_subprotocol(response.headers_mut());
            }
            let tunnel = Tunnel { client: client_upgrade, guest: guest_upgrade, app, peer: peer.clone() };
            self.tasks.spawn(tunnel.run(self.cut.clone()).in_current_span());
            return Ok(response);
        }
        outbound::tidy(&mut response, id);
        Ok(response.map(|body| Download::new(body, app).boxed_unsync()))
    }

    fn authenticate<B>(&self, endpoint: &str, request: &Request<B>, offer: &Offer) -> Result<Admission, RequestError> {
        let credentials = Credentials::read(request.headers(), offer)?;
        let token = credentials.token.ok_or(Refusal::MissingAuthentication)?;
        let admission = self.plane.admit(endpoint, &token, credentials.port)?;
        Span::current().record("vm", field::display(&admission.microvm_id)).record("port", admission.port);
        Ok(admission)
    }

    /// Holds the request until the MicroVM is awake. Dropped when the client leaves meanwhile.
    async fn connect(&self, admission: &Admission, endpoint: &str, speech: Speech) -> Result<App, RequestError> {
        let stream = self.plane.connect(admission).await?;
        let stream = Metered::new(stream, admission.activity.clone());
        if speech.tls {
            App::begin(self.tls.begin(stream, endpoint, speech.version).await?, speech.version).await
        } else {
            App::begin(stream, speech.version).await
        }
    }
}
