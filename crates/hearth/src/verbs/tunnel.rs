//! Connections to a MicroVM's endpoint that are no HTTP requests: WebSockets with a shell's token, and raw TCP with one for a port.

use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Empty;
use hyper::{client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest},
};

use super::{microvm, names};
use crate::{client::Client, connect::Connect};

/// Tokens for WebSockets are used at once.
const SHELL_MINUTES: u32 = 1;

/// The API's answer to a wish for a token: header by header.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Token {
    auth_token: std::collections::BTreeMap<String, String>,
}

/// Where a MicroVM's endpoint is, and how to get tokens for it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    client: Client,
    connect: Connect,
    /// The MicroVM's id.
    pub id: String,
    /// Host name.
    name: String,
}

/// An open WebSocket of one of the extensions (`docs/shell-protocols.md`).
pub struct Socket(WebSocketStream<TlsStream<TcpStream>>);

impl Endpoint {
    /// The endpoint of the MicroVM whose id begins with `prefix`.
    pub async fn find(client: Client, prefix: &str) -> anyhow::Result<Self> {
        let connect = Connect::read(client.dir())?;
        let microvm = microvm::find(&client, prefix).await?;
        Ok(Self { client, connect, id: microvm.microvm_id, name: microvm.endpoint })
    }

    /// Opens a WebSocket with a shell's token.
    pub async fn websocket(&self, protocol: &'static str) -> anyhow::Result<Socket> {
        let token = self.token("shell-auth-token", json!({"expirationInMinutes": SHELL_MINUTES})).await?;
        let mut request = format!("wss://{}/shell", self.name).into_client_request()?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        request.headers_mut().insert("x-aws-proxy-auth", token);
        match client_async(request, self.tls().await?).await {
            Ok((socket, _)) => Ok(Socket(socket)),
            Err(tungstenite::Error::Http(response)) => bail!("{}", refusal(&self.id, response.status())),
            Err(error) => Err(error).with_context(|| format!("opening a session with {}", self.id)),
        }
    }

    /// A token for a port.
    pub async fn port_token(&self, port: u16, minutes: u32) -> anyhow::Result<HeaderValue> {
        self.token("auth-token", json!({"expirationInMinutes": minutes, "allowedPorts": [{"port": port}]})).await
    }

    /// Connects to a port with a token for it; `None` if the token is not good, or no more.
    pub async fn tcp(&self, port: u16, token: HeaderValue) -> anyhow::Result<Option<TokioIo<Upgraded>>> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.tls().await?)).await.context("speaking to the endpoint")?;
        tokio::spawn(connection.with_upgrades());
        let request = Request::builder()
            .uri("/")
            .header(header::HOST, &self.name)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "hearth-tcp")
            .header("x-aws-proxy-auth", token)
            .header("x-aws-proxy-port", port)
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await.context("speaking to the endpoint")?;
        match response.status() {
            StatusCode::SWITCHING_PROTOCOLS => Ok(Some(TokioIo::new(hyper::upgrade::on(response).await?))),
            StatusCode::FORBIDDEN => Ok(None),
            status => bail!("port {port}: {}", refusal(&self.id, status)),
        }
    }

    async fn token(&self, kind: &str, request: serde_json::Value) -> anyhow::Result<HeaderValue> {
        let path = format!("/2025-09-09/microvms/{}/{kind}", names::escape(&self.id));
        let token: Token = self.client.call(Method::POST, &path, Some(request)).await?;
        let value = token.auth_token.into_values().next().context("the server's answer has no token")?;
        Ok(HeaderValue::try_from(value)?)
    }

    async fn tls(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        // The endpoint's certificate may be the operator's, so all authorities of the host count.
        let bundle = self.client.dir().ca_bundle();
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(&bundle).with_context(|| format!("reading {}", bundle.display()))?;
        // Some hosts have authorities that are none to rustls.
        roots.add_parsable_certificates(certificates.filter_map(Result::ok));
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let address = self.connect.endpoint;
        let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(self.name.clone())?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.with_context(|| format!("connecting to {}", self.name))
    }
}

fn refusal(id: &str, status: StatusCode) -> String {
    match status {
        StatusCode::BAD_GATEWAY => format!("{id} does not answer there: nothing listens, or it is suspended and may not be woken"),
        StatusCode::SERVICE_UNAVAILABLE => format!("{id} did not wake in time: try again"),
        other => format!("the endpoint of {id} answered {other}"),
    }
}

/// What comes in.
pub enum Received<T> {
    Text(T),
    Binary(Bytes),
}

impl Socket {
    /// Sends a message of the protocol.
    pub async fn text(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.0.send(Message::text(serde_json::to_string(message)?)).await?)
    }

    /// Sends bytes.
    pub async fn binary(&mut self, bytes: Vec<u8>) -> anyhow::Result<()> {
        Ok(self.0.send(Message::binary(bytes)).await?)
    }

    /// The next message. An end is an error: every protocol has a last message. Cancel safe.
    pub async fn next<T: for<'a> Deserialize<'a>>(&mut self) -> anyhow::Result<Received<T>> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => {
                    let message = serde_json::from_str(&text).context("the server is of another version")?;
                    return Ok(Received::Text(message));
                }
                Some(Ok(Message::Binary(bytes))) => return Ok(Received::Binary(bytes)),
                Some(Ok(Message::Close(Some(frame)))) if !frame.reason.is_empty() => bail!("the session ended: {}", frame.reason),
                Some(Ok(Message::Close(_))) | None => bail!("the session ended without a word"),
                Some(Err(error)) => return Err(error).context("the session broke"),
                Some(Ok(_)) => {}
            }
        }
    }
}
