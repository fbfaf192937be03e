//! The virtio-serial port as a tokio stream. It stays open for the machine's whole life; sessions follow one another on it.

use std::{
    fs::{File, OpenOptions},
    future::poll_fn,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// The open port. Clones share it; one task at a time may use it.
///
/// While no host is connected, the device reports a hang-up to whoever polls it, at once and for ever, and tokio would take that for the
/// end of the file. An edge-triggered epoll instance of the port's own sleeps until the device's state changes, whatever the state is.
#[derive(Debug, Clone)]
pub struct Port {
    device: Arc<File>,
    changes: Arc<AsyncFd<Changes>>,
}

impl Port {
    /// Opens the device, whether or not a host is connected.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?)
    }

    fn new(device: File) -> io::Result<Self> {
        let changes = Changes(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        changes.0.add(&device, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 0))?;
        // SAFETY: `Changes` owns its descriptor, never gives it away, and always returns the same one.
        let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?;
        Ok(Self { device: Arc::new(device), changes: Arc::new(changes) })
    }

    /// Waits, without limit, until a host is connected.
    pub async fn connected(&self) -> io::Result<()> {
        while self.hung_up()? {
            poll_fn(|cx| self.poll_change(cx)).await?;
        }
        Ok(())
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut state = [PollFd::new(self.device.as_fd(), PollFlags::empty())];
        poll(&mut state, PollTimeout::ZERO)?;
        Ok(state[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
    }

    /// Ready when the device's state has changed since this last said so.
    fn poll_change(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.changes.poll_read_ready(cx))?;
            if let Ok(result) = guard.try_io(|changes| changes.get_ref().take()) {
                // The change may matter to the other direction too, which the same task polls.
                cx.waker().wake_by_ref();
                return Poll::Ready(result);
            }
        }
    }

    fn poll_io<T>(&self, cx: &mut Context<'_>, mut attempt: impl FnMut(&File) -> io::Result<T>) -> Poll<io::Result<T>> {
        loop {
            match attempt(&self.device) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => ready!(self.poll_change(cx))?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

/// Tells that the device's state has changed.
#[derive(Debug)]
struct Changes(Epoll);

impl Changes {
    fn take(&self) -> io::Result<()> {
        match self.0.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO) {
            Ok(0) | Err(Errno::EINTR) => Err(ErrorKind::WouldBlock.into()),
            result => Ok(result.map(drop)?),
        }
    }
}

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl AsyncRead for Port {
    /// Reads nothing, as at the end of a file, while no host is connected.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = ready!(self.poll_io(cx, |mut device| device.read(buffer.initialize_unfilled())))?;
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_io(cx, |mut device| device.write(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A port has no half-close, and it stays open.
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::OwnedFd, unix::net::UnixStream},
        time::Duration,
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A socket reports readiness and hang-up as the port does.
    fn port_and_host() -> (Port, UnixStream) {
        let (device, host) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        (Port::new(File::from(OwnedFd::from(device))).unwrap(), host)
    }

    #[tokio::test]
    async fn both_directions_of_one_task_wake_up() {
        const BYTES: usize = 4 << 20;
        let (port, host) = port_and_host();
        let host = tokio::task::spawn_blocking(move || {
            let echo = host.try_clone().unwrap();
            let mut input = io::BufReader::new(host).take(BYTES as u64);
            io::copy(&mut input, &mut io::LineWriter::new(echo)).unwrap()
        });
        let (mut reader, mut writer) = (port.clone(), port);
        let both = async {
            let write = async {
                for _ in 0..BYTES / 1024 {
                    writer.write_all(&[b'x'; 1024]).await.unwrap();
                }
            };
            let mut echo = vec![0; BYTES];
            let (_, read) = tokio::join!(write, reader.read_exact(&mut echo));
            read.unwrap()
        };
        assert_eq!(timeout(LONG, both).await.unwrap(), BYTES);
        host.await.unwrap();
    }

    #[tokio::test]
    async fn a_host_that_is_gone_reads_as_the_end() {
        let (mut port, host) = port_and_host();
        timeout(LONG, port.connected()).await.unwrap().unwrap();
        drop(host);
        assert_eq!(timeout(LONG, port.read(&mut [0; 8])).await.unwrap().unwrap(), 0);
        assert!(timeout(Duration::from_millis(20), port.connected()).await.is_err());
    }
}
