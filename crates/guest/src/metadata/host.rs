//! The way to the host, whichever session it leads through.

use std::time::Duration;

use hearth_guest_protocol::{
    Carrier, MetadataReply, MetadataRequest, Mux, MuxError, Stream, StreamHeader, WireError, read_message, write_message,
};
use tokio::{sync::watch, time::timeout};

/// How long a question waits for a session. The next one follows at once, unless the machine is being suspended: then it lies in the sleep.
const SESSION: Duration = Duration::from_secs(10);
/// How long the host may take: a little longer than it allows itself.
const ANSWER: Duration = Duration::from_secs(25);
/// Sessions in which a question is asked before it is given up.
const TRIES: usize = 3;

/// The host did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    #[error("there is no session with the host")]
    NoSession,
    #[error("the host did not answer within {} s", ANSWER.as_secs())]
    Late,
    #[error("the session with the host ended")]
    Ended,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Host {
    sessions: watch::Receiver<Option<Mux>>,
}

impl Host {
    pub fn new(sessions: watch::Receiver<Option<Mux>>) -> Self {
        Self { sessions }
    }

    /// Asks; again in the next session if the present one ends.
    pub async fn ask(&self, request: MetadataRequest) -> Result<MetadataReply, Unanswered> {
        let mut sessions = self.sessions.clone();
        for _ in 0..TRIES {
            match ask_in(&session(&mut sessions).await?, request.clone()).await {
                Err(Unanswered::Ended) => renewed(&mut sessions).await?,
                answered => return answered,
            }
        }
        Err(Unanswered::Ended)
    }

    /// Asks in one session only: for what must not happen twice.
    pub async fn ask_once(&self, request: MetadataRequest) -> Result<MetadataReply, Unanswered> {
        ask_in(&session(&mut self.sessions.clone()).await?, request).await
    }

    /// A connection to the host's API, and what resolves when its session is over.
    pub async fn api(&self) -> Result<(Carrier, impl Future<Output = ()> + use<>), Unanswered> {
        let mut sessions = self.sessions.clone();
        let session = session(&mut sessions).await?;
        let stream = open(&session, StreamHeader::Api).await.map_err(|_| Unanswered::Ended)?;
        let over = async move {
            // The service outlives every session; its end is as good as a session's.
            let _ = sessions.changed().await;
        };
        Ok((Carrier::new(stream), over))
    }
}

async fn session(sessions: &mut watch::Receiver<Option<Mux>>) -> Result<Mux, Unanswered> {
    let found = timeout(SESSION, sessions.wait_for(Option::is_some)).await;
    let found = found.map_err(|_| Unanswered::NoSession)?.map_err(|_| Unanswered::NoSession)?;
    found.clone().ok_or(Unanswered::NoSession)
}

/// Waits for the news that a session has ended, which may come a little after its streams have.
async fn renewed(sessions: &mut watch::Receiver<Option<Mux>>) -> Result<(), Unanswered> {
    let changed = timeout(SESSION, sessions.changed()).await;
    changed.map_err(|_| Unanswered::Ended)?.map_err(|_| Unanswered::Ended)
}

async fn ask_in(session: &Mux, request: MetadataRequest) -> Result<MetadataReply, Unanswered> {
    let exchange = async {
        let mut stream = open(session, StreamHeader::Metadata).await?;
        write_message(&mut stream, &request).await?;
        Ok::<_, Lost>(read_message(&mut stream).await?)
    };
    let answered = timeout(ANSWER, exchange).await.map_err(|_| Unanswered::Late)?;
    answered.map_err(|_| Unanswered::Ended)
}

async fn open(session: &Mux, header: StreamHeader) -> Result<Stream, Lost> {
    let mut stream = session.open().await?;
    write_message(&mut stream, &header).await?;
    Ok(stream)
}

/// The stream ended; the reason is the session's.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Mux(#[from] MuxError),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// A host to ask, for tests.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// Keeps a session alive.
    pub struct Session {
        _host: Mux,
        _guest: tokio::task::JoinHandle<()>,
    }

    /// A session whose host answers every question thus; without an answer it ends at the first question.
    pub fn session(answer: impl Fn(MetadataRequest) -> Option<MetadataReply> + Send + Sync + 'static) -> (Mux, Session) {
        let (near, far) = tokio::io::duplex(4096);
        let (host, mut host_driver) = Mux::client(near);
        let (guest, guest_driver) = Mux::server(far);
        tokio::spawn(async move {
            while let Some(mut stream) = host_driver.inbound.recv().await {
                let StreamHeader::Metadata = read_message(&mut stream).await.unwrap() else { continue };
                match answer(read_message(&mut stream).await.unwrap()) {
                    Some(reply) => write_message(&mut stream, &reply).await.unwrap(),
                    None => host_driver.task.abort(),
                }
            }
        });
        (guest, Session { _host: host, _guest: guest_driver.task })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLY: MetadataReply = MetadataReply::Done;

    #[tokio::test]
    async fn a_question_between_two_sessions_is_asked_in_the_next() {
        let (enter, sessions) = watch::channel(None);
        let host = Host::new(sessions);
        let asked = tokio::spawn(async move { host.ask(MetadataRequest::Region).await });
        tokio::task::yield_now().await;
        let (mux, _alive) = testing::session(|_| Some(REPLY));
        enter.send_replace(Some(mux));
        assert_eq!(asked.await.unwrap().unwrap(), REPLY);
    }

    #[tokio::test]
    async fn a_question_that_a_session_takes_along_is_asked_again_unless_once_is_enough() {
        let (ending, _alive) = testing::session(|_| None);
        let (enter, sessions) = watch::channel(Some(ending));
        let host = Host::new(sessions);
        assert!(matches!(host.ask_once(MetadataRequest::Suspend).await, Err(Unanswered::Ended)));

        let asked = tokio::spawn(async move { host.ask(MetadataRequest::Region).await });
        tokio::task::yield_now().await;
        enter.send_replace(None);
        let (mux, _alive) = testing::session(|_| Some(REPLY));
        enter.send_replace(Some(mux));
        assert_eq!(asked.await.unwrap().unwrap(), REPLY);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let (_enter, sessions) = watch::channel(None);
        assert!(matches!(Host::new(sessions).ask(MetadataRequest::Region).await, Err(Unanswered::NoSession)));
    }
}
