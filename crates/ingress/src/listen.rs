//! Accepts connections, speaks TLS and HTTP on them, and stops in order: no new ones, a moment for those under way, then an end.

use std::{convert::Infallible, io, pin::Pin, sync::Arc, time::Duration};

use hearth_control::plane::DataPlane;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::{
    linger::{Linger, StillSending},
    proxy::{Peer, Proxy},
};

/// How long to leave the listener alone when the process is out of file descriptors; there is no event to wait for.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take to accept the end of a connection.
const FAREWELL: Duration = Duration::from_secs(1);

/// Limits of the endpoint proxy.
#[derive(Debug, Clone)]
pub struct IngressConfig {
    /// A client must have finished the TLS handshake by then; 10 s.
    pub handshake_timeout: Duration,
    /// A client must have sent a request's headers by then, counted from the end of the previous request; 30 s.
    pub header_timeout: Duration,
    /// Bytes of a request's line and headers, beyond which it is answered 431; 64 KiB.
    pub max_header_bytes: usize,
    /// What is under way at shutdown may take this long to end; 3 s.
    pub drain_timeout: Duration,
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(30),
            max_header_bytes: 64 * 1024,
            drain_timeout: Duration::from_secs(3),
        }
    }
}

/// Serves the endpoints of all MicroVMs until `shutdown`; returns when nothing of it is left running.
pub async fn serve(
    listeners: Vec<TcpListener>,
    tls: Arc<ServerConfig>,
    plane: Arc<dyn DataPlane>,
    config: IngressConfig,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let proxy = Arc::new(Proxy { plane, tasks: tasks.clone(), cut: cut.clone() });
    let drain_timeout = config.drain_timeout;
    let server = Arc::new(Server { tls: TlsAcceptor::from(tls), proxy, config, shutdown: shutdown.clone() });
    for listener in listeners {
        tasks.spawn(server.clone().accept(listener));
    }
    shutdown.cancelled().await;
    tasks.close();
    if timeout(drain_timeout, tasks.wait()).await.is_err() {
        debug!(left = tasks.len(), after = ?drain_timeout, "ending what is still under way");
        cut.cancel();
        tasks.wait().await;
    }
}

struct Server {
    tls: TlsAcceptor,
    proxy: Arc<Proxy>,
    config: IngressConfig,
    shutdown: CancellationToken,
}

impl Server {
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = self.clone();
                    self.proxy.tasks.spawn(async move {
                        tokio::select! {
                            () = server.proxy.cut.cancelled() => {}
                            () = server.connection(stream) => {}
                        }
                    });
                }
                Err(error) if is_the_client_s(&error) => debug!(%error, "a client left before it was accepted"),
                Err(error) => {
                    warn!(%error, "cannot accept connections on the endpoint's address");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(&self, stream: TcpStream) {
        let stream = tokio::select! {
            () = self.shutdown.cancelled() => return,
            stream = timeout(self.config.handshake_timeout, self.handshake(stream)) => stream,
        };
        match stream {
            Ok(Ok(stream)) => self.http1(stream).await,
            Ok(Err(error)) => debug!(%error, "the TLS handshake failed"),
            Err(_) => debug!(after = ?self.config.handshake_timeout, "the TLS handshake took too long"),
        }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        // Small writes are answers that somebody waits for.
        stream.set_nodelay(true)?;
        self.tls.accept(stream).await
    }

    async fn http1(&self, stream: TlsStream<TcpStream>) {
        let sending = StillSending::default();
        let peer = Peer { server_name: stream.get_ref().1.server_name().map(str::to_owned), sending: sending.clone() };
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
                Pin::new(&mut connection).graceful_shutdown();
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
}

/// Errors of `accept` that are about one connection (accept(2)), not about the listener.
fn is_the_client_s(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
