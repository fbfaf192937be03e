//! `GET /hearth/v1/microvms/<id>/ports/<port>` with `Upgrade: tcp`: bytes to and from a port of a MicroVM past the endpoint proxy, without
//! token or TLS. On the administrator's socket only; the bench compares the proxy with it.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hearth_control::{
    plane::{Activity, Admission, ControlPlane, DataPlane},
    token::TokenKind,
    types::Caller,
};
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

const PROTOCOL: &str = "tcp";

/// What the route works with.
#[derive(Clone)]
pub struct Ports {
    /// Knows whose MicroVM it is.
    pub control: Arc<dyn ControlPlane>,
    pub data: Arc<dyn DataPlane>,
    /// Whose MicroVMs these are.
    pub caller: Caller,
    /// The server stops: connections end.
    pub stop: CancellationToken,
}

/// The route.
pub fn router(ports: Ports) -> Router {
    Router::new().route("/hearth/v1/microvms/{id}/ports/{port}", get(connect)).with_state(ports)
}

async fn connect(State(ports): State<Ports>, Path((id, port)): Path<(String, u16)>, request: Request) -> Response {
    let asked =
        request.headers().get(header::UPGRADE).is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()));
    if !asked {
        return refusal(StatusCode::UPGRADE_REQUIRED, "ask with `Connection: upgrade` and `Upgrade: tcp`");
    }
    if let Err(error) = ports.control.get_microvm(&ports.caller, &id).await {
        return refusal(StatusCode::NOT_FOUND, &error.to_string());
    }
    let admission = Admission { microvm_id: id, kind: TokenKind::Http, port, memory_mib: 0, activity: Arc::new(Activity::default()) };
    let mut guest = match ports.data.connect(&admission).await {
        Ok(guest) => guest,
        Err(error) => return refusal(StatusCode::BAD_GATEWAY, &error.to_string()),
    };
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
        let mut client = TokioIo::new(upgraded);
        tokio::select! {
            // Whichever side broke off has noticed.
            _ended = tokio::io::copy_bidirectional(&mut client, &mut guest) => {}
            () = ports.stop.cancelled() => {}
        }
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(header::CONNECTION, "upgrade"), (header::UPGRADE, PROTOCOL)]).into_response()
}

fn refusal(status: StatusCode, message: &str) -> Response {
    (status, Json(serde_json::json!({"message": message}))).into_response()
}
