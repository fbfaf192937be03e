//! How much one MicroVM's endpoint may be used.

use hearth_ingress::{IngressConfig, Limits};
use http::Response;
use tokio::io::AsyncWriteExt;

use crate::support::{Client2, Endpoint, Guest, app_guest, header, raw_guest, read_head, request2, text};

async fn limited(guest: Guest, limits: Limits) -> Endpoint {
    Endpoint::start_with(guest, IngressConfig { limits, ..IngressConfig::default() }).await
}

/// The made-up MicroVM has half a GiB.
#[tokio::test]
async fn a_session_of_http2_is_one_connection() {
    let guest = Guest::At(app_guest(async |_| Response::new(text("hello"))).await);
    let endpoint = limited(guest, Limits { connections_per_gib: 4, ..Limits::default() }).await;
    let mut session = Client2::new(&endpoint).await;
    for _ in 0..10 {
        assert_eq!(session.send(request2(&endpoint, "GET", "/").body(text("")).unwrap()).await.unwrap().status(), 200);
    }
    let mut second = endpoint.connect().await;
    second.request(&endpoint, "GET / HTTP/1.1", &[]).await;
    assert!(second.head().await.starts_with("HTTP/1.1 200"));

    let answer = endpoint.curl("/", &[]).await;
    assert_eq!((answer.status, answer.text()), (429, "Rate limit exceeded"));
    assert!(answer.header("x-amzn-requestid").is_some());
    assert_eq!(endpoint.curl_as(crate::support::HOST, "/", &[]).await.unwrap().status, 403, "who may not talk is not counted");
    drop(second);
    // The server sees the end a moment later than the client.
    for _ in 0..100 {
        if endpoint.curl("/", &[]).await.status == 200 {
            return;
        }
    }
    panic!("the slot was not freed");
}

#[tokio::test]
async fn a_websocket_keeps_its_connection_s_slot() {
    let guest = Guest::At(
        raw_guest(|mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await.unwrap();
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
        })
        .await,
    );
    let endpoint = limited(guest, Limits { connections_per_gib: 2, ..Limits::default() }).await;
    let mut socket = endpoint.connect().await;
    let upgrade = ["connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="];
    socket.request(&endpoint, "GET / HTTP/1.1", &upgrade).await;
    assert_eq!(header(&socket.head().await, "upgrade"), Some("websocket"));
    assert_eq!(endpoint.curl("/", &[]).await.status, 429);
}

#[tokio::test]
async fn requests_in_a_second_are_limited() {
    let guest = Guest::At(app_guest(async |_| Response::new(text("hello"))).await);
    let endpoint = limited(guest, Limits { requests_per_second_per_gib: Some(2), ..Limits::default() }).await;
    let mut client = Client2::new(&endpoint).await;
    let mut statuses = Vec::new();
    for _ in 0..5 {
        statuses.push(client.send(request2(&endpoint, "GET", "/").body(text("")).unwrap()).await.unwrap().status().as_u16());
    }
    assert_eq!(statuses[0], 200);
    assert!(statuses.contains(&429), "{statuses:?}");
}
