//! A connection between two programs, carried over a stream of a session: each side knows whether the other is done, or has left.
//!
//! yamux alone does not tell. It reads a reset, and the end of the whole session, as if the peer were done; and it resets a dropped stream only
//! if neither side was done, so that a reader which has nothing more to say could leave without its writer ever hearing of it. So the end of a
//! direction is said inside the stream: bytes go in pieces, each behind its length (16 bits, little-endian), and a piece without bytes is the
//! last. The stream below stays open until the carrier is dropped, which resets it; what has arrived by then can still be read.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::Stream;

/// Bytes before a piece that say how many follow.
const LENGTH_BYTES: usize = size_of::<u16>();

/// The longest piece in bytes: with its length, what yamux sends in one frame.
const MAX_PIECE: u16 = (16 << 10) - LENGTH_BYTES as u16;

/// One end of the connection.
#[derive(Debug)]
pub struct Carrier {
    stream: Stream,
    incoming: Incoming,
    outgoing: Outgoing,
}

/// What is to be read next.
#[derive(Debug)]
enum Incoming {
    /// The length of a piece, of which this many bytes are known.
    Length { bytes: [u8; LENGTH_BYTES], known: usize },
    /// The rest of a piece: never nothing.
    Piece { left: usize },
    /// The peer is done.
    Nothing,
}

/// What the stream has not taken yet.
#[derive(Debug, Default)]
struct Outgoing {
    piece: Vec<u8>,
    taken: usize,
    /// It is the last piece, or that is out.
    last: bool,
}

impl Carrier {
    /// A carrier for a connection that is about to begin.
    pub fn new(stream: Stream) -> Self {
        Self { stream, incoming: Incoming::length(), outgoing: Outgoing::default() }
    }

    /// Hands the present piece to the stream.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Outgoing { piece, taken, .. } = &mut self.outgoing;
        while *taken < piece.len() {
            *taken += ready!(Pin::new(&mut self.stream).poll_write(cx, &piece[*taken..]))?;
        }
        // Thousands of connections may be silent: they need no memory meanwhile.
        *piece = Vec::new();
        *taken = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads some of what must still come, at least one byte.
    fn poll_some(stream: &mut Stream, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(bytes);
        ready!(Pin::new(stream).poll_read(cx, &mut buf))?;
        Poll::Ready(match buf.filled().len() {
            0 => Err(io::Error::new(ErrorKind::ConnectionReset, "the other side broke the stream off")),
            count => Ok(count),
        })
    }
}

impl Incoming {
    fn length() -> Self {
        Self::Length { bytes: [0; LENGTH_BYTES], known: 0 }
    }
}

impl AsyncRead for Carrier {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, incoming, .. } = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            match incoming {
                Incoming::Length { bytes, known } => {
                    *known += ready!(Self::poll_some(stream, cx, &mut bytes[*known..]))?;
                    if *known == LENGTH_BYTES {
                        *incoming = match u16::from_le_bytes(*bytes) {
                            0 => Incoming::Nothing,
                            left => Incoming::Piece { left: left.into() },
                        };
                    }
                }
                Incoming::Piece { left } => {
                    let wanted = buf.remaining().min(*left);
                    let count = ready!(Self::poll_some(stream, cx, buf.initialize_unfilled_to(wanted)))?;
                    buf.advance(count);
                    *left -= count;
                    if *left == 0 {
                        *incoming = Incoming::length();
                    }
                    return Poll::Ready(Ok(()));
                }
                Incoming::Nothing => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.outgoing.last {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_drain(cx))?;
        let offered = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        let length = u16::try_from(offered).unwrap_or(MAX_PIECE).min(MAX_PIECE);
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        let whole = LENGTH_BYTES + usize::from(length);
        let mut piece = Vec::with_capacity(whole);
        piece.extend(length.to_le_bytes());
        for buf in bufs {
            piece.extend_from_slice(&buf[..buf.len().min(whole - piece.len())]);
        }
        this.outgoing.piece = piece;
        // What the stream does not take now, it takes before the next piece, or when it is flushed.
        if let Poll::Ready(Err(error)) = this.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(length.into()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        if !this.outgoing.last {
            this.outgoing = Outgoing { piece: vec![0; LENGTH_BYTES], taken: 0, last: true };
        }
        Pin::new(this).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;
    use crate::{Mux, mux::MuxDriver};

    const LONG: Duration = Duration::from_secs(20);

    /// Two ends of one connection, and the session around them.
    async fn carriers() -> (Carrier, Carrier, MuxDriver, MuxDriver) {
        let (near, far) = tokio::io::duplex(4096);
        let (host, host_driver) = Mux::client(near);
        let (_guest, mut guest_driver) = Mux::server(far);
        let mut near = Carrier::new(host.open().await.unwrap());
        near.write_all(b"x").await.unwrap();
        let mut far = Carrier::new(guest_driver.inbound.recv().await.unwrap());
        assert_eq!(far.read_u8().await.unwrap(), b'x');
        far.write_all(b"y").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'y');
        (near, far, host_driver, guest_driver)
    }

