//! What a shell's token opens, with a made-up guest that speaks of processes; and raw TCP.

use futures::{SinkExt, StreamExt};
use hearth_guest_protocol::{ExecInput, ExecOutput, ExitStatus, TerminalSize, read_message, write_message};
use http::{HeaderValue, Request};
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest, protocol::Role},
};

use crate::support::{self, Client2, Endpoint, HOST, PATIENCE, read_head};

type Socket<S = TlsStream<TcpStream>> = WebSocketStream<S>;

async fn open(endpoint: &Endpoint, protocols: &str) -> (Socket, Option<String>) {
    let mut request = format!("wss://{HOST}/shell").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::try_from(protocols).unwrap());
    let (socket, response) = client_async(request, endpoint.connect().await.0).await.unwrap();
    let selected = response.headers().get("sec-websocket-protocol").map(|value| value.to_str().unwrap().to_owned());
    (socket, selected)
}

fn offer(endpoint: &Endpoint, more: &str) -> String {
    format!("lambda-microvms, lambda-microvms.authentication.{}{more}", endpoint.shell_token())
}

async fn next<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut Socket<S>) -> Message {
    timeout(PATIENCE, socket.next()).await.expect("a message in time").unwrap().unwrap()
}

async fn text<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut Socket<S>) -> Value {
    serde_json::from_str(next(socket).await.to_text().unwrap()).unwrap()
}

async fn closed<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut Socket<S>) -> (u16, String) {
    let Message::Close(Some(frame)) = next(socket).await else { panic!("not closed") };
    (frame.code.into(), frame.reason.to_string())
}

/// Says what it hears, and ends with code 3 when it is told to exit.
async fn parrot(mut stream: TcpStream) {
    write_message(&mut stream, &ExecOutput::Started).await.unwrap();
    while let Ok(input) = read_message(&mut stream).await {
        match input {
            ExecInput::Stdin(bytes) if bytes == b"exit\n" => {
                let status = ExitStatus { code: 3, out_of_memory: false };
                return write_message(&mut stream, &ExecOutput::Exited(status)).await.unwrap();
            }
            ExecInput::Stdin(bytes) => {
                let length = u32::try_from(bytes.len()).unwrap();
                write_message(&mut stream, &ExecOutput::StdinTaken(length)).await.unwrap();
                write_message(&mut stream, &ExecOutput::Stdout(bytes)).await.unwrap();
            }
            other => write_message(&mut stream, &ExecOutput::Stderr(format!("{other:?}").into_bytes())).await.unwrap(),
        }
    }
}

