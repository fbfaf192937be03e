//! An endpoint with a made-up MicroVM behind it, and clients for it.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use hearth_control::{
    plane::{Activity, Admission, ConnectError, DataPlane, Refusal},
    token::{Claims, Keyring, TokenKind},
    types::PortSpec,
};
use hearth_ingress::{EndpointCertificates, IngressConfig, LocalCa, serve, server_config};
use hearth_machine::{GuestStream, Target};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::Incoming,
    client::conn::http2,
    server::conn::{self as server, http1},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

pub const VM: &str = "microvm-0d2b7a54-5f0a-4f1c-9a53-0a3f3f6f2a11";
pub const HOST: &str = "5c1d.lambda-microvm.us-east-1.localhost";
/// The same MicroVM, in a region whose certificate has not been made yet.
pub const ELSEWHERE: &str = "5c1d.lambda-microvm.eu-west-1.localhost";

/// Nothing in these tests takes this long.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub fn text(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed_unsync()
}

/// What happens to those who connect to the MicroVM.
#[derive(Clone, Copy)]
pub enum Guest {
    At(SocketAddr),
    Unreachable,
    TooSlow,
}

pub struct FakePlane {
    keyring: Keyring,
    pub guest: Mutex<Guest>,
    pub awake: watch::Sender<bool>,
    /// How many wait for it to wake.
    pub waiting: watch::Sender<usize>,
    pub activity: Arc<Activity>,
}

struct Waiting<'a>(&'a watch::Sender<usize>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[async_trait]
impl DataPlane for FakePlane {
    fn admit(&self, host: &str, token: &str, port: u16) -> Result<Admission, Refusal> {
        let claims = self.keyring.verify(token, SystemTime::now())?;
        if claims.microvm_id != VM || ![HOST, ELSEWHERE].contains(&host) {
            return Err(Refusal::AuthenticationFailed);
        }
        if claims.kind == TokenKind::Http && !claims.allows(port) {
            return Err(Refusal::PortDenied);
        }
        Ok(Admission { microvm_id: VM.into(), kind: claims.kind, port, memory_mib: 512, activity: self.activity.clone() })
    }

    async fn open(&self, _: &Admission, _: &Target) -> Result<Box<dyn GuestStream>, ConnectError> {
        self.waiting.send_modify(|count| *count += 1);
        let _waiting = Waiting(&self.waiting);
        self.awake.subscribe().wait_for(|awake| *awake).await.expect("the plane is there");
        let guest = *self.guest.lock().unwrap();
        match guest {
            Guest::At(address) => match TcpStream::connect(address).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(ConnectError::Unreachable(error.to_string())),
            },
            Guest::Unreachable => Err(ConnectError::Unreachable("nothing listens".into())),
            Guest::TooSlow => Err(ConnectError::TooSlow(Duration::from_secs(30))),
        }
    }
}

/// A running endpoint proxy.
pub struct Endpoint {
    pub address: SocketAddr,
    pub plane: Arc<FakePlane>,
    pub shutdown: CancellationToken,
    pub served: JoinHandle<()>,
    pub dir: TempDir,
}

/// What curl got.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// The value of a header in a message's head.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

impl Endpoint {
    pub async fn start(guest: Guest) -> Self {
        Self::start_with(guest, IngressConfig::default()).await
    }

