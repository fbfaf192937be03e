//! Ends an exchange so that an early answer arrives. A client that is still sending would be met with a reset, which throws away what it has
//! not read yet; so its bytes are read and discarded for a moment: an HTTP/1.1 connection's (RFC 9112, 9.6), and an HTTP/2 stream's too,
//! because many clients take the reset of a stream for the failure of their request.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http_body::Body;
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep, timeout},
};
use tokio_util::task::TaskTracker;

/// How long a client may take to notice.
const PATIENCE: Duration = Duration::from_secs(2);

/// Remembers that a client may still be sending.
#[derive(Debug, Clone, Default)]
pub(crate) struct StillSending(Arc<AtomicBool>);

impl StillSending {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What becomes of the rest of an upload that nobody wants.
#[derive(Debug, Clone)]
pub(crate) enum Unwanted {
    /// The connection lingers when it is closed.
    Connection(StillSending),
    /// The stream is read on by a task of its own, then reset.
    Stream(TaskTracker),
}

impl Unwanted {
    /// Takes the rest of an upload.
    pub(crate) fn leave(&self, rest: impl Body + Send + Unpin + 'static) {
        match self {
            Self::Connection(client) => client.set(),
            Self::Stream(tasks) => {
                tasks.spawn(timeout(PATIENCE, discard(rest)));
            }
        }
    }
}

/// Returns at the body's end, or where it breaks.
async fn discard(mut body: impl Body + Unpin) {
    while let Some(Ok(_)) = body.frame().await {}
}

/// A stream that lingers when it is shut down, if its client may still be sending.
pub(crate) struct Linger<S> {
    stream: S,
    client: StillSending,
    patience: Duration,
    /// Set once our side is shut down.
    until: Option<Pin<Box<Sleep>>>,
}

impl<S> Linger<S> {
    pub(crate) fn new(stream: S, client: StillSending) -> Self {
        Self { stream, client, patience: PATIENCE, until: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Linger<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Linger<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.until.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            if !this.client.0.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        let patience = this.patience;
        let until = this.until.get_or_insert_with(|| Box::pin(sleep(patience)));
        let mut discarded = [0; 16 * 1024];
        while until.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut discarded);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                // It ended, or broke: either way there is nobody to wait for.
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_sending_client_is_read_until_it_ends() {
        let client = StillSending::default();
        client.set();
        let (near, mut far) = duplex(8);
        let mut stream = Linger::new(near, client);
        let sender = tokio::spawn(async move { far.write_all(&[0; 100_000]).await });
        stream.shutdown().await.unwrap();
        sender.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_never_ends_is_left() {
        let client = StillSending::default();
        client.set();
        let (near, _far) = duplex(8);
        let brief = Duration::from_millis(20);
        let started = Instant::now();
        Linger { patience: brief, ..Linger::new(near, client) }.shutdown().await.unwrap();
        assert!(started.elapsed() >= brief);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_client_that_is_done() {
        let (near, _far) = duplex(8);
        let started = Instant::now();
        Linger { patience: Duration::MAX, ..Linger::new(near, StillSending::default()) }.shutdown().await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