#[tokio::test]
async fn the_service_s_shell() {
    let endpoint = Endpoint::with_raw(parrot).await;
    let (mut shell, selected) = open(&endpoint, &offer(&endpoint, ", lambda-microvms.port.8022")).await;
    assert_eq!(selected.as_deref(), Some("lambda-microvms"));
    let first = text(&mut shell).await;
    assert_eq!((&first["type"], first["session_id"].as_str().unwrap().len()), (&json!("session_init"), 36));

    shell.send(Message::binary("keys")).await.unwrap();
    assert_eq!(next(&mut shell).await.into_data().as_ref(), b"keys");
    shell.send(Message::text(r#"{"type":"resize","cols":80,"rows":24}"#)).await.unwrap();
    let resized = format!("{:?}", ExecInput::Resize(TerminalSize { columns: 80, rows: 24 }));
    assert_eq!(next(&mut shell).await.into_data().as_ref(), resized.as_bytes());
    shell.send(Message::text(r#"{"type":"unheard of"}"#)).await.unwrap();
    assert_eq!(next(&mut shell).await.into_data().as_ref(), br#"{"type":"unheard of"}"#);

    // More than may be under way at once.
    let much = vec![b'x'; 1 << 20];
    shell.send(Message::binary(much.clone())).await.unwrap();
    let mut back = Vec::new();
    while back.len() < much.len() {
        back.extend_from_slice(&next(&mut shell).await.into_data());
    }
    assert!(back == much);

    shell.send(Message::text("exit\n")).await.unwrap();
    assert_eq!(closed(&mut shell).await, (1000, "shell exited".to_owned()));
}

#[tokio::test]
async fn processes_have_codes_and_channels() {
    let endpoint = Endpoint::with_raw(parrot).await;
    let (mut exec, selected) = open(&endpoint, &offer(&endpoint, ", hearth.exec.v1")).await;
    assert_eq!(selected.as_deref(), Some("hearth.exec.v1"));
    exec.send(Message::text(r#"{"type":"start","argv":["parrot"]}"#)).await.unwrap();
    assert_eq!(text(&mut exec).await, json!({"type": "started"}));
    exec.send(Message::binary(b"\0in".as_slice())).await.unwrap();
    assert_eq!(text(&mut exec).await, json!({"type": "window", "bytes": 2}));
    assert_eq!(next(&mut exec).await.into_data().as_ref(), b"\x01in");
    exec.send(Message::text(r#"{"type":"signal","signal":15}"#)).await.unwrap();
    assert_eq!(next(&mut exec).await.into_data().as_ref(), b"\x02Signal(15)");
    exec.send(Message::binary(b"\0exit\n".as_slice())).await.unwrap();
    assert_eq!(text(&mut exec).await, json!({"type": "exited", "code": 3}));
    assert_eq!(closed(&mut exec).await.0, 1000);

    for (wrong, code) in [("{}", 1002), (r#"{"type":"start","colour":"red"}"#, 1002)] {
        let (mut exec, _) = open(&endpoint, &offer(&endpoint, ", hearth.exec.v1")).await;
        exec.send(Message::text(wrong)).await.unwrap();
        assert_eq!(closed(&mut exec).await.0, code, "{wrong}");
    }
}

/// RFC 8441: a shell and a process, each on a stream of one connection.
#[tokio::test]
async fn shells_over_http2() {
    let endpoint = Endpoint::with_raw(parrot).await;
    let mut client = Client2::new(&endpoint).await;
    // An answer says that the server's settings are here, which allow what follows.
    let plain = Request::get(format!("https://{HOST}/")).body(support::text("")).unwrap();
    assert_eq!(client.send(plain).await.unwrap().status(), 403);
    let mut open = async |more: &str| {
        let request = Request::connect(format!("https://{HOST}/shell"))
            .extension(Protocol::from_static("websocket"))
            .header("sec-websocket-version", "13")
            .header("sec-websocket-protocol", offer(&endpoint, more))
            .body(support::text(""))
            .unwrap();
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(!answer.headers().contains_key("sec-websocket-accept"));
        let selected = answer.headers()["sec-websocket-protocol"].to_str().unwrap().to_owned();
        let stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
        (WebSocketStream::from_raw_socket(stream, Role::Client, None).await, selected)
    };

    let (mut shell, selected) = open("").await;
    assert_eq!(selected, "lambda-microvms");
    assert_eq!(text(&mut shell).await["type"], "session_init");
    shell.send(Message::binary("keys")).await.unwrap();
    assert_eq!(next(&mut shell).await.into_data().as_ref(), b"keys");

    let (mut exec, selected) = open(", hearth.exec.v1").await;
    assert_eq!(selected, "hearth.exec.v1");
    exec.send(Message::text(r#"{"type":"start","argv":["parrot"]}"#)).await.unwrap();
    assert_eq!(text(&mut exec).await, json!({"type": "started"}));
    exec.send(Message::binary(b"\0exit\n".as_slice())).await.unwrap();
    assert_eq!(text(&mut exec).await, json!({"type": "exited", "code": 3}));
    assert_eq!(closed(&mut exec).await.0, 1000);

    shell.send(Message::text("exit\n")).await.unwrap();
    assert_eq!(closed(&mut shell).await, (1000, "shell exited".to_owned()));
}

#[tokio::test]
async fn a_microvm_that_goes_says_so() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        read_message::<ExecInput>(&mut stream).await.unwrap();
    })
    .await;
    let (mut shell, _) = open(&endpoint, &offer(&endpoint, "")).await;
    text(&mut shell).await;
    shell.send(Message::binary("x")).await.unwrap();
    assert_eq!(closed(&mut shell).await, (1001, "the MicroVM was suspended or has ended".to_owned()));
}

#[tokio::test]
async fn a_shell_s_token_opens_no_port() {
    let endpoint = Endpoint::with_raw(|_| async { panic!("nobody may get here") }).await;
    let auth = format!("x-aws-proxy-auth: {}", endpoint.shell_token());
    let answer = endpoint.curl_as(HOST, "/", &["-H", &auth]).await.unwrap();
    assert_eq!((answer.status, answer.text()), (502, ""));
}

#[tokio::test]
async fn raw_tcp_ends_in_each_direction_on_its_own() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        let mut received = Vec::new();
        stream.read_to_end(&mut received).await.unwrap();
        received.reverse();
        stream.write_all(&received).await.unwrap();
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "GET / HTTP/1.1", &["connection: upgrade", "upgrade: hearth-tcp"]).await;
    let head = read_head(&mut client.0).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    client.send("not HTTP").await;
    client.0.shutdown().await.unwrap();
    assert_eq!(client.rest().await.unwrap(), "PTTH ton");
}
