//! Accepts connections, speaks TLS on them, and stops in order: no new ones, a moment for those under way, then an end.

use std::{io, sync::Arc, time::Duration};

use hearth_control::plane::DataPlane;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ServerConfig, server::Acceptor};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::{
    app::AppTls,
    limits::{Limiter, Limits},
    ports::Ports,
    proxy::Proxy,
};

/// How long to leave the listener alone when the process is out of file descriptors; there is no event to wait for.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection may be silent before the kernel asks whether the client is still there, and then between two questions. After the
/// ninth (tcp(7)) the connection is over.
const KEEP_ALIVE_SECONDS: u32 = 30;

/// A TLS record with the fatal alert of that name (RFC 6066, 3): rustls would say that the client lacks leave.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// Limits of the endpoint proxy.
#[derive(Debug, Clone)]
pub struct IngressConfig {
    /// A client must have finished the TLS handshake by then; 10 s.
    pub handshake_timeout: Duration,
    /// A client must have sent a request's headers by then, counted from the end of the previous request; 30 s.
    pub header_timeout: Duration,
    /// An HTTP/2 connection without a request under way is closed after this time; 5 min.
    pub idle_timeout: Duration,
    /// Bytes of a request's line and headers, beyond which it is answered 431; 64 KiB.
    pub max_header_bytes: usize,
    /// How much each MicroVM's endpoint may be used.
    pub limits: Limits,
    /// What is under way at shutdown may take this long to end; 3 s.
    pub drain_timeout: Duration,
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(300),
            max_header_bytes: 64 * 1024,
            limits: Limits::default(),
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
    let proxy = Arc::new(Proxy {
        plane,
        tls: AppTls::new(),
        ports: Ports::default(),
        limiter: Limiter::new(config.limits),
        tasks: tasks.clone(),
        cut: cut.clone(),
    });
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

/// What all connections share.
pub(crate) struct Server {
    tls: TlsAcceptor,
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) config: IngressConfig,
    pub(crate) shutdown: CancellationToken,
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
            Ok(Ok(stream)) => self.speak(stream).await,
            Ok(Err(error)) => debug!(%error, "the TLS handshake failed"),
            Err(_) => debug!(after = ?self.config.handshake_timeout, "the TLS handshake took too long"),
        }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        // Small writes are answers that somebody waits for.
        stream.set_nodelay(true)?;
        // A client whose network has gone says nothing, and may have a connection open that says nothing either.
        setsockopt(&stream, sockopt::KeepAlive, &true).and_then(|()| setsockopt(&stream, sockopt::TcpKeepIdle, &KEEP_ALIVE_SECONDS))?;
        setsockopt(&stream, sockopt::TcpKeepInterval, &KEEP_ALIVE_SECONDS)?;
        let mut hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let config = self.tls.config();
        if config.cert_resolver.resolve(hello.client_hello()).is_none() {
            hello.io.write_all(&UNRECOGNIZED_NAME).await?;
            hello.io.shutdown().await?;
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the client asks for a name that is no endpoint's"));
        }
        hello.into_stream(Arc::clone(config)).await
    }
}

/// Errors of `accept` that are about one connection (accept(2)), not about the listener.
fn is_the_client_s(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
