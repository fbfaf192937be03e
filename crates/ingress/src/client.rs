//! Speaks HTTP with one client, in the version that TLS agreed on: until it leaves or falls silent, or the server stops.

use std::{convert::Infallible, future::Future, pin::pin, sync::Arc, time::Duration};

use hyper::{
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::{
    linger::{Linger, StillSending, Unwanted},
    listen::Server,
    proxy::Peer,
};

/// How long a client may take to accept the end of a connection.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a client may send on one HTTP/2 stream before the application has read any of it, in bytes: 11 MB/s at a round trip of 93 ms, where
/// the protocol's own 64 KiB allow 0.7. Also what a stream can make us hold.
const STREAM_WINDOW: u32 = 1 << 20;

/// The same for all streams of a connection.
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 256;

/// A client that is silent for this long on HTTP/2 is asked whether it is still there, and has as long again to answer.
const PING: Duration = Duration::from_secs(30);

impl Server {
    pub(crate) async fn speak(&self, stream: TlsStream<TcpStream>) {
        match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => self.http2(stream).await,
            _ => self.http1(stream).await,
        }
    }

    async fn http1(&self, stream: TlsStream<TcpStream>) {
        let sending = StillSending::default();
        let peer = Arc::new(Peer::new(&stream, Unwanted::Connection(sending.clone())));
        let service = service_fn(|request| {
            let answer = self.proxy.clone().handle(peer.clone(), request);
            async { Ok::<_, Infallible>(answer.await) }
        });
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.config.header_timeout)
            .max_header_size(self.config.max_header_bytes)
            .serve_connection(TokioIo::new(Linger::new(stream, sending)), service)
            .with_upgrades();
        let ended = match self.shutdown.run_until_cancelled(&mut connection).await {
            Some(ended) => ended,
            None => {
                std::pin::Pin::new(&mut connection).graceful_shutdown();
                (&mut connection).await
            }
        };
        let Err(error) = ended else { return };
        debug!(%error, "a client's connection ended early");
        // Silence is no accident, so it ends in order. A response that broke off must not: it could look whole.
        if error.is_timeout()
            && let Some(parts) = connection.into_parts()
        {
            // Whoever does not take the farewell does without.
            let _ = timeout(FAREWELL, parts.io.into_inner().shutdown()).await;
        }
    }

    async fn http2(&self, stream: TlsStream<TcpStream>) {
        let peer = Arc::new(Peer::new(&stream, Unwanted::Stream(self.proxy.tasks.clone())));
        let service = service_fn(|request| {
            let answer = self.proxy.clone().handle(peer.clone(), request);
            async { Ok::<_, Infallible>(answer.await) }
        });
        let streams = Streams::new(self.proxy.tasks.clone());
        let connection = http2::Builder::new(streams.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(self.config.max_header_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let mut ended = tokio::select! {
            ended = &mut connection => Some(ended),
            () = self.shutdown.cancelled() => None,
            () = streams.quiet_for(self.config.idle_timeout) => None,
        };
        if ended.is_none() {
            connection.as_mut().graceful_shutdown();
            ended = tokio::select! {
                ended = &mut connection => Some(ended),
                // Whoever does not take the farewell does without.
                () = streams.quiet_for(FAREWELL) => None,
            };
        }
        if let Some(Err(error)) = ended {
            debug!(%error, "a client's connection ended early");
        }
    }
}

/// The streams of an HTTP/2 connection: runs them, and knows when there are none.
#[derive(Clone)]
struct Streams {
    open: Arc<watch::Sender<usize>>,
    tasks: TaskTracker,
}

impl Streams {
    fn new(tasks: TaskTracker) -> Self {
        Self { open: Arc::new(watch::Sender::new(0)), tasks }
    }

    /// Returns once no stream has been open for this long.
    async fn quiet_for(&self, time: Duration) {
        let mut open = self.open.subscribe();
        loop {
            // The sender is ours, so the channel is open.
            let _ = open.wait_for(|open| *open == 0).await;
            tokio::select! {
                _ = open.changed() => {}
                () = sleep(time) => return,
            }
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, future: F) {
        self.open.send_modify(|open| *open += 1);
        let closing = Closing(self.open.clone());
        self.tasks.spawn(async move {
            let _closing = closing;
            future.await;
        });
    }
}

/// Counts a stream as closed, however it ended.
struct Closing(Arc<watch::Sender<usize>>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

#[cfg(test)]
mod tests {
    use tokio::{sync::oneshot, time::Instant};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_quiet_from_its_last_stream_on() {
        let streams = Streams::new(TaskTracker::new());
        let started = Instant::now();
        let (end, ended) = oneshot::channel::<()>();
        streams.execute(async { drop(ended.await) });
        let quiet = tokio::spawn({
            let streams = streams.clone();
            async move { streams.quiet_for(Duration::from_secs(10)).await }
        });
        sleep(Duration::from_secs(60)).await;
        assert!(!quiet.is_finished(), "one is open");
        drop(end);
        quiet.await.unwrap();
        assert_eq!(started.elapsed().as_secs(), 70);
    }
}
