//! The metadata service: what EC2's is to an instance, at the same address, in the version that wants a token (IMDSv2; SPEC 12).
//!
//! ```text
//! the app's network                        a network of the service's own
//!   hearth 169.254.169.253 ◀── veth ──▶ 169.254.169.254:80    ─▶ http   ─▶ host ─▶ a stream for each question
//!                                       169.254.169.254:8470  ─▶ door   ─▶ host ─▶ a stream for each connection to the API
//! ```
//!
//! The service listens in a network namespace of its own, so that the app may have port 80 of every address of its own, and so that nothing
//! leaves the machine. It keeps nothing that the host answers: no snapshot has credentials in it. It outlives sessions with the host; a
//! question that comes between two waits for the next.

mod answer;
mod door;
mod host;
mod http;
mod link;
mod tokens;

use std::sync::Arc;

use hearth_guest_protocol::Mux;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::sleep,
};

use self::{host::Host, tokens::Tokens};

/// Connections that are served at once; the app's further ones wait. PID 1 needs its descriptors for other things, too.
const CONNECTIONS: usize = 128;
/// A listener that fails is tried again after this.
const RETRY: std::time::Duration = std::time::Duration::from_millis(200);

/// The service. It runs until the machine ends.
pub struct Metadata {
    sessions: watch::Sender<Option<Mux>>,
    tokens: Arc<Tokens>,
    vm_id: String,
}

impl Metadata {
    /// Starts it. Without the devices it takes there is no service, and the app may do without.
    pub fn start() -> Self {
        let (sessions, watched) = watch::channel(None);
        let (host, tokens) = (Host::new(watched), Arc::new(Tokens::default()));
        match link::listen().and_then(|listeners| Ok((TcpListener::from_std(listeners.http)?, TcpListener::from_std(listeners.api)?))) {
            Ok((http, api)) => {
                let (asked, tokens) = (host.clone(), Arc::clone(&tokens));
                tokio::spawn(accept(http, move |connection| http::serve(connection, asked.clone(), Arc::clone(&tokens))));
                tokio::spawn(accept(api, move |connection| door::serve(connection, host.clone())));
            }
            Err(error) => eprintln!("hearth-guest: there is no metadata service: {error}"),
        }
        Self { sessions, tokens, vm_id: String::new() }
    }

    /// A session with the host has begun.
    pub fn enter(&mut self, session: Mux, vm_id: &str) {
        if self.vm_id != vm_id {
            // A clone is another machine than the one that the snapshot was taken of.
            self.tokens.forget();
            vm_id.clone_into(&mut self.vm_id);
        }
        self.sessions.send_replace(Some(session));
    }

    /// It ends.
    pub fn leave(&self) {
        self.sessions.send_replace(None);
    }
}

/// Serves each connection in a task of its own.
async fn accept<F: Future<Output = ()> + Send + 'static>(listener: TcpListener, serve: impl Fn(TcpStream) -> F) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((connection, _)) => {
                let served = serve(connection);
                tokio::spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                eprintln!("hearth-guest: accepting at the metadata address: {error}");
                sleep(RETRY).await;
            }
        }
    }
}
