//! A slot's resolver: answers the guest's questions for the names that its policy allows, and lets it through to the answers.
//!
//! It listens on the slot's address inside the slot, asks the host's resolvers from the host's side, and opens the slot's [`Doors`] to the
//! addresses in an answer before the guest gets it, so that the connection that follows finds them open. A name that the policy does not allow
//! does not exist (NXDOMAIN): of the possible refusals the one that every client takes for an answer at once; some resolvers in guests wait
//! for another one after REFUSED. Slots have no IPv6, so there are never addresses of that kind.
//!
//! The guest is not trusted: what it sends is limited in size, in number at a time and in time.

mod answer;
pub mod upstream;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::op::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::{sleep, timeout},
};

use self::{
    answer::{Verdict, failed, judge, refused, relay, to_bytes, unreadable},
    upstream::Upstream,
};
use super::{doors::Doors, egress::EgressPolicy};

/// Questions over UDP that are answered at a time; more wait in the socket.
const MOST_QUESTIONS: usize = 64;
/// Connections at a time; more wait to be accepted.
const MOST_CONNECTIONS: usize = 16;
/// Bytes of the largest question that is read.
const LARGEST_QUESTION: usize = 2048;
/// Bytes of the largest answer over UDP.
const LARGEST_DATAGRAM: u16 = 1232;
/// How long a connection may last. It takes a few questions.
const CONNECTION: Duration = Duration::from_secs(15);
/// How long to wait after the socket failed, as when the host is out of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// What answers are made from.
#[derive(Debug)]
pub struct Resolver {
    pub policy: EgressPolicy,
    pub doors: Doors,
    pub upstream: Upstream,
}

/// Answers until it is dropped.
pub async fn serve(udp: UdpSocket, tcp: TcpListener, resolver: Resolver) {
    let (udp, resolver) = (Arc::new(udp), Arc::new(resolver));
    let (mut questions, mut connections) = (JoinSet::new(), JoinSet::new());
    let mut buffer = [0; LARGEST_QUESTION];
    loop {
        let error = tokio::select! {
            received = udp.recv_from(&mut buffer), if questions.len() < MOST_QUESTIONS => match received {
                Ok((length, guest)) => {
                    let question = buffer[..length].to_vec();
                    questions.spawn(datagram(resolver.clone(), udp.clone(), question, guest));
                    None
                }
                Err(error) => Some(error),
            },
            accepted = tcp.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let resolver = resolver.clone();
                    connections.spawn(async move {
                        // The guest sees how it ended.
                        let _ = timeout(CONNECTION, connection(&resolver, stream)).await;
                    });
                    None
                }
                Err(error) => Some(error),
            },
            Some(_) = questions.join_next() => None,
            Some(_) = connections.join_next() => None,
        };
        if let Some(error) = error {
            tracing::warn!(%error, "a slot's resolver cannot receive");
            sleep(PAUSE).await;
        }
    }
}

async fn datagram(resolver: Arc<Resolver>, udp: Arc<UdpSocket>, question: Vec<u8>, guest: SocketAddr) {
    if let Some((answer, limit)) = resolver.answer(&question).await
        && let Some(bytes) = to_bytes(&answer, usize::from(limit.min(LARGEST_DATAGRAM)))
    {
        // It asks again when it gets nothing.
        let _ = udp.send_to(&bytes, guest).await;
    }
}

/// Questions and answers, each after its length (RFC 7766).
async fn connection(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let length = usize::from(stream.read_u16().await?);
        if length > LARGEST_QUESTION {
            return Ok(());
        }
        let mut question = vec![0; length];
        stream.read_exact(&mut question).await?;
        let answer = resolver.answer(&question).await.and_then(|(answer, _)| to_bytes(&answer, usize::from(u16::MAX)));
        let Some(answer) = answer else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat()).await?;
    }
}

impl Resolver {
    /// The answer, and the bytes that the guest takes in a datagram. None for what no answer is due to.
    async fn answer(&self, question: &[u8]) -> Option<(Message, u16)> {
        let Ok(request) = Message::from_vec(question) else { return Some((unreadable(question)?, LARGEST_DATAGRAM)) };
        let answer = match judge(&self.policy, &request) {
            Verdict::Ignore => return None,
            Verdict::Answer(answer) => answer,
            Verdict::Ask(name) => self.ask(&request, &name).await,
        };
        Some((answer, request.max_payload()))
    }

    async fn ask(&self, request: &Message, name: &str) -> Message {
        let query = &request.queries[0];
        let response = match self.upstream.ask(query).await {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(name, %error, "a name could not be resolved");
                return failed(request);
            }
        };
        let Some(relayed) = relay(&self.policy, request, &response) else { return refused(request) };
        if relayed.openings.is_empty() {
            return relayed.answer;
        }
        match self.doors.open(&self.policy.doors_of(name), &relayed.openings, relayed.time).await {
            Ok(()) => relayed.answer,
            Err(error) => {
                tracing::warn!(name, %error, "a slot could not be opened to the addresses of a name");
                failed(request)
            }
        }
    }
}
