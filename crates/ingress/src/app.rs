//! A connection to the application in a MicroVM: in HTTP/1.1 or HTTP/2, in plain text or inside TLS.
//!
//! It carries one request: over the channel a new one costs no round trip of a network, and one that was kept could die with a suspend just
//! when it is needed.

use std::{future::Future, io, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, Request, Response, header};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    rt::Executor,
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring::default_provider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{Instrument, debug};

use crate::{body::Upload, error::RequestError};

const FORCE_H2: HeaderName = HeaderName::from_static("x-aws-proxy-force-h2");
const FORCE_TLS: HeaderName = HeaderName::from_static("x-aws-proxy-force-tls");

/// What gRPC requests are marked with, maybe followed by `+` and the messages' format. gRPC-Web is another type, and HTTP/1.1 will do for it.
const GRPC: &str = "application/grpc";

/// How long the application's TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Window of the application's answer in bytes, for its connection too, which carries nothing else.
const WINDOW: u32 = 1 << 20;

/// The largest head of an HTTP/2 answer, in bytes.
const MAX_HEADER_BYTES: u32 = 64 * 1024;

/// HTTP's version between the proxy and the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// What a request says about how the application is to be spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Speech {
    pub(crate) version: Version,
    pub(crate) tls: bool,
}

impl Speech {
    /// HTTP/1.1 in plain text, unless headers ask for something else (SPEC 10.1). gRPC needs HTTP/2, so its requests need not ask.
    pub(crate) fn asked(headers: &HeaderMap) -> Self {
        let flag = |name: &HeaderName| headers.get(name).map(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
        let http2 = flag(&FORCE_H2).unwrap_or_else(|| is_grpc(headers));
        Self { version: if http2 { Version::Http2 } else { Version::Http1 }, tls: flag(&FORCE_TLS).unwrap_or(false) }
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let kind = kind.to_ascii_lowercase();
    kind.strip_prefix(GRPC).is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';', ' ']))
}

/// A connection that is ready for its request. Dropping it drops the stream.
pub(crate) struct App {
    sender: Sender,
    _tasks: DropGuard,
}

enum Sender {
    Http1(http1::SendRequest<Upload>),
    Http2(http2::SendRequest<Upload>),
}

impl App {
    /// Begins to speak HTTP on a stream. Waits for nothing: the request's bytes may be the first.
    pub(crate) async fn begin(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        version: Version,
    ) -> Result<Self, RequestError> {
        let tasks = Tasks(CancellationToken::new());
        let guard = tasks.0.clone().drop_guard();
        let stream = TokioIo::new(stream);
        let sender = match version {
            Version::Http1 => {
                let (sender, connection) = http1::handshake(stream).await.map_err(RequestError::NoAnswer)?;
                tasks.execute(ended(connection.with_upgrades()));
                Sender::Http1(sender)
            }
            Version::Http2 => {
                let (sender, connection) = http2::Builder::new(tasks.clone())
                    .initial_stream_window_size(WINDOW)
                    .initial_connection_window_size(WINDOW)
                    .max_header_list_size(MAX_HEADER_BYTES)
                    .handshake(stream)
                    .await
                    .map_err(RequestError::NoAnswer)?;
                tasks.execute(ended(connection));
                Sender::Http2(sender)
            }
        };
        Ok(Self { sender, _tasks: guard })
    }

    pub(crate) async fn send(&mut self, request: Request<Upload>) -> Result<Response<Incoming>, RequestError> {
        let sent = match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        };
        sent.map_err(|error| {
            // hyper calls what the request's body does the user's doing, and we pass the client's on.
            if error.is_user() { RequestError::Upload(error) } else { RequestError::NoAnswer(error) }
        })
    }
}

async fn ended(connection: impl Future<Output = hyper::Result<()>>) {
    if let Err(error) = connection.await {
        debug!(%error, "the connection to the application ended");
    }
}

/// Runs a connection's futures until it is dropped.
#[derive(Clone)]
struct Tasks(CancellationToken);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, future: F) {
        let cut = self.0.clone();
        tokio::spawn(async move { cut.run_until_cancelled_owned(future).await }.in_current_span());
    }
}

/// TLS towards applications.
pub(crate) struct AppTls {
    http1: TlsConnector,
    http2: TlsConnector,
}

impl AppTls {
    pub(crate) fn new() -> Self {
        let connector = |protocol: &[u8]| {
            let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
                .with_safe_default_protocol_versions()
                .expect("ring has what both versions of TLS need")
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate))
                .with_no_client_auth();
            config.alpn_protocols = vec![protocol.to_vec()];
            // A connection may end in another life of the application than it began.
            config.resumption = Resumption::disabled();
            TlsConnector::from(Arc::new(config))
        };
        Self { http1: connector(b"http/1.1"), http2: connector(b"h2") }
    }

    /// Begins TLS on a stream to an application.
    pub(crate) async fn begin<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        endpoint: &str,
        version: Version,
    ) -> Result<TlsStream<S>, RequestError> {
        let connector = match version {
            Version::Http1 => &self.http1,
            Version::Http2 => &self.http2,
        };
        let name = ServerName::try_from(endpoint.to_owned()).map_err(|_| RequestError::InvalidHost)?;
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no TLS handshake within {} s", HANDSHAKE.as_secs()));
        let connected = timeout(HANDSHAKE, connector.connect(name, stream)).await.map_err(late).flatten();
        connected.map_err(RequestError::NoTls)
    }
}

/// Takes every certificate: the channel ends inside the MicroVM, and nobody is between it and the application.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&'static str, &'static str)]) -> (bool, bool) {
        let headers = pairs.iter().map(|&(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect();
        let speech = Speech::asked(&headers);
        (speech.version == Version::Http2, speech.tls)
    }

    #[test]
    fn headers_say_how_the_application_is_spoken_to() {
        assert_eq!(asked(&[]), (false, false));
        assert_eq!(asked(&[("x-aws-proxy-force-h2", "True")]), (true, false));
        assert_eq!(asked(&[("x-aws-proxy-force-h2", "1"), ("x-aws-proxy-force-tls", "yes")]), (false, false));
        assert_eq!(asked(&[("x-aws-proxy-force-tls", "true")]), (false, true));
    }

    #[test]
    fn grpc_means_http2_unless_it_is_told_otherwise() {
        for kind in ["application/grpc", "application/grpc+proto", "Application/gRPC; a=b"] {
            assert_eq!(asked(&[("content-type", kind)]), (true, false), "{kind}");
        }
        for kind in ["application/grpc-web", "application/grpc-web+proto", "application/grpcx", "application/json"] {
            assert_eq!(asked(&[("content-type", kind)]), (false, false), "{kind}");
        }
        assert_eq!(asked(&[("content-type", "application/grpc"), ("x-aws-proxy-force-h2", "false")]), (false, false));
    }
}
