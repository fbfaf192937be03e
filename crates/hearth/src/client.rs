//! Speaks to a running server over its administrator's socket: the AWS API without signatures, and the routes of [`crate::admin`].

use std::{io, path::PathBuf, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::data_dir::DataDir;

/// How long a call may take that waits for nothing but the server. Calls that wait for an image or a MicroVM say so in the request, and the
/// server answers them well before this.
const DEADLINE: Duration = Duration::from_secs(60);

/// A way to the server of a data directory.
#[derive(Debug, Clone)]
pub struct Client {
    dir: DataDir,
}

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// nothing serves here
    #[error(
        "no hearth serves {dir}: start one with `hearth serve --data-dir {dir}`, or name its directory with --data-dir or HEARTH_DATA_DIR"
    )]
    NotServing {
        /// The data directory.
        dir: PathBuf,
    },
    /// somebody else's server
    #[error("the server's socket {socket} is another user's: run this as the user that runs the server, for example with sudo")]
    Forbidden {
        /// The socket.
        socket: PathBuf,
    },
    /// the connection failed
    #[error("speaking to the server in {dir} failed: {reason}")]
    Transport {
        /// The data directory.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// the server did not answer
    #[error("the server did not answer {method} {path} within {} s; its log says why", DEADLINE.as_secs())]
    Timeout {
        /// HTTP method.
        method: Method,
        /// Path of the call.
        path: String,
    },
    /// the server refused
    #[error("{message}{}", advice.map(|advice| format!("\n  {advice}")).unwrap_or_default())]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// For example `ResourceNotFoundException`.
        kind: String,
        /// What the server says.
        message: String,
        /// What to do next.
        advice: Option<&'static str>,
    },
    /// the answer is not what this client expects
    #[error("the server's answer to {method} {path} is not understood ({reason}): is it of another version?")]
    Answer {
        /// HTTP method.
        method: Method,
        /// Path of the call.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Client {
    /// Names the server; nothing is connected yet.
    pub fn new(dir: DataDir) -> Self {
        Self { dir }
    }

    /// The server's data directory.
    pub fn dir(&self) -> &DataDir {
        &self.dir
    }

    /// Calls the server and reads the answer.
    pub async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<Value>) -> Result<T, ClientError> {
        let body = body.map_or_else(Body::empty, |value| Body::from(value.to_string()));
        let call = async {
            let response = self.send(method.clone(), path, body).await?;
            let bytes = self.collect(response.into_body()).await?;
            let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
            serde_json::from_slice(bytes).map_err(|error| ClientError::Answer {
                method: method.clone(),
                path: path.to_owned(),
                reason: error.to_string(),
            })
        };
        let timeout = || ClientError::Timeout { method: method.clone(), path: path.to_owned() };
        tokio::time::timeout(DEADLINE, call).await.map_err(|_elapsed| timeout())?
    }

    /// Sends a body of any length. Takes as long as the bytes take.
    pub async fn upload<T: DeserializeOwned>(&self, path: &str, body: Body) -> Result<T, ClientError> {
        let response = self.send(Method::PUT, path, body).await?;
        let bytes = self.collect(response.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Answer {
            method: Method::PUT,
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Opens an answer that goes on for as long as the server has something to say.
    pub async fn stream(&self, path: &str) -> Result<Chunks, ClientError> {
        let response = self.send(Method::GET, path, Body::empty()).await?;
        Ok(Chunks { dir: self.dir.clone(), body: response.into_body() })
    }

    async fn send(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let transport = |error: hyper::Error| self.transport(&error);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(transport)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "hearth")
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| self.transport(&error))?;
        let response = sender.send_request(request).await.map_err(transport)?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await?) }
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let connected = async {
            let (_dir, name) = self.dir.short_socket()?;
            UnixStream::connect(name).await
        };
        connected.await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotServing { dir: self.dir.path().to_owned() },
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { socket: self.dir.socket() },
            _ => self.transport(&error),
        })
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ClientError> {
        Ok(body.collect().await.map_err(|error| self.transport(&error))?.to_bytes())
    }

    async fn refusal(&self, response: Response<Incoming>) -> Result<ClientError, ClientError> {
        let status = response.status();
        let kind = response.headers().get("x-amzn-errortype").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let body = self.collect(response.into_body()).await?;
        Ok(refusal(status, kind, &body))
    }

    fn transport(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Transport { dir: self.dir.path().to_owned(), reason: error.to_string() }
    }
}