    pub async fn start_with(guest: Guest, config: IngressConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = LocalCa::load_or_create(dir.path(), "localhost").unwrap();
        let plane = Arc::new(FakePlane {
            keyring: Keyring::load_or_create(&dir.path().join("keys")).unwrap(),
            guest: Mutex::new(guest),
            awake: watch::Sender::new(true),
            waiting: watch::Sender::new(0),
            activity: Arc::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = server_config(Arc::new(EndpointCertificates::new(ca, "localhost"))).unwrap();
        let shutdown = CancellationToken::new();
        let served = tokio::spawn(serve(vec![listener], tls, plane.clone(), config, shutdown.clone()));
        Self { address, plane, shutdown, served, dir }
    }

    /// An endpoint whose application is a hyper service.
    pub async fn with_app<F, R>(app: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::start(Guest::At(app_guest(app).await)).await
    }

    /// An endpoint whose application is a script on a raw connection.
    pub async fn with_raw<F, R>(script: F) -> Self
    where
        F: Fn(TcpStream) -> R + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        Self::start(Guest::At(raw_guest(script).await)).await
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    pub fn token(&self) -> String {
        self.token_for(VM, vec![PortSpec::Port(8080), PortSpec::Range(9000, 9010)], Duration::from_secs(60))
    }

    pub fn token_for(&self, vm: &str, ports: Vec<PortSpec>, lifetime: Duration) -> String {
        self.plane.keyring.mint(Claims::http(vm, ports, SystemTime::now(), lifetime))
    }

    pub fn shell_token(&self) -> String {
        self.plane.keyring.mint(Claims::shell(VM, SystemTime::now(), Duration::from_secs(60)))
    }

    pub fn auth(&self) -> String {
        format!("x-aws-proxy-auth: {}", self.token())
    }

    /// Runs curl with a token, in HTTP/1.1 unless it is told otherwise, and expects an answer.
    pub async fn curl(&self, path: &str, arguments: &[&str]) -> Answer {
        let auth = self.auth();
        self.curl_as(HOST, path, &[&["-H", &auth], arguments].concat()).await.unwrap()
    }

    /// Runs curl; an error is what it says on stderr.
    pub async fn curl_as(&self, host: &str, path: &str, arguments: &[&str]) -> Result<Answer, String> {
        let scratch = tempfile::tempdir().unwrap();
        let (head, body) = (scratch.path().join("head"), scratch.path().join("body"));
        let port = self.address.port();
        let run = Command::new("curl")
            .args(["-sS", "--noproxy", "*", "--max-time", "30", "--http1.1", "-w", "%{http_code}", "--cacert"])
            .arg(self.ca())
            .args(["--resolve", &format!("{host}:{port}:127.0.0.1"), "-D"])
            .args([&head, &"-o".into(), &body])
            .args(arguments)
            .arg(format!("https://{host}:{port}{path}"))
            .stdin(Stdio::null())
            .output();
        let output = run.await.unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(Answer {
            status: String::from_utf8_lossy(&output.stdout).parse().unwrap(),
            head: std::fs::read_to_string(head).unwrap(),
            body: std::fs::read(body).unwrap_or_default(),
        })
    }

    /// Opens a TLS connection to write HTTP by hand.
    pub async fn connect(&self) -> Client {
        Client::new(self.address, &self.ca(), HOST).await.unwrap()
    }
}

/// An HTTP/2 client with one connection.
#[derive(Clone)]
pub struct Client2(pub http2::SendRequest<Body>);

impl Client2 {
    pub async fn new(endpoint: &Endpoint) -> Self {
        let stream = Client::speaking(&["h2"], endpoint.address, &endpoint.ca(), HOST).await.unwrap().0;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    pub async fn send(&mut self, request: Request<Body>) -> hyper::Result<Response<Incoming>> {
        self.0.ready().await?;
        timeout(PATIENCE, self.0.send_request(request)).await.expect("an answer in time")
    }
}

/// A request with a token, for [`Client2`].
pub fn request2(endpoint: &Endpoint, method: &str, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(format!("https://{HOST}{path}")).header("x-aws-proxy-auth", endpoint.token())
}

/// A body that the test sends piece by piece.
pub fn trickle() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, mut receiver) = mpsc::channel(1);
    let frames = futures::stream::poll_fn(move |cx| receiver.poll_recv(cx).map(|frame| frame.map(Ok)));
    (sender, StreamBody::new(frames).boxed_unsync())
}

pub fn data(bytes: &'static str) -> Frame<Bytes> {
    Frame::data(Bytes::from_static(bytes.as_bytes()))
}

/// Serves an application on a free port for as long as the test runs.
pub async fn app_guest<F, R>(app: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    raw_guest(move |stream| {
        let app = app.clone();
        async move {
            let service = service_fn(move |request| {
                let answer = app(request);
                async { Ok::<_, Infallible>(answer.await) }
            });
            // Applications see connections end early here.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
        }
    })
    .await
}

/// Serves an application that speaks nothing but HTTP/2 in plain text.
pub async fn h2c_guest<F, R>(app: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    raw_guest(move |stream| {
        let app = app.clone();
        async move {
            let service = service_fn(move |request| {
                let answer = app(request);
                async { Ok::<_, Infallible>(answer.await) }
            });
            let _ = server::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await
}

/// Runs a script on every connection to a free port.
pub async fn raw_guest<F, R>(script: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(script(stream));
        }
    });
    address
}

/// Reads up to and with the blank line that ends a message's head.
pub async fn read_head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    let read = async {
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => break,
            }
        }
    };
    timeout(PATIENCE, read).await.expect("a message's head arrives in time");
    String::from_utf8(head).unwrap()
}

/// An HTTP/1.1 client that says exactly what it is told to.
pub struct Client(pub TlsStream<TcpStream>);

impl Client {
    pub async fn new(address: SocketAddr, ca: &std::path::Path, name: &str) -> std::io::Result<Self> {
        Self::speaking(&[], address, ca, name).await
    }

    /// Opens a connection for one of these protocols.
    pub async fn speaking(protocols: &[&str], address: SocketAddr, ca: &std::path::Path, name: &str) -> std::io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self(TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await?))
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
        self.0.flush().await.unwrap();
    }

    /// Sends a request's head: the line, `Host`, the token and more headers.
    pub async fn request(&mut self, endpoint: &Endpoint, line: &str, headers: &[&str]) {
        let mut head = format!("{line}\r\nhost: {HOST}\r\n{}\r\n", endpoint.auth());
        for header in headers {
            head += header;
            head += "\r\n";
        }
        self.send(head + "\r\n").await;
    }

    pub async fn head(&mut self) -> String {
        read_head(&mut self.0).await
    }

    pub async fn exactly(&mut self, length: usize) -> String {
        let mut bytes = vec![0; length];
        timeout(PATIENCE, self.0.read_exact(&mut bytes)).await.expect("the bytes arrive in time").unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Everything until the connection ends.
    pub async fn rest(&mut self) -> std::io::Result<String> {
        let mut text = String::new();
        timeout(PATIENCE, self.0.read_to_string(&mut text)).await.expect("the connection ends in time")?;
        Ok(text)
    }
}
