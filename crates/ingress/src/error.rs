//! What can become of a request other than the application's answer: whose doing it was, and what the client is told (SPEC 10.3).

use std::{fmt, io};

use bytes::Bytes;
use hearth_control::plane::{ConnectError, Refusal};
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

use crate::limits::Exceeded;

/// After this many seconds a client whose MicroVM did not wake may try again.
const RETRY_AFTER_SECONDS: u16 = 5;

/// Whose doing an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the client sent, or that it left.
    Client,
    /// The MicroVM or the application in it.
    Guest,
    /// This server.
    Us,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Guest => "guest",
            Self::Us => "us",
        })
    }
}

/// Why a request was not answered by the application.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// no leave to talk to this port
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// the port header or subprotocol is malformed
    #[error("Invalid x-aws-proxy-port: expected a port from 1 to 65535")]
    InvalidPort,
    /// the request names several hosts
    #[error("Invalid host: expected one host name")]
    InvalidHost,
    /// the request names another host than the TLS client did
    #[error("This connection is for another host")]
    Misdirected,
    /// an upgrade that is no WebSocket handshake
    #[error("Invalid upgrade: expected a WebSocket handshake")]
    InvalidUpgrade,
    /// a shell's token, but no shell protocol
    #[error("a shell's token opens no port")]
    ShellToken,
    /// the MicroVM's endpoint is used as much as it may be
    #[error(transparent)]
    RateLimited(#[from] Exceeded),
    /// CONNECT
    #[error("Method not allowed")]
    MethodNotAllowed,
    /// the request's body ended early or is malformed
    #[error("Incomplete request body")]
    Upload(#[source] hyper::Error),
    /// the MicroVM's port cannot be reached
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// the application took the connection but did not answer in HTTP
    #[error("the application did not answer the request")]
    NoAnswer(#[source] hyper::Error),
    /// the application does not speak TLS, or not the version of HTTP that is needed
    #[error("the application did not complete the TLS handshake")]
    NoTls(#[source] io::Error),
    /// the application switched protocols without being asked to
    #[error("the application switched protocols without being asked to")]
    UnaskedUpgrade,
}

impl RequestError {
    pub(crate) fn side(&self) -> Side {
        match self {
            Self::Refused(_)
            | Self::InvalidPort
            | Self::InvalidHost
            | Self::Misdirected
            | Self::InvalidUpgrade
            | Self::ShellToken
            | Self::RateLimited(_)
            | Self::MethodNotAllowed
            | Self::Upload(_) => Side::Client,
            Self::Connect(ConnectError::TooSlow(_) | ConnectError::NotWoken(_)) => Side::Us,
            Self::Connect(ConnectError::Unreachable(_)) | Self::NoAnswer(_) | Self::NoTls(_) | Self::UnaskedUpgrade => Side::Guest,
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::InvalidPort | Self::InvalidHost | Self::InvalidUpgrade | Self::Upload(_) => StatusCode::BAD_REQUEST,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Connect(ConnectError::TooSlow(_) | ConnectError::NotWoken(_)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::ShellToken | Self::Connect(ConnectError::Unreachable(_)) | Self::NoAnswer(_) | Self::NoTls(_) | Self::UnaskedUpgrade => {
                StatusCode::BAD_GATEWAY
            }
        }
    }

    /// What the client gets. What is wrong inside a MicroVM is for the log only.
    pub(crate) fn answer(&self) -> Response<Full<Bytes>> {
        let status = self.status();
        let empty = status == StatusCode::BAD_GATEWAY;
        let mut response = Response::new(Full::from(if empty { String::new() } else { self.to_string() }));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
        if !empty {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS.into());
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
            }
            _ => {}
        }
        response
    }
}
