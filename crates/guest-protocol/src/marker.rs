//! Markers: random bytes that say where one session ends and the next begins.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    sync::oneshot,
};

/// A point in the byte stream that nothing in flight can be mistaken for.
pub type Marker = [u8; 16];

/// Begins the first session after boot.
pub const BOOT_MARKER: Marker = *b"hearth-boot-0001";

/// A marker of these random bytes. What is read while a session's end is waited for is held back as long as it may be the beginning of the
/// marker, so that must not be how the frames end that somebody waits for: the end of a stream ends with zeros, text not with 255.
pub fn new_marker(random: [u8; 16]) -> Marker {
    let mut marker = random;
    marker[0] = 0xff;
    marker
}

/// Reads and discards bytes until the marker has been read, and not one byte more.
pub async fn await_marker(reader: &mut (impl AsyncRead + Unpin), marker: &Marker) -> io::Result<()> {
    let mut window = [0; 16];
    let mut matched = 0;
    while matched < marker.len() {
        let read = reader.read(&mut window[matched..]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Keep the longest tail of what was read that could still become the marker.
        let filled = matched + read;
        let keep = (0..=filled).find(|&skip| marker.starts_with(&window[skip..filled])).unwrap_or(filled);
        window.copy_within(keep..filled, 0);
        matched = filled - keep;
    }
    Ok(())
}

/// Watches what a session reads for the marker that ends it. The session sees the end of the stream where the marker begins.
#[derive(Debug)]
pub struct MarkerWatch<T> {
    io: T,
    armed: Arc<Mutex<Option<Armed>>>,
    /// Read, but not yet handed on: it may be the beginning of the marker.
    held: Vec<u8>,
    /// How much of the beginning of `held` is certainly not.
    clean: usize,
    over: bool,
}

/// Arms a [`MarkerWatch`] whose session is running.
#[derive(Debug, Clone)]
pub struct MarkerTrigger(Arc<Mutex<Option<Armed>>>);

#[derive(Debug)]
struct Armed {
    marker: Marker,
    found: Option<oneshot::Sender<()>>,
}

impl<T> MarkerWatch<T> {
    /// Wraps the session's connection.
    pub fn new(io: T) -> (Self, MarkerTrigger) {
        let armed = Arc::new(Mutex::new(None));
        (Self { io, armed: armed.clone(), held: Vec::new(), clean: 0, over: false }, MarkerTrigger(armed))
    }
}

impl MarkerTrigger {
    /// Begins to look for the marker. To be called before the peer learns of it; resolves when the marker has been read.
    pub fn arm(&self, marker: Marker) -> oneshot::Receiver<()> {
        let (found, seen) = oneshot::channel();
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Armed { marker, found: Some(found) });
        seen
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for MarkerWatch<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self.get_mut();
        loop {
            if this.clean > 0 {
                let handed = this.clean.min(buffer.remaining());
                buffer.put_slice(&this.held[..handed]);
                this.held.drain(..handed);
                this.clean -= handed;
                return Poll::Ready(Ok(()));
            }
            if this.over {
                return Poll::Ready(Ok(()));
            }
            let mut chunk = [0; 4096];
            let room = chunk.len().min(buffer.remaining());
            let mut read = ReadBuf::new(&mut chunk[..room]);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut read))?;
            let read = read.filled();
            let mut armed = this.armed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(armed) = armed.as_mut() else {
                buffer.put_slice(read);
                return Poll::Ready(Ok(()));
            };
            this.over = read.is_empty();
            this.held.extend_from_slice(read);
            let begins = |start: &usize| {
                let rest = &this.held[*start..];
                rest.starts_with(&armed.marker) || armed.marker.starts_with(rest)
            };
            this.clean = (0..this.held.len()).find(begins).unwrap_or(this.held.len());
            if this.held[this.clean..].starts_with(&armed.marker) {
                this.over = true;
                if let Some(found) = armed.found.take() {
                    let _ = found.send(());
                }
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for MarkerWatch<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::AsyncWriteExt, time::timeout};

    use super::*;
    use crate::Mux;

    #[tokio::test]
    async fn a_session_ends_where_its_marker_begins() {
        let marker = *b"aabaabaaabaabaac";
        for chunk in [1, 3, 7, 64] {
            let (mut peer, io) = tokio::io::duplex(256);
            let (mut session, trigger) = MarkerWatch::new(io);
            peer.write_all(b"before").await.unwrap();
            let mut read = [0; 6];
            session.read_exact(&mut read).await.unwrap();
            let seen = trigger.arm(marker);
            let input = [b"frames aabaab aabaabaaabaab".as_slice(), &marker, b"x"].concat();
            let reader = tokio::spawn(async move {
                let mut rest = Vec::new();
                session.read_to_end(&mut rest).await.unwrap();
                rest
            });
            for piece in input.chunks(chunk) {
                // After the marker nobody may be left to read.
                let _ = peer.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            seen.await.unwrap();
            assert_eq!(reader.await.unwrap(), b"frames aabaab aabaabaaabaab", "in chunks of {chunk}");
        }
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_not_a_marker() {
        let (mut peer, io) = tokio::io::duplex(256);
        let (mut session, trigger) = MarkerWatch::new(io);
        let seen = trigger.arm(*b"0123456789abcdef");
        peer.write_all(b"rest 01234").await.unwrap();
        drop(peer);
        let mut rest = Vec::new();
        session.read_to_end(&mut rest).await.unwrap();
        assert!(rest.starts_with(b"rest "));
        drop(session);
        drop(trigger);
        assert!(seen.await.is_err());
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_not_held_back() {
        for first in [0, 1, 2, 4, 0xff] {
            let (near, far) = tokio::io::duplex(256);
            let (near, trigger) = MarkerWatch::new(near);
            let (_host, mut inbound) = Mux::client(near);
            let (guest, _guest_driver) = Mux::server(far);
            let _seen = trigger.arm(new_marker([first; 16]));
            let mut stream = guest.open().await.unwrap();
            stream.write_all(b"the last line").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut read = Vec::new();
            let ended = async { inbound.inbound.recv().await.unwrap().read_to_end(&mut read).await };
            timeout(Duration::from_secs(20), ended).await.expect("the stream ends").unwrap();
            assert_eq!(read, b"the last line");
        }
    }

    async fn rest_after(input: &[u8]) -> io::Result<Vec<u8>> {
        let mut input = input;
        await_marker(&mut input, b"aabaabaaabaabaac").await?;
        Ok(input.to_vec())
    }

    #[tokio::test]
    async fn what_precedes_is_discarded_and_what_follows_is_kept() {
        assert_eq!(rest_after(b"aabaabaaabaabaacrest").await.unwrap(), b"rest");
        assert_eq!(rest_after(b"junk aabaabaaabaabaac").await.unwrap(), b"");
        assert_eq!(rest_after(b"aabaabaaabaabaabaabaaabaabaacx").await.unwrap(), b"x");
        assert_eq!(rest_after(b"aaaabaabaaabaabaacaabaab").await.unwrap(), b"aabaab");
    }

    #[tokio::test]
    async fn the_end_of_the_stream_is_an_error() {
        assert_eq!(rest_after(b"aabaabaaabaabaa").await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
