//! Copies bytes both ways between the proxy and the application.
//!
//! An application may answer early and close without having read the whole request. The kernel then refuses what follows, but what the
//! application has said before waits to be read. So a refusal ends only the direction that it is about, and the answer is passed on first.

use std::{
    io::{self, ErrorKind},
    sync::OnceLock,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink, split},
    net::TcpStream,
};

/// What is read at once, in bytes. Every connection has two of these, and a guest may have thousands that rest.
const PIECE: usize = 8 << 10;

/// Copies until both directions have ended, or one side broke. Half-closes are passed on.
pub async fn splice(host: impl AsyncRead + AsyncWrite + Unpin, mut application: TcpStream) -> io::Result<()> {
    let (mut from_host, mut to_host) = split(host);
    let (mut from_application, mut to_application) = application.split();
    let refusal = OnceLock::new();
    let request = async {
        let mut piece = vec![0; PIECE];
        loop {
            let length = from_host.read(&mut piece).await?;
            let written = match length {
                0 => to_application.shutdown().await,
                _ => to_application.write_all(&piece[..length]).await,
            };
            match written {
                Ok(()) if length > 0 => {}
                Ok(()) => return Ok(()),
                Err(error) => {
                    // Only this direction sets it, and once.
                    let _ = refusal.set(error.kind());
                    // The host is not left writing to nobody; it ends the stream when it has the answer.
                    return copy(&mut from_host, &mut sink()).await.map(drop);
                }
            }
        }
    };
    let answer = async {
        let mut piece = vec![0; PIECE];
        loop {
            match from_application.read(&mut piece).await? {
                0 => break,
                length => to_host.write_all(&piece[..length]).await?,
            }
        }
        // A reset is told once, to whoever asks first; reading looks like an end then. Where an end came before it, the refusal is a broken
        // pipe (tcp(7)), and the end is one.
        match refusal.get() {
            Some(kind) if *kind != ErrorKind::BrokenPipe => Err(io::Error::from(*kind)),
            _ => to_host.shutdown().await,
        }
    };
    tokio::try_join!(request, answer).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hearth_guest_protocol::Carrier;
    use tokio::{net::TcpListener, time::timeout};

    use super::*;
    use crate::dial::tests::stream_pair;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// The host's end of a stream to an application that reads a little of a long request, answers, and closes: after saying that it is done,
    /// or just so.
    async fn hasty_application(says_so: bool) -> (String, io::Result<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let application = tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            connection.read_exact(&mut [0; 1000]).await.unwrap();
            connection.readable().await.unwrap();
            connection.write_all(b"too long").await.unwrap();
            if says_so {
                connection.shutdown().await.unwrap();
            }
        });
        let (host, guest, _session) = stream_pair().await;
        let connection = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let spliced = tokio::spawn(splice(Carrier::new(guest), connection));
        let (mut answers, mut requests) = split(Carrier::new(host));
        let flood = tokio::spawn(async move { while requests.write_all(&[0; 1 << 16]).await.is_ok() {} });
        application.await.unwrap();
        let mut answer = Vec::new();
        let end = timeout(PATIENCE, answers.read_to_end(&mut answer)).await.expect("an end in time").map(drop);
        flood.abort();
        let _ = flood.await;
        drop(answers);
        let _ = timeout(PATIENCE, spliced).await.expect("the stream ends with the host's side").unwrap();
        (String::from_utf8(answer).unwrap(), end)
    }

    #[tokio::test]
    async fn an_early_answer_arrives_before_the_break() {
        for _ in 0..20 {
            let (answer, end) = hasty_application(false).await;
            assert_eq!(answer, "too long");
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset, "it could look whole");
        }
    }

    #[tokio::test]
    async fn an_early_end_stays_an_end() {
        for _ in 0..20 {
            let (answer, end) = hasty_application(true).await;
            assert_eq!(answer, "too long");
            end.unwrap();
        }
    }
}
