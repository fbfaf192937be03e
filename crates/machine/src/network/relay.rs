//! Connections that are made in a network namespace and end at an address of the host.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdTcpListener},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{NetworkError, io_error, tools::in_namespace};

/// Most connections at once to one shared address. More wait.
const MOST_SHARED: usize = 64;
/// How long the host's side may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// Pause after a failure to accept, such as a lack of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

const WHAT: &str = "sharing an address of the host";

/// Listens in a namespace.
pub async fn listen(namespace: &OwnedFd, address: SocketAddr) -> Result<TcpListener, NetworkError> {
    let bind = move || {
        let listener = StdTcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listener = in_namespace(namespace, WHAT, bind).await?;
    TcpListener::from_std(listener).map_err(io_error(WHAT))
}

/// Takes each connection to the host's address, until the handle is dropped.
pub fn start(listener: TcpListener, address: SocketAddr) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(serve(listener, address)))
}

async fn serve(listener: TcpListener, address: SocketAddr) {
    let places = Arc::new(Semaphore::new(MOST_SHARED));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("nobody closes it");
        while connections.try_join_next().is_some() {}
        let mut inner = match listener.accept().await {
            Ok((inner, _)) => inner,
            Err(error) => {
                tracing::warn!(%error, "{WHAT}");
                sleep(PAUSE).await;
                continue;
            }
        };
        connections.spawn(async move {
            let outer = timeout(CONNECT, TcpStream::connect(address)).await.map_err(io::Error::from).flatten();
            if let Ok(mut outer) = outer {
                // Each side sees how the other one ended.
                let _ = copy_bidirectional(&mut inner, &mut outer).await;
            }
            drop(place);
        });
    }
}
