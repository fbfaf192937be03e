//! Connections that switch protocols.

use http::Request;
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::support::{Client, Client2, Endpoint, HOST, PATIENCE, header, read_head, text};

const HANDSHAKE: [&str; 4] =
    ["connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="];

/// An application that accepts the handshake, tells which headers it saw, and then echoes.
async fn echo(answer: &'static str) -> Endpoint {
    Endpoint::with_raw(move |mut stream| async move {
        let head = read_head(&mut stream).await;
        let accepted = format!(
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n{answer}\r\n{head}"
        );
        stream.write_all(accepted.as_bytes()).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        tokio::io::copy(&mut reader, &mut writer).await.ok();
    })
    .await
}

async fn handshake(client: &mut Client, more: &[&str]) -> String {
    let host = format!("host: {HOST}");
    let head = ["GET /socket HTTP/1.1", &host].into_iter().chain(HANDSHAKE).chain(more.iter().copied());
    client.send(head.collect::<Vec<_>>().join("\r\n") + "\r\n\r\n").await;
    client.head().await
}

#[tokio::test]
async fn bytes_cross_in_both_directions_and_count_as_activity() {
    let endpoint = echo("").await;
    let mut client = endpoint.connect().await;
    let head = handshake(&mut client, &[&endpoint.auth()]).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert_eq!(header(&head, "upgrade"), Some("websocket"));
    assert_eq!(header(&head, "connection"), Some("upgrade"));
    assert_eq!(header(&head, "sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(header(&head, "sec-websocket-protocol"), None, "the client offered none");

    let seen = client.head().await;
    assert!(seen.starts_with("GET /socket HTTP/1.1"), "{seen}");
    assert_eq!(header(&seen, "upgrade"), Some("websocket"));
    assert_eq!(header(&seen, "connection"), Some("upgrade"));
    assert_eq!(header(&seen, "x-aws-proxy-auth"), None);

    let before = endpoint.plane.activity.last();
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    for message in ["\u{1}ping", "more"] {
        client.send(message).await;
        assert_eq!(client.exactly(message.len()).await, message);
    }
    assert!(endpoint.plane.activity.last() > before);

    client.0.shutdown().await.unwrap();
    assert_eq!(client.0.read(&mut [0; 8]).await.unwrap(), 0, "an end on one side ends the other in order");
}

#[tokio::test]
async fn browsers_authenticate_with_subprotocols() {
    for (app_selects, client_gets) in [("", "lambda-microvms"), ("sec-websocket-protocol: myapp.v1\r\n", "myapp.v1")] {
        let endpoint = echo(app_selects).await;
        let mut client = endpoint.connect().await;
        let offer = format!(
            "sec-websocket-protocol: lambda-microvms, lambda-microvms.authentication.{}, lambda-microvms.port.9000, myapp.v1",
            endpoint.token()
        );
        let head = handshake(&mut client, &[&offer]).await;
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert_eq!(header(&head, "sec-websocket-protocol"), Some(client_gets));
        assert_eq!(header(&client.head().await, "sec-websocket-protocol"), Some("myapp.v1"));
    }
}

/// RFC 8441, as browsers open WebSockets where they have a connection in HTTP/2 already.
#[tokio::test]
async fn a_stream_of_http2_becomes_a_websocket() {
    let endpoint = echo("").await;
    let mut client = Client2::new(&endpoint).await;
    // An answer says that the server's settings are here, which allow what follows.
    let plain = Request::get(format!("https://{HOST}/")).body(text("")).unwrap();
    assert_eq!(client.send(plain).await.unwrap().status(), 403);
    let connect = |client: &mut Client2, protocol: &'static str, offer: &str| {
        let request = Request::connect(format!("https://{HOST}/socket"))
            .extension(Protocol::from_static(protocol))
            .header("sec-websocket-version", "13")
            .header("sec-websocket-protocol", offer)
            .body(text(""))
            .unwrap();
        let mut client = client.clone();
        async move { client.send(request).await.unwrap() }
    };
    let offer = format!("lambda-microvms, lambda-microvms.authentication.{}, myapp.v1", endpoint.token());
    let answer = connect(&mut client, "websocket", &offer).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["sec-websocket-protocol"], "lambda-microvms");
    assert!(!answer.headers().contains_key("sec-websocket-accept"));

    let mut socket = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let seen = read_head(&mut socket).await;
    assert!(seen.starts_with("GET /socket HTTP/1.1"), "{seen}");
    assert_eq!(header(&seen, "upgrade"), Some("websocket"));
    assert_eq!(header(&seen, "sec-websocket-key").map(str::len), Some(24));
    assert_eq!(header(&seen, "sec-websocket-protocol"), Some("myapp.v1"));
    assert_eq!(header(&seen, "host"), Some(HOST));
    for message in ["\u{1}ping", "more"] {
        socket.write_all(message.as_bytes()).await.unwrap();
        let mut echoed = vec![0; message.len()];
        timeout(PATIENCE, socket.read_exact(&mut echoed)).await.expect("an echo in time").unwrap();
        assert_eq!(echoed, message.as_bytes());
    }
    socket.shutdown().await.unwrap();
    assert_eq!(timeout(PATIENCE, socket.read(&mut [0; 8])).await.expect("the end in time").unwrap(), 0);

    assert_eq!(connect(&mut client, "connect-udp", &offer).await.status(), 403, "no handshake, so nothing in it is a token");
    assert_eq!(connect(&mut client, "websocket", "myapp.v1").await.status(), 403);
}

#[tokio::test]
async fn refusals_are_answers_and_no_upgrades() {
    let endpoint = echo("").await;
    let token = endpoint.token();
    for (more, status) in [
        (vec![], 403),
        (vec![format!("sec-websocket-protocol: lambda-microvms.authentication.{token}")], 403),
        (vec![format!("sec-websocket-protocol: lambda-microvms, lambda-microvms.authentication.{token}, lambda-microvms.port.22")], 403),
        (vec![format!("sec-websocket-protocol: lambda-microvms, lambda-microvms.authentication.{token}, lambda-microvms.port.0")], 400),
    ] {
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let head = handshake(&mut endpoint.connect().await, &more).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{more:?}: {head}");
        assert_eq!(header(&head, "upgrade"), None);
    }
}

#[tokio::test]
async fn an_application_may_decline() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
    })
    .await;
    let mut client = endpoint.connect().await;
    let head = handshake(&mut client, &[&endpoint.auth()]).await;
    assert!(head.starts_with("HTTP/1.1 426"), "{head}");
    assert_eq!(client.exactly(2).await, "no");
}

#[tokio::test]
async fn other_upgrades_are_refused() {
    let endpoint = echo("").await;
    for upgrade in ["h2c", "websocket", "TLS/1.3"] {
        let upgrade = format!("Upgrade: {upgrade}");
        let answer = endpoint.curl("/", &["-H", "Connection: Upgrade", "-H", &upgrade]).await;
        assert_eq!((answer.status, answer.text()), (400, "Invalid upgrade: expected a WebSocket handshake"));
    }
}

#[tokio::test]
async fn a_microvm_that_goes_ends_the_client_s_side_in_order() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await.unwrap();
        stream.read_u8().await.unwrap();
    })
    .await;
    let mut client = endpoint.connect().await;
    handshake(&mut client, &[&endpoint.auth()]).await;
    client.send("xy").await;
    // An end without TLS's farewell would be an error here.
    let ended = timeout(PATIENCE, client.0.read(&mut [0; 8])).await.expect("the tunnel ends");
    assert_eq!(ended.unwrap(), 0);
}
