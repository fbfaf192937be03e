//! A stream that carries one HTTP exchange: HTTP says by itself where a message ends, so its sending side is not ended before the stream is.
//!
//! hyper ends the sending side when a request is out. To an HTTP server that is a client who has left (Go's cancels what it does for it).
//!
//! An application may answer early and close without having read the whole request. hyper gives up when it cannot write, and with that the
//! answer that is there to be read; so what the application refuses goes nowhere, and how the exchange ended is said to those who read.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tracing::debug;

/// The stream. Dropping it tells the other side.
pub(crate) struct Exchange<S> {
    stream: S,
    /// It may become a tunnel, whose ends are passed on one by one.
    tunnel: bool,
    /// The application takes no more.
    refused: bool,
}

impl<S> Exchange<S> {
    pub(crate) fn new(stream: S, tunnel: bool) -> Self {
        Self { stream, tunnel, refused: false }
    }

    /// Has a failed write look as if all `bytes` had been written.
    fn written(&mut self, bytes: usize, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Err(error)) if !self.tunnel => {
                debug!(%error, "the application takes no more of the request");
                self.refused = true;
                Poll::Ready(Ok(bytes))
            }
            other => other,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Exchange<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Exchange<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.refused {
            return Poll::Ready(Ok(buf.len()));
        }
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(buf.len(), result)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes = bufs.iter().map(|buf| buf.len()).sum();
        if self.refused {
            return Poll::Ready(Ok(bytes));
        }
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(bytes, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.refused {
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(0, result.map_ok(|()| 0)).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.tunnel { Pin::new(&mut self.stream).poll_shutdown(cx) } else { self.poll_flush(cx) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn its_sending_side_ends_with_it() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut exchange = Exchange::new(near, false);
        exchange.write_all(b"request").await.unwrap();
        exchange.shutdown().await.unwrap();
        far.read_exact(&mut [0; 7]).await.unwrap();
        assert!(futures::poll!(std::pin::pin!(far.read_u8())).is_pending(), "nothing has ended");
        drop(exchange);
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);

        let (near, mut far) = tokio::io::duplex(64);
        let mut tunnel = Exchange::new(near, true);
        tunnel.shutdown().await.unwrap();
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "a tunnel's sides end one by one");
    }

    #[tokio::test]
    async fn what_the_application_refuses_does_not_cost_its_answer() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(b"answer").await.unwrap();
        drop(far);
        let mut exchange = Exchange::new(near, false);
        exchange.write_all(&[0; 1000]).await.unwrap();
        exchange.flush().await.unwrap();
        let mut answer = String::new();
        exchange.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
    }
}