    #[tokio::test]
    async fn an_end_is_no_break() {
        let (mut near, mut far, ..) = carriers().await;
        far.shutdown().await.unwrap();
        let mut text = String::new();
        near.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "");
        near.write_all(b"still").await.unwrap();
        near.shutdown().await.unwrap();
        drop(near);
        far.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "still", "one direction outlives the other, and what was sent the sender");
    }

    #[tokio::test]
    async fn a_break_is_no_end() {
        for (session, half_closed) in [(false, false), (false, true), (true, false), (true, true)] {
            let (mut near, mut far, _host_driver, guest_driver) = carriers().await;
            if half_closed {
                near.shutdown().await.unwrap();
            }
            far.write_all(b"last").await.unwrap();
            far.flush().await.unwrap();
            let mut last = [0; 4];
            near.read_exact(&mut last).await.unwrap();
            if session {
                guest_driver.task.abort();
            } else {
                drop(far);
            }
            let error = timeout(LONG, near.read_u8()).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "the whole session: {session}, half-closed: {half_closed}");
        }
    }

    #[tokio::test]
    async fn a_reader_that_leaves_ends_its_writer() {
        for half_closed in [false, true] {
            let (mut near, mut far, ..) = carriers().await;
            if half_closed {
                near.shutdown().await.unwrap();
                assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
            }
            let endless = tokio::spawn(async move { while far.write_all(&[0; 16 << 10]).await.is_ok() {} });
            near.read_exact(&mut [0; 100_000]).await.unwrap();
            drop(near);
            timeout(LONG, endless).await.unwrap_or_else(|_| panic!("it writes to nobody; half-closed: {half_closed}")).unwrap();
        }
    }

    #[tokio::test]
    async fn bytes_arrive_as_they_were_sent_however_they_are_cut() {
        let (mut near, mut far, ..) = carriers().await;
        let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            let mut rest = &sent[..];
            for length in [1, 2, 16 << 10, (16 << 10) - 2, 65_535, 65_536, 300_000].into_iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (part, after) = rest.split_at(rest.len().min(length));
                let (first, second) = part.split_at(part.len() / 3);
                let taken = far.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]).await.unwrap();
                far.write_all(&part[taken..]).await.unwrap();
                rest = after;
            }
            far.shutdown().await.unwrap();
            far.write_all(b"more").await.unwrap_err()
        });
        let mut received = Vec::new();
        timeout(LONG, near.read_to_end(&mut received)).await.unwrap().unwrap();
        assert!(received == expected, "{} of {} bytes", received.len(), expected.len());
        assert_eq!(writer.await.unwrap().kind(), ErrorKind::BrokenPipe);
    }
}
