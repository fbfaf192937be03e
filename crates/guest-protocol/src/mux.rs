//! A yamux session as both sides use it: a handle that opens streams, a queue of streams that the peer opened, and one task that moves bytes.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// Streams that one side may have open at once in a session: a MicroVM may have thousands of quiet WebSockets.
const MAX_STREAMS: usize = 16_384;

/// Streams at which yamux gives the session up: those of both sides, and those that only one of them knows to be over.
const FATAL_STREAMS: usize = 4 * MAX_STREAMS;

/// How far the windows of streams that move much may grow beyond the protocol's 256 KiB, in bytes, for all of a session together. What a
/// stream's reader does not take, up to its window, is held in memory.
const WINDOW_GROWTH: usize = 64 << 20;

/// As many streams as yamux lets a peer open before any of them was answered.
const ACCEPT_BACKLOG: usize = 256;

/// One stream of a session, with tokio's traits.
#[derive(Debug)]
pub struct Stream {
    inner: Compat<yamux::Stream>,
    /// Of those that this side may open.
    _slot: Option<OwnedSemaphorePermit>,
}

/// The session cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MuxError {
    /// the session has ended
    #[error("the session with the guest has ended")]
    Ended,
    /// too many streams are open
    #[error("{MAX_STREAMS} streams are open, and no more are possible")]
    Full,
    /// the session refused the stream
    #[error("the session refused the stream: {0}")]
    Yamux(#[from] yamux::ConnectionError),
}

type OpenRequest = oneshot::Sender<Result<yamux::Stream, MuxError>>;

/// A session. Cheap to clone; the session itself lives until [`MuxDriver`] is aborted or the connection ends.
#[derive(Debug, Clone)]
pub struct Mux {
    open: mpsc::Sender<OpenRequest>,
    slots: Arc<Semaphore>,
}

/// The rest of a new session: streams that the peer opens, and the task that does the work.
#[derive(Debug)]
pub struct MuxDriver {
    /// Streams opened by the peer; `None` once the session has ended.
    pub inbound: mpsc::Receiver<Stream>,
    /// Ends when the session ends. Aborting it drops the connection at once, in the middle of whatever it was doing.
    pub task: JoinHandle<()>,
}

