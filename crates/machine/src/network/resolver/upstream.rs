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

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::OpCode,
        rr::{Name, RData, Record, RecordType, rdata::A},
    };
    use tokio::net::TcpListener;

    use super::*;

    fn query() -> Query {
        Query::query(Name::from_ascii("www.example.com.").unwrap(), RecordType::A)
    }

    /// An answer with an address whose last byte tells where it came from.
    fn answer(request: &[u8], last: u8) -> Message {
        let request = Message::from_vec(request).unwrap();
        let mut response = Message::response(request.metadata.id, OpCode::Query);
        let name = request.queries[0].name.clone();
        response.add_query(request.queries[0].clone());
        response.add_answer(Record::from_rdata(name, 60, RData::A(A(Ipv4Addr::new(192, 0, 2, last)))));
        response
    }

    /// A resolver that answers a question with these datagrams.
    async fn server(datagrams: fn(&[u8]) -> Vec<Message>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                for message in datagrams(&buffer[..length]) {
                    socket.send_to(&message.to_vec().unwrap(), peer).await.unwrap();
                }
            }
        });
        address
    }

    async fn ask(servers: Vec<SocketAddr>) -> u8 {
        let response = Upstream::new(servers).ask(&query()).await.unwrap();
        match &response.answers[0].data {
            RData::A(address) => address.0.octets()[3],
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_answers_another_question_is_passed_over() {
        let forging = server(|request| {
            let mut other_id = answer(request, 1);
            other_id.metadata.id ^= 1;
            let mut other_name = answer(request, 2);
            other_name.queries[0].name = Name::from_ascii("www.example.org.").unwrap();
            let mut no_answer = answer(request, 3);
            no_answer.metadata.message_type = MessageType::Query;
            vec![other_id, other_name, no_answer, answer(request, 4)]
        });
        assert_eq!(ask(vec![forging.await]).await, 4);
    }

    #[tokio::test]
    async fn the_next_resolver_is_asked_when_one_fails_or_is_not_there() {
        let failing = server(|request| {
            let mut failure = answer(request, 1);
            failure.metadata.response_code = ResponseCode::ServFail;
            vec![failure]
        });
        let working = server(|request| vec![answer(request, 2)]);
        let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(ask(vec![nobody, failing.await, working.await]).await, 2);
        let error = Upstream::new(vec![nobody]).ask(&query()).await.unwrap_err();
        assert!(error.to_string().contains(&nobody.to_string()), "{error}");
        assert!(matches!(Upstream::new(Vec::new()).ask(&query()).await, Err(AskError::NoServer)));
    }

    #[tokio::test]
    async fn a_cut_answer_is_asked_for_again_by_tcp() {
        let address = server(|request| vec![answer(request, 1).truncate()]).await;
        let listener = TcpListener::bind(address).await.unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut request).await.unwrap();
            let bytes = answer(&request, 2).to_vec().unwrap();
            stream.write_u16(u16::try_from(bytes.len()).unwrap()).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
        });
        assert_eq!(ask(vec![address]).await, 2);
    }
}
