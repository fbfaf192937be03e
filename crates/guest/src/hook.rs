//! Calls the application's lifecycle hooks: each is one HTTP/1.1 request on a connection of its own, and counts when its answer is complete.

use std::{
    error::Error,
    io::{self, ErrorKind},
    time::Duration,
};

use bytes::Bytes;
use hearth_guest_protocol::{HookCall, HookReply, Stream, WireError, write_message};
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::dial;

/// Most that an answer's status line and header fields may take, in bytes.
const HEAD_BYTES: usize = 64 << 10;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("connecting: {0}")]
    Connect(#[from] io::Error),
    #[error("the request cannot be sent: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("{0}{because}", because = .0.source().map(|cause| format!(": {cause}")).unwrap_or_default())]
    Exchange(#[from] hyper::Error),
}

/// Calls a hook and tells the host how it was answered.
pub async fn serve(mut stream: Stream, call: HookCall) -> Result<(), WireError> {
    let limit = Duration::from_millis(call.timeout_ms);
    let reply = match timeout(limit, exchange(call)).await {
        Ok(Ok(status)) => HookReply::Status(status),
        Ok(Err(CallError::Connect(error))) if error.kind() == ErrorKind::ConnectionRefused => HookReply::Refused,
        Ok(Err(error)) => HookReply::Invalid { reason: error.to_string() },
        Err(_elapsed) => HookReply::TimedOut,
    };
    write_message(&mut stream, &reply).await
}

/// Sends the request, reads the whole answer, and returns its status.
async fn exchange(call: HookCall) -> Result<u16, CallError> {
    let connection = TokioIo::new(dial::connect(call.port).await?);
    let (mut sender, connection) = http1::Builder::new().max_buf_size(HEAD_BYTES).handshake(connection).await?;
    let mut request = Request::post(call.path);
    for (name, value) in call.headers {
        request = request.header(name, value);
    }
    let request = request.body(Full::new(Bytes::from(call.body)))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let (status, mut body) = (response.status(), response.into_body());
        // Nobody wants the body, however long it is, but an answer that breaks off is none.
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(status.as_u16())
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection moves the bytes; what it has read before it ended is still to be looked at, and says best why it ended.
        _ = connection => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        task::JoinHandle,
    };

    use super::*;
    use crate::dial::tests::stream_pair;

    /// A server that reads the whole request and then does something to the connection.
    async fn server<A, F>(answer: A) -> (u16, JoinHandle<String>)
    where
        A: FnOnce(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut connection, peer) = listener.accept().await.unwrap();
            assert!(peer.ip().is_loopback());
            let mut request = String::new();
            while !request.ends_with("{}") {
                let mut byte = [0];
                connection.read_exact(&mut byte).await.unwrap();
                request.push(char::from(byte[0]));
            }
            // Whoever called may have gone away.
            let _ = tokio::spawn(answer(connection)).await;
            request
        });
        (port, served)
    }

    fn call(port: u16, timeout_ms: u64) -> HookCall {
        let headers = vec![("Host".to_owned(), format!("localhost:{port}"))];
        HookCall { port, path: "/aws/lambda-microvms/runtime/v1/run".to_owned(), headers, body: b"{}".to_vec(), timeout_ms }
    }

    /// What the host hears of a call.
    async fn reply_to(call: HookCall) -> HookReply {
        let (mut host, guest, _session) = stream_pair().await;
        let served = tokio::spawn(serve(guest, call));
        let reply = hearth_guest_protocol::read_message(&mut host).await.unwrap();
        served.await.unwrap().unwrap();
        reply
    }

    /// What the host hears of a server that sends this and then closes the connection.
    async fn reply_to_bytes(bytes: impl Into<Vec<u8>>) -> HookReply {
        let bytes = bytes.into();
        let (port, _server) = server(|mut connection| async move {
            let _ = connection.write_all(&bytes).await;
        })
        .await;
        reply_to(call(port, 10_000)).await
    }

    fn reason(reply: HookReply) -> String {
        match reply {
            HookReply::Invalid { reason } => reason,
            other => panic!("not invalid: {other:?}"),
        }
    }

    #[tokio::test]
    async fn the_request_is_what_was_asked_for_and_nothing_else() {
        let (port, server) = server(|mut connection| async move {
            connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        })
        .await;
        assert_eq!(reply_to(call(port, 10_000)).await, HookReply::Status(200));
        let request = server.await.unwrap().to_lowercase();
        let mut lines: Vec<&str> = request.split("\r\n").collect();
        assert_eq!(lines.remove(0), "post /aws/lambda-microvms/runtime/v1/run http/1.1");
        lines.sort_unstable();
        assert_eq!(lines, ["", "content-length: 2", &format!("host: localhost:{port}"), "{}"]);
    }

    #[tokio::test]
    async fn complete_answers_count_however_they_are_framed() {
        for (bytes, status) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
            ("HTTP/1.1 503 Not Yet\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", 503),
            ("HTTP/1.0 404 Not Found\r\nServer: old\r\n\r\nuntil the end", 404),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 Oh\r\nContent-Length: 1\r\n\r\n.", 500),
            ("HTTP/1.1 204 No Content\r\n\r\n", 204),
        ] {
            assert_eq!(reply_to_bytes(bytes).await, HookReply::Status(status), "{bytes}");
        }
    }

    #[tokio::test]
    async fn answers_that_break_off_or_make_no_sense_are_invalid() {
        let endless = format!("HTTP/1.1 200 OK\r\n{}", "X-Filler: filler filler filler\r\n".repeat(10_000));
        for bytes in [
            "",
            "HTTP/1.1 200 OK\r\nContent-Le",
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n",
            "\u{16}\u{3}\u{1}\u{2}\0",
            "HTTP/1.1 9000 OK\r\n\r\n",
            &endless,
        ] {
            let reason = reason(reply_to_bytes(bytes).await);
            assert!(!reason.is_empty() && reason.len() < 200, "{reason}");
        }
    }

    #[tokio::test]
    async fn nobody_wants_the_body_and_it_may_be_long() {
        let large = format!("HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n{}", "x".repeat(2_000_000));
        assert_eq!(reply_to_bytes(large).await, HookReply::Status(200));
    }

    #[tokio::test]
    async fn servers_that_never_finish_run_out_of_time() {
        let (silent, _server) = server(|connection| async move {
            std::future::pending::<()>().await;
            drop(connection);
        })
        .await;
        assert_eq!(reply_to(call(silent, 100)).await, HookReply::TimedOut);
        let (streaming, _server) = server(|mut connection| async move {
            connection.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            while connection.write_all(b"1\r\nx\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(reply_to(call(streaming, 300)).await, HookReply::TimedOut);
        let (continuing, _server) = server(|mut connection| async move {
            while connection.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(reply_to(call(continuing, 300)).await, HookReply::TimedOut);
    }

    #[tokio::test]
    async fn a_port_without_a_server_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        assert_eq!(reply_to(call(port, 10_000)).await, HookReply::Refused);
    }
}
