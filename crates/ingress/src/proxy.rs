//! The way of one request: authenticate, hold while the MicroVM wakes, route to the port, pass both bodies on.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use hearth_control::{
    plane::{Admission, DataPlane, Refusal},
    token::TokenKind,
};
use http::{Request, Response, StatusCode};
use http_body::Body;
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
    exchange::Exchange,
    headers, host,
    limits::{Limiter, Pace, Slots},
    linger::Unwanted,
    meter::Metered,
    outbound,
    ports::{Ports, hints_at_tls},
    tcp,
    tunnel::Tunnel,
    upgrade::{self as websocket, Handshake},
};

pub(crate) type ResponseBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// What all requests share.
pub(crate) struct Proxy {
    pub(crate) plane: Arc<dyn DataPlane>,
    pub(crate) tls: AppTls,
    pub(crate) ports: Ports,
    pub(crate) limiter: Limiter,
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
    /// Takes what the client sends for nothing.
    unwanted: Unwanted,
    /// Freed with the connection and whatever became of it.
    slots: Slots,
}

impl Peer {
    pub(crate) fn new(stream: &TlsStream<TcpStream>, unwanted: Unwanted) -> Self {
        Self { server_name: stream.get_ref().1.server_name().map(str::to_owned), unwanted, slots: Slots::default() }
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
        let mut request = request.map(|body| Upload::new(body, peer.unwanted.clone()));

        let endpoint = host::endpoint(&request, peer.server_name.as_deref())?;
        let admission = self.authenticate(&endpoint, &request, &offer)?;
        let pace = self.limiter.admit(&admission, &peer.slots)?;
        if admission.kind == TokenKind::Http && tcp::is_asked_for(&request) {
            return self.tcp(&admission, peer, pace, client_upgrade).await;
        }
        let handshake = handshake?;
        if admission.kind == TokenKind::Shell {
            let handshake = handshake.ok_or(RequestError::ShellToken)?;
            return self.shell(admission, peer, request.headers(), handshake, &offer, client_upgrade).await;
        }

        let mut speech = Speech::asked(request.headers());
        if handshake.is_some() {
            speech.version = Version::Http1;
        }
        outbound::prepare(&mut request, &endpoint, speech, handshake, id);
        let route = Route { admission: &admission, endpoint: &endpoint, pace, tunnel: handshake.is_some() };
        let (app, mut response) = self.exchange(&route, speech, request).await?;

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

    /// Has the application answer, in TLS if that is what it turns out to speak.
    async fn exchange(
        &self,
        route: &Route<'_>,
        asked: Speech,
        request: Request<Upload>,
    ) -> Result<(App, Response<Incoming>), RequestError> {
        let tls = asked.tls || self.ports.speaks_tls(route.admission);
        let speech = Speech { tls, ..asked };
        let unknown = !tls && self.ports.is_unknown(route.admission);
        let spare = (unknown && request.body().is_end_stream()).then(|| outbound::again(&request));
        let mut app = self.connect(route, speech).await?;
        let answer = app.send(request).await;
        let status = answer.as_ref().map(Response::status);
        if unknown && hints_at_tls(status) {
            // Nobody has read the request who understood it, so it may be sent again; but what was in its body is gone.
            if let Ok(mut app) = self.connect(route, Speech { tls: true, ..speech }).await
                && let Some(spare) = spare
            {
                return app.send(spare).await.map(|response| (app, response));
            }
        }
        if !tls && !self.ports.speaks_tls(route.admission) {
            self.ports.answered(route.admission, status);
        }
        answer.map(|response| (app, response))
    }

    /// Holds the request until the MicroVM is awake. Dropped when the client leaves meanwhile.
    async fn connect(&self, route: &Route<'_>, speech: Speech) -> Result<App, RequestError> {
        let stream = self.plane.connect(route.admission).await?;
        let stream = Exchange::new(Metered::new(stream, route.admission.activity.clone(), route.pace.clone()), route.tunnel);
        if !speech.tls {
            return App::begin(stream, speech.version).await;
        }
        let stream = self.tls.begin(stream, route.endpoint, speech.version).await;
        self.ports.tried(route.admission, stream.is_ok());
        App::begin(stream?, speech.version).await
    }
}

/// Where a request goes.
struct Route<'a> {
    admission: &'a Admission,
    endpoint: &'a str,
    pace: Option<Pace>,
    /// The request asks for one.
    tunnel: bool,
}
