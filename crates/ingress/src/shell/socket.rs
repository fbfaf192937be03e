//! A WebSocket whose client wants a shell: sends and receives, and ends with a reason.

use std::{borrow::Cow, time::Duration};

use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

/// Longest message of a client, in bytes: bounds what one can make us hold.
const MAX_MESSAGE: usize = 1 << 20;
/// A client must have said what it wants by then.
const FIRST_MESSAGE: Duration = Duration::from_secs(30);
/// How long a client may take to return our farewell.
const FAREWELL: Duration = Duration::from_secs(2);
/// Longest reason that fits a close frame (RFC 6455, 5.5), in bytes.
const MAX_REASON: usize = 123;

type Stream = WebSocketStream<TokioIo<Upgraded>>;

/// Both directions; each may be borrowed on its own.
pub(super) struct Socket {
    pub(super) out: Out,
    pub(super) inbound: Inbound,
}

/// Toward the client.
pub(super) struct Out(SplitSink<Stream, Message>);

/// From the client.
pub(super) struct Inbound(SplitStream<Stream>);

/// Why a session ends, for the close frame.
#[derive(Debug)]
pub(super) struct Farewell {
    pub(super) code: u16,
    pub(super) reason: Cow<'static, str>,
}

impl Farewell {
    pub(super) fn normal(reason: &'static str) -> Self {
        Self { code: CloseCode::Normal.into(), reason: reason.into() }
    }

    pub(super) fn going_away(reason: &'static str) -> Self {
        Self { code: CloseCode::Away.into(), reason: reason.into() }
    }

    pub(super) fn protocol(reason: &'static str) -> Self {
        Self { code: CloseCode::Protocol.into(), reason: reason.into() }
    }

    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self { code: CloseCode::Error.into(), reason: reason.into().into() }
    }

    /// The client has gone or leaves; whoever closes gets this back.
    pub(super) fn client_left() -> Self {
        Self::normal("")
    }

    /// The guest's side ended without a last word.
    pub(super) fn guest_gone() -> Self {
        Self::going_away("the MicroVM was suspended or has ended")
    }
}

impl Socket {
    pub(super) async fn new(client: Upgraded) -> Self {
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let (out, inbound) = WebSocketStream::from_raw_socket(TokioIo::new(client), Role::Server, Some(config)).await.split();
        Self { out: Out(out), inbound: Inbound(inbound) }
    }

    /// The text that a client of an extension begins with.
    pub(super) async fn first(&mut self) -> Result<String, Farewell> {
        match timeout(FIRST_MESSAGE, self.inbound.next()).await {
            Ok(Some(Message::Text(text))) => Ok(text.to_string()),
            Ok(Some(_)) => Err(Farewell::protocol("the first message must be text")),
            Ok(None) => Err(Farewell::client_left()),
            Err(_) => Err(Farewell::protocol("no first message in time")),
        }
    }

    /// Ends the session and waits a moment for the client to agree.
    pub(super) async fn close(mut self, farewell: Farewell) {
        let mut end = farewell.reason.len().min(MAX_REASON);
        while !farewell.reason.is_char_boundary(end) {
            end -= 1;
        }
        let frame = CloseFrame { code: farewell.code.into(), reason: farewell.reason[..end].into() };
        let agreed = async {
            // A client that is gone already is no news.
            let _ = self.out.0.send(Message::Close(Some(frame))).await;
            while self.inbound.next().await.is_some() {}
            self.out.0.close().await
        };
        let _ = timeout(FAREWELL, agreed).await;
    }
}

impl Out {
    pub(super) async fn text(&mut self, message: &impl Serialize) -> Result<(), tungstenite::Error> {
        let text = serde_json::to_string(message).expect("our messages are plain data");
        self.0.send(Message::text(text)).await
    }

    pub(super) async fn binary(&mut self, bytes: Vec<u8>) -> Result<(), tungstenite::Error> {
        self.0.send(Message::binary(bytes)).await
    }
}

impl Inbound {
    /// The next text or binary message; `None` when the client has left or broke the rules.
    pub(super) async fn next(&mut self) -> Option<Message> {
        loop {
            match self.0.next().await?.ok()? {
                message @ (Message::Text(_) | Message::Binary(_)) => return Some(message),
                Message::Close(_) => return None,
                // Pings are answered by the library.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }
}
