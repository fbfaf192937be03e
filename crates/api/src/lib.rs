//! The HTTP face of the AWS APIs: one listener serves Lambda MicroVMs, its network connectors, tags, CloudWatch Logs, and S3.
//!
//! A request is routed by its path (and S3 by the signature's scope), authenticated, checked against the service's model, handed to the
//! [`ControlPlane`], and answered in the wire shapes of SPEC sections 3 and 5.

#![forbid(unsafe_code)]

mod auth;
mod authorize;
mod connectors;
mod error;
mod logs;
mod model;
mod operations;
mod rules;
mod sigv4;
mod sts;
#[cfg(test)]
mod tests;

mod validate;
mod wire;

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{ConnectInfo, Request, State},
    response::Response,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::CONTENT_TYPE, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Service, ServiceExt};
use uuid::Uuid;

use hearth_control::{logs::LogStore, plane::ControlPlane};

use authorize::Decider;
use error::{ApiError, REQUEST_ID, json_response};
use model::{MODEL, NoRoute};
use sigv4::Claims;

pub use auth::Auth;
pub use sigv4::{Signing, sign};

/// Longest body of a request that is not for S3, in bytes.
const MAX_BODY: usize = 1 << 20;

/// What the API is told about the server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The regions that are served, each with resources of its own; calls signed for another one are refused. When there are none: whatever
    /// region callers sign for.
    pub regions: Vec<String>,
    /// Least `maxIdleDurationSeconds` that callers may ask for; 60 s on AWS.
    pub min_idle_seconds: u32,
}

impl Settings {
    fn serves(&self, region: &str) -> bool {
        self.regions.is_empty() || self.regions.iter().any(|served| served == region)
    }
}

/// All APIs of one listener. `objects` answers everything that is meant for S3 and authenticates it by itself.
pub fn service<S, B>(plane: Arc<dyn ControlPlane>, logs: Arc<LogStore>, objects: S, auth: Auth, settings: Settings) -> Router
where
    S: Service<Request, Response = http::Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    Router::new().fallback(answer::<S, B>).with_state(Api { plane, logs, objects, auth, settings: Arc::new(settings) })
}

#[derive(Clone)]
struct Api<S> {
    plane: Arc<dyn ControlPlane>,
    logs: Arc<LogStore>,
    objects: S,
    auth: Auth,
    settings: Arc<Settings>,
}

/// Whom a request is for.
#[derive(Debug, PartialEq, Eq)]
enum Destination {
    Lambda,
    Logs,
    Sts,
    Objects,
}

impl Destination {
    /// Paths tell the services with the signing name `lambda` apart; objects may have any path, so that the signature's scope tells them.
    fn of(method: &Method, path: &str, headers: &HeaderMap) -> Self {
        let scope = Claims::of(headers).map(|claims| claims.service);
        let starts = |header: &str, prefix: &str| {
            headers.get(header).and_then(|value| value.to_str().ok()).is_some_and(|value| value.starts_with(prefix))
        };
        match scope {
            Ok("s3") => Self::Objects,
            _ if starts("x-amz-target", logs::TARGET) => Self::Logs,
            _ if method == Method::POST && path == "/" && starts(CONTENT_TYPE.as_str(), "application/x-www-form-urlencoded") => Self::Sts,
            Ok(_) => Self::Lambda,
            Err(_) if ["/2025-09-09/", "/2026-04-04/", "/2017-03-31/"].iter().any(|prefix| path.starts_with(prefix)) => Self::Lambda,
            Err(_) => Self::Objects,
        }
    }
}

async fn answer<S, B>(State(api): State<Api<S>>, request: Request) -> Response
where
    S: Service<Request, Response = http::Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    let id = Uuid::new_v4().to_string();
    let mut response = match Destination::of(request.method(), request.uri().path(), request.headers()) {
        Destination::Objects => match api.objects.oneshot(request).await {
            Ok(response) => response.map(Body::new),
        },
        Destination::Lambda => call(&api, request).await.unwrap_or_else(|error| error.into_response(&id)),
        Destination::Logs => logs::answer(&api, request, &id).await,
        Destination::Sts => {
            let (parts, body) = request.into_parts();
            match read_body(body).await {
                Ok(body) => sts::answer(&api.auth, &parts, &body, &id),
                Err(_) => sts::unreadable(&id),
            }
        }
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
    }
    response
}

async fn call<S>(api: &Api<S>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(body).await?;
    let who = api.auth.identify(&parts, &body, "lambda")?;
    if !api.settings.serves(&who.caller.region) {
        return Err(ApiError::access_denied(None));
    }

    let Parts { method, uri, .. } = &parts;
    let (operation, labels) = MODEL.route(method.as_str(), uri.path()).map_err(|error| match error {
        NoRoute::Unknown => ApiError::unknown_operation(method.as_str(), uri.path()),
        NoRoute::Malformed => ApiError::malformed(),
    })?;
    let input = validate::input(operation, labels, uri.query().unwrap_or_default(), &body)?;
    validate::check(operation, &input, api.settings.min_idle_seconds)?;
    let decider = Decider { plane: api.plane.as_ref(), directory: api.auth.directory(), who: &who, source: source(&parts) };
    decider.decide(&operation.name, &input).await?;
    let output = operations::perform(api.plane.as_ref(), &who.caller, &operation.name, input).await?;
    let status = StatusCode::from_u16(operation.status).map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(json_response(status, &output))
}

/// Where a request came from, if it came over the network.
fn source(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip())
}

async fn read_body(body: Body) -> Result<Bytes, ApiError> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large(MAX_BODY)),
        // The client is gone or broke its framing.
        Err(_) => Err(ApiError::malformed()),
    }
}