/// An answer that goes on.
#[derive(Debug)]
pub struct Chunks {
    dir: DataDir,
    body: Incoming,
}

impl Chunks {
    /// The next bytes, or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| ClientError::Transport { dir: self.dir.path().to_owned(), reason: error.to_string() })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// Reads a refusal: a JSON object with `message` or `Message`, as AWS's services write it.
fn refusal(status: StatusCode, kind: String, body: &[u8]) -> ClientError {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = body.get("message").or_else(|| body.get("Message")).and_then(Value::as_str);
    let message = match text {
        Some(text) => text.to_owned(),
        None if kind.is_empty() => format!("the server answered {status}"),
        None => format!("the server answered {status} ({kind})"),
    };
    let advice = advice(&message, status);
    ClientError::Refused { status, kind, message, advice }
}

/// What a person can do about a refusal.
fn advice(message: &str, status: StatusCode) -> Option<&'static str> {
    const ADVICE: &[(&str, &str)] = &[
        ("MicroVMImage not found", "see `hearth image ls` for the images there are"),
        ("MicroVM not found", "see `hearth ps -a` for the MicroVMs there are"),
        ("No active version found", "build it first: `hearth image build DIR`; `hearth image ls` shows what is there"),
        ("with running microvms", "terminate them first: `hearth ps` shows them, `hearth terminate ID` ends one"),
        (
            "cannot be assumed by Lambda",
            "name a role that trusts lambda.amazonaws.com with --role: `hearth iam role ls` shows the account's",
        ),
        ("requires SHELL_INGRESS", "its connectors were chosen when it was run: run one that shells may enter, `hearth run --shell IMAGE`"),
        ("has been terminated", "run another: `hearth run IMAGE`"),
    ];
    let known = ADVICE.iter().find(|(part, _)| message.contains(part)).map(|(_, advice)| *advice);
    known.or_else(|| status.is_server_error().then_some("the server's log says more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_read_in_either_spelling_and_come_with_advice() {
        let error = refusal(StatusCode::NOT_FOUND, "ResourceNotFoundException".to_owned(), br#"{"message":"MicroVM not found: x"}"#);
        assert_eq!(error.to_string(), "MicroVM not found: x\n  see `hearth ps -a` for the MicroVMs there are");
        let error = refusal(StatusCode::FORBIDDEN, String::new(), br#"{"Message":"no"}"#);
        assert_eq!(error.to_string(), "no");
    }

    #[test]
    fn a_refusal_without_a_text_still_says_something() {
        let error = refusal(StatusCode::BAD_REQUEST, "ValidationException".to_owned(), br#"{"message":null}"#);
        assert_eq!(error.to_string(), "the server answered 400 Bad Request (ValidationException)");
        let error = refusal(StatusCode::BAD_GATEWAY, String::new(), b"<html>");
        assert_eq!(error.to_string(), "the server answered 502 Bad Gateway\n  the server's log says more");
    }

    #[tokio::test]
    async fn without_a_server_the_error_says_how_to_start_one() {
        let root = tempfile::tempdir().unwrap();
        let client = Client::new(DataDir::new(root.path().to_owned()));
        let error = client.call::<Value>(Method::GET, "/", None).await.unwrap_err();
        assert!(error.to_string().contains("hearth serve --data-dir"), "{error}");
    }
}
