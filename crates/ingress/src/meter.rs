//! Counts a stream's bytes as activity of its MicroVM: what no byte crosses for long enough is idle (SPEC 9.1).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use hearth_control::plane::Activity;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::limits::{Pace, Way};

/// A stream that reports its traffic, and keeps to a pace if there is one.
pub(crate) struct Metered<S> {
    stream: S,
    activity: Arc<Activity>,
    pace: Option<Pace>,
}

impl<S> Metered<S> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>, pace: Option<Pace>) -> Self {
        Self { stream, activity, pace }
    }

    fn poll_ready(&mut self, way: Way, cx: &mut Context<'_>) -> Poll<()> {
        self.pace.as_mut().map_or(Poll::Ready(()), |pace| pace.poll_ready(way, cx))
    }

    fn moved(&self, bytes: usize) {
        if bytes > 0 {
            self.activity.touch();
            if let Some(pace) = &self.pace {
                pace.moved(bytes);
            }
        }
    }

    fn written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = written {
            self.moved(bytes);
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ready(Way::In, cx));
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.moved(buf.filled().len() - before);
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_ready(Way::Out, cx));
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_ready(Way::Out, cx));
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_in_either_direction_count_and_silence_does_not() {
        let activity = Arc::new(Activity::default());
        let (near, mut far) = duplex(64);
        let mut metered = Metered::new(near, activity.clone(), None);
        let mut last = activity.last();
        let mut moved = async || {
            // The meter counts in milliseconds.
            tokio::time::sleep(Duration::from_millis(3)).await;
            let before = std::mem::replace(&mut last, activity.last());
            last > before
        };

        metered.write_all(b"x").await.unwrap();
        moved().await;
        metered.write_all(b"x").await.unwrap();
        assert!(moved().await);
        assert!(!moved().await);
        far.write_all(b"y").await.unwrap();
        assert!(!moved().await, "not read yet");
        metered.read_u8().await.unwrap();
        assert!(moved().await);
        drop(far);
        assert_eq!(metered.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(metered.write_all(b"x").await.is_err());
        assert!(!moved().await, "an end is not a byte");
    }
}
