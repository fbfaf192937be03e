//! Asking the host's resolvers.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// One resolver may take that long.
const TRY: Duration = Duration::from_millis(1500);
/// Each resolver is asked so often. All tries end before the usual client's five seconds, with the usual one or two resolvers.
const ROUNDS: usize = 2;
/// More resolvers than this are not asked.
const MOST_SERVERS: usize = 3;
/// Bytes of an answer over UDP that are announced as welcome.
const DATAGRAM: u16 = 1232;

/// The host's resolvers.
#[derive(Debug)]
pub struct Upstream {
    servers: Vec<SocketAddr>,
}

/// No resolver had an answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// there is none
    #[error("the host has no resolver")]
    NoServer,
    /// the last one asked failed
    #[error("{server} did not answer: {source}")]
    Server {
        /// Its address.
        server: SocketAddr,
        /// What went wrong.
        source: io::Error,
    },
}

impl Upstream {
    /// Asks these, in their order.
    pub fn new(mut servers: Vec<SocketAddr>) -> Self {
        servers.truncate(MOST_SERVERS);
        Self { servers }
    }

    /// An answer that says that the name exists, or that it does not.
    pub async fn ask(&self, query: &Query) -> Result<Message, AskError> {
        let mut last = AskError::NoServer;
        for &server in self.servers.iter().cycle().take(ROUNDS * self.servers.len()) {
            let asked = timeout(TRY, ask(server, query)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            match asked {
                Ok(response) => return Ok(response),
                Err(source) => last = AskError::Server { server, source },
            }
        }
        Err(last)
    }
}

async fn ask(server: SocketAddr, query: &Query) -> io::Result<Message> {
    let mut request = Message::query();
    request.metadata.recursion_desired = true;
    request.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(DATAGRAM);
    request.set_edns(edns);
    let bytes = request.to_vec().map_err(io::Error::other)?;
    let mut response = by_udp(server, &request, &bytes).await?;
    if response.metadata.truncation {
        response = by_tcp(server, &request, &bytes).await?;
    }
    match response.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => Ok(response),
        code => Err(io::Error::other(format!("it said {code}"))),
    }
}

/// From a port of its own, which the kernel picks at random: together with the id, that is what a forger has to guess.
async fn by_udp(server: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: SocketAddr = if server.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = [0; DATAGRAM as usize];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(response) = read(request, &buffer[..length]) {
            return Ok(response);
        }
    }
}

async fn by_tcp(server: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let mut response = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut response).await?;
    read(request, &response).ok_or_else(|| io::Error::other("it answered another question"))
}

/// The response to a request, unless it is something else.
fn read(request: &Message, bytes: &[u8]) -> Option<Message> {
    let response = Message::from_vec(bytes).ok()?;
    let (asked, answered) = (request.queries.first()?, response.queries.first()?);
    let same = response.metadata.id == request.metadata.id
        && response.metadata.message_type == MessageType::Response
        && asked.query_type == answered.query_type
        && asked.name.to_lowercase() == answered.name.to_lowercase();
    same.then_some(response)
}