impl Mux {
    /// The side that dials: the host.
    pub fn client(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> (Self, MuxDriver) {
        Self::start(io, yamux::Mode::Client)
    }

    /// The side that is dialled: the guest.
    pub fn server(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> (Self, MuxDriver) {
        Self::start(io, yamux::Mode::Server)
    }

    fn start(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, mode: yamux::Mode) -> (Self, MuxDriver) {
        let mut config = yamux::Config::default();
        // In this order, because the limit of the windows must allow the streams.
        config.set_max_connection_receive_window(Some(FATAL_STREAMS * yamux::DEFAULT_CREDIT as usize + WINDOW_GROWTH));
        config.set_max_num_streams(FATAL_STREAMS);
        let connection = yamux::Connection::new(io.compat(), config, mode);
        let (open, requests) = mpsc::channel(16);
        let (accepted, inbound) = mpsc::channel(ACCEPT_BACKLOG);
        let task = tokio::spawn(drive(connection, requests, accepted));
        (Self { open, slots: Arc::new(Semaphore::new(MAX_STREAMS)) }, MuxDriver { inbound, task })
    }

    /// Opens a stream. Waits while the peer has too many unacknowledged ones.
    pub async fn open(&self) -> Result<Stream, MuxError> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| MuxError::Full)?;
        let (reply, answer) = oneshot::channel();
        self.open.send(reply).await.map_err(|_| MuxError::Ended)?;
        let inner = answer.await.map_err(|_| MuxError::Ended)??.compat();
        Ok(Stream { inner, _slot: Some(slot) })
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// Moves the session's bytes until it ends. All of yamux's work happens in its poll functions, so they share one task.
async fn drive<T>(mut connection: yamux::Connection<Compat<T>>, mut requests: mpsc::Receiver<OpenRequest>, accepted: mpsc::Sender<Stream>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut opening: Option<OpenRequest> = None;
    let mut handles_gone = false;
    std::future::poll_fn(|cx| {
        loop {
            if opening.is_none() && !handles_gone {
                match requests.poll_recv(cx) {
                    Poll::Ready(Some(request)) => opening = Some(request),
                    Poll::Ready(None) => handles_gone = true,
                    Poll::Pending => {}
                }
            }
            if let Some(reply) = opening.take() {
                match connection.poll_new_outbound(cx) {
                    Poll::Ready(result) => {
                        // A caller that went away drops the stream, which resets it.
                        let _ = reply.send(result.map_err(MuxError::from));
                        continue;
                    }
                    Poll::Pending => opening = Some(reply),
                }
            }
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    // A peer that opens faster than we serve loses the stream instead of stalling the session.
                    let _ = accepted.try_send(Stream { inner: stream.compat(), _slot: None });
                }
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn both_sides_open_streams() {
        let (near, far) = tokio::io::duplex(4096);
        let (host, mut host_driver) = Mux::client(near);
        let (guest, mut guest_driver) = Mux::server(far);

        let mut outbound = host.open().await.unwrap();
        outbound.write_all(b"ping").await.unwrap();
        outbound.flush().await.unwrap();
        let mut inbound = guest_driver.inbound.recv().await.unwrap();
        let mut buffer = [0; 4];
        inbound.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"ping");

        let mut outbound = guest.open().await.unwrap();
        outbound.write_all(b"pong").await.unwrap();
        outbound.flush().await.unwrap();
        let mut inbound = host_driver.inbound.recv().await.unwrap();
        inbound.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"pong");
    }

    #[tokio::test]
    async fn a_thousand_streams_at_once_are_all_answered() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (host, _host_driver) = Mux::client(near);
        let (_guest, mut guest_driver) = Mux::server(far);
        tokio::spawn(async move {
            while let Some(mut stream) = guest_driver.inbound.recv().await {
                tokio::spawn(async move { stream.write_all(b"pong").await });
            }
        });
        let mut asked = Vec::new();
        for _ in 0..1000 {
            let host = host.clone();
            asked.push(tokio::spawn(async move {
                let mut stream = host.open().await.unwrap();
                stream.write_all(b"ping").await.unwrap();
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).await.map(|_| stream)
            }));
        }
        let mut open = Vec::new();
        for stream in asked {
            open.push(stream.await.unwrap().unwrap());
        }
        assert_eq!(open.len(), 1000);
    }

    #[tokio::test]
    async fn one_stream_too_many_is_refused_and_the_others_go_on() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (host, _host_driver) = Mux::client(near);
        let (_guest, mut guest_driver) = Mux::server(far);
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Some(mut stream) = guest_driver.inbound.recv().await {
                stream.write_all(b"x").await.unwrap();
                open.push(stream);
            }
        });
        let mut open = Vec::new();
        for _ in 0..MAX_STREAMS {
            let mut stream = host.open().await.unwrap();
            stream.write_all(b"y").await.unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), b'x');
            open.push(stream);
        }
        assert!(matches!(host.open().await, Err(MuxError::Full)));
        open.pop();
        let mut stream = host.open().await.expect("one has gone");
        stream.write_all(b"y").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn a_reader_that_rests_stops_its_writer() {
        let (near, far) = tokio::io::duplex(4096);
        let (host, _host_driver) = Mux::client(near);
        let (_guest, mut guest_driver) = Mux::server(far);
        let mut resting = host.open().await.unwrap();
        resting.write_all(b"x").await.unwrap();
        let mut writer = guest_driver.inbound.recv().await.unwrap();
        let mut written = 0;
        let brief = std::time::Duration::from_millis(200);
        while tokio::time::timeout(brief, writer.write_all(&[0; 16 << 10])).await.is_ok() {
            written += 16 << 10;
            assert!(written <= 2 * yamux::DEFAULT_CREDIT, "nobody reads, and yet {written} bytes are gone");
        }
        let mut busy = host.open().await.unwrap();
        busy.write_all(b"y").await.unwrap();
        assert_eq!(guest_driver.inbound.recv().await.unwrap().read_u8().await.unwrap(), b'y', "others go on");
    }

    #[tokio::test]
    async fn the_end_of_one_side_ends_the_other() {
        let (near, far) = tokio::io::duplex(4096);
        let (host, host_driver) = Mux::client(near);
        let (_guest, guest_driver) = Mux::server(far);
        guest_driver.task.abort();
        host_driver.task.await.unwrap();
        assert!(matches!(host.open().await, Err(MuxError::Ended)));
    }
}
