//! What passes between client and application: streams, framing, headers.

use std::{fs, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header::TRAILER};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use crate::support::{Client, Endpoint, HOST, PATIENCE, data, header, read_head, text, trickle};

const BIG: usize = 8 << 20;

/// Bytes that show if some are lost, doubled or swapped.
fn pattern(length: usize) -> Vec<u8> {
    (0..length / 8 + 1).flat_map(|index| (index as u64).to_le_bytes()).take(length).collect()
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[tokio::test]
async fn large_responses_arrive_whole() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| {
        let bytes = Bytes::from(pattern(BIG));
        Response::new(if request.uri().path() == "/chunked" {
            StreamBody::new(futures::stream::iter(
                bytes.chunks(10_007).map(|chunk| Ok(Frame::data(Bytes::copy_from_slice(chunk)))).collect::<Vec<_>>(),
            ))
            .boxed_unsync()
        } else {
            text(bytes)
        })
    })
    .await;
    for (path, length) in [("/length", Some(BIG.to_string())), ("/chunked", None)] {
        let answer = endpoint.curl(path, &[]).await;
        assert_eq!(answer.header("content-length").map(str::to_owned), length);
        assert_eq!(checksum(&answer.body), checksum(&pattern(BIG)), "{path}");
    }
}

#[tokio::test]
async fn large_requests_arrive_whole() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| {
        let length = request.headers().get("content-length").map(|value| value.to_str().unwrap().to_owned());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(text(format!("{length:?} {}", checksum(&body))))
    })
    .await;
    let file = endpoint.dir.path().join("upload");
    fs::write(&file, pattern(BIG)).unwrap();
    let upload = format!("@{}", file.display());
    let sum = checksum(&pattern(BIG));
    let answer = endpoint.curl("/", &["--data-binary", &upload]).await;
    assert_eq!(answer.text(), format!("{:?} {sum}", Some(BIG.to_string())));
    let answer = endpoint.curl("/", &["-H", "Transfer-Encoding: chunked", "--data-binary", &upload]).await;
    assert_eq!(answer.text(), format!("None {sum}"));
}

#[tokio::test]
async fn each_piece_of_a_response_arrives_before_the_next_is_made() {
    let (pieces, mut ask) = mpsc::channel(1);
    let endpoint = Endpoint::with_app(move |_| {
        let pieces = pieces.clone();
        async move {
            let (sender, body) = trickle();
            pieces.send(sender).await.unwrap();
            Response::builder().header("content-type", "text/event-stream").body(body).unwrap()
        }
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "GET /events HTTP/1.1", &[]).await;
    let events = ask.recv().await.unwrap();
    assert_eq!(header(&client.head().await, "transfer-encoding"), Some("chunked"));
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        events.send(data(event)).await.unwrap();
        assert_eq!(client.exactly(14).await, format!("9\r\n{event}\r\n"));
    }
    drop(events);
    assert_eq!(client.exactly(5).await, "0\r\n\r\n");
}

#[tokio::test]
async fn each_piece_of_a_request_arrives_before_the_next_is_sent() {
    let (seen, mut arrivals) = mpsc::unbounded_channel();
    let endpoint = Endpoint::with_app(move |request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                seen.send(frame.unwrap().into_data().unwrap()).unwrap();
            }
            Response::new(text("done"))
        }
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "POST / HTTP/1.1", &["transfer-encoding: chunked"]).await;
    for piece in ["one", "two"] {
        client.send(format!("3\r\n{piece}\r\n")).await;
        assert_eq!(timeout(PATIENCE, arrivals.recv()).await.unwrap().unwrap(), piece);
    }
    client.send("0\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 200"));
    assert_eq!(client.exactly(4).await, "done");
}

#[tokio::test]
async fn a_client_that_leaves_a_silent_stream_frees_the_application() {
    let (pieces, mut ask) = mpsc::channel(1);
    let endpoint = Endpoint::with_app(move |_| {
        let pieces = pieces.clone();
        async move {
            let (sender, body) = trickle();
            pieces.send(sender).await.unwrap();
            Response::new(body)
        }
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "GET / HTTP/1.1", &[]).await;
    let stream = ask.recv().await.unwrap();
    client.head().await;
    drop(client);
    timeout(PATIENCE, stream.closed()).await.expect("the application's connection ends");
}

#[tokio::test]
async fn a_slow_reader_holds_the_application_back() {
    let (pieces, mut ask) = mpsc::channel(1);
    let endpoint = Endpoint::with_app(move |_| {
        let pieces = pieces.clone();
        async move {
            let (sender, body) = trickle();
            pieces.send(sender).await.unwrap();
            Response::new(body)
        }
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "GET / HTTP/1.1", &[]).await;
    let stream = ask.recv().await.unwrap();
    let megabyte = Bytes::from(vec![b'x'; 1 << 20]);
    let mut sent = 0;
    // The buffers of four sockets and two HTTP connections are all that may fill up.
    while timeout(Duration::from_secs(1), stream.send(Frame::data(megabyte.clone()))).await.is_ok() {
        sent += 1;
        assert!(sent < 64, "nobody reads, and yet {sent} MiB are gone");
    }
    client.head().await;
    assert!(client.exactly(1 << 20).await.contains("xxx"));
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| {
        let te = request.headers().get("te").cloned();
        let body = request.into_body().collect().await.unwrap();
        let sent = body.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
        let (sender, body) = trickle();
        tokio::spawn(async move {
            sender.send(data("abc")).await.unwrap();
            let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("from app"))]);
            sender.send(Frame::trailers(trailers)).await.unwrap();
        });
        Response::builder().header(TRAILER, "x-sum").header("x-seen", format!("{te:?} {sent:?}")).body(body).unwrap()
    })
    .await;
    let mut client = endpoint.connect().await;
    let headers = ["te: trailers", "connection: te", "trailer: x-sum", "transfer-encoding: chunked"];
    client.request(&endpoint, "POST / HTTP/1.1", &headers).await;
    client.send("1\r\nx\r\n0\r\nx-sum: from client\r\n\r\n").await;
    let head = client.head().await;
    assert_eq!(header(&head, "x-seen"), Some(r#"Some("trailers") Some("from client")"#));
    assert_eq!(client.head().await, "3\r\nabc\r\n0\r\nx-sum: from app\r\n\r\n");
}

#[tokio::test]
async fn the_application_sees_what_the_client_meant_for_it() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        let head = read_head(&mut stream).await;
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-amzn-requestid: app\r\nconnection: x-hop, keep-alive\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\nserver: app\r\n\r\n{head}",
            head.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let headers = [
        "X-aws-proxy-port: 9000",
        "X-aws-proxy-other: 1",
        "x-amzn-requestid: forged",
        "Connection: x-mine, host",
        "X-Mine: secret",
        "Authorization: Bearer app",
        "X-Forwarded-For: 192.0.2.1",
    ];
    let arguments: Vec<&str> = headers.into_iter().flat_map(|header| ["-H", header]).collect();
    let answer = endpoint.curl("/a%20b?c=d&e", &arguments).await;
    let seen = answer.text();
    let id = answer.header("x-amzn-requestid").unwrap();
    assert!(seen.starts_with("GET /a%20b?c=d&e HTTP/1.1\r\n"), "{seen}");
    assert_eq!(header(seen, "host").unwrap(), format!("{HOST}:{}", endpoint.address.port()));
    assert_eq!(header(seen, "x-amzn-requestid"), Some(id));
    assert_ne!(id, "app");
    assert_eq!(header(seen, "authorization"), Some("Bearer app"));
    assert_eq!(header(seen, "x-forwarded-for"), Some("192.0.2.1"), "the client's own passes; we add none");
    assert_eq!(header(seen, "connection"), Some("close"));
    for absent in ["x-aws-proxy", "x-mine", "forged"] {
        assert!(!seen.to_lowercase().contains(absent), "{seen}");
    }
    assert_eq!(answer.header("server"), Some("app"));
    for absent in ["x-hop", "keep-alive", "connection"] {
        assert_eq!(answer.header(absent), None, "{}", answer.head);
    }
}

#[tokio::test]
async fn answers_without_a_body_stay_so() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        let head = read_head(&mut stream).await;
        let answer: &[u8] = match head.split(' ').nth(1).unwrap() {
            "/head" => b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n",
            "/204" => b"HTTP/1.1 204 No Content\r\n\r\n",
            "/304" => b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\ncontent-length: 99\r\n\r\n",
            "/early" => b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            _ => b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        };
        stream.write_all(answer).await.unwrap();
    })
    .await;
    // All on one connection: a byte too many or too few would spoil the next answer.
    let mut client = endpoint.connect().await;
    // A 304 may leave out the length that a 200 would have (RFC 9110, 15.4.5), and does.
    for (line, status, length) in
        [("HEAD /head", 200, Some("1234")), ("GET /204", 204, None), ("GET /304", 304, None), ("GET /early", 200, Some("2"))]
    {
        client.request(&endpoint, &format!("{line} HTTP/1.1"), &[]).await;
        let head = client.head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {head}");
        assert_eq!(header(&head, "content-length"), length, "{line}: {head}");
        assert_eq!(header(&head, "transfer-encoding"), None, "{line}: {head}");
    }
    assert_eq!(client.exactly(2).await, "ok");
    client.request(&endpoint, "GET /close-delimited HTTP/1.1", &["connection: close"]).await;
    assert!(client.head().await.starts_with("HTTP/1.1 200"));
    assert_eq!(client.rest().await.unwrap(), "D\r\nuntil the end\r\n0\r\n\r\n");
}

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| Response::new(text(request.uri().path().to_owned()))).await;
    let mut client = endpoint.connect().await;
    client.send(format!("GET /refused HTTP/1.1\r\nhost: {HOST}\r\n\r\n")).await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    client.exactly("Request missing authentication".len()).await;
    for path in ["/a", "/b"] {
        client.request(&endpoint, &format!("GET {path} HTTP/1.1"), &[]).await;
        assert!(client.head().await.starts_with("HTTP/1.1 200"));
        assert_eq!(client.exactly(2).await, path);
    }
}

async fn until_counted(endpoint: &Endpoint) {
    let mut waiting = endpoint.plane.waiting.subscribe();
    timeout(PATIENCE, waiting.wait_for(|count| *count == 1)).await.expect("the request waits").unwrap();
}

#[tokio::test]
async fn a_client_is_told_to_continue_once_the_microvm_is_awake() {
    let endpoint =
        Endpoint::with_app(async |request: Request<Incoming>| Response::new(text(request.into_body().collect().await.unwrap().to_bytes())))
            .await;
    endpoint.plane.awake.send_replace(false);
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "POST / HTTP/1.1", &["expect: 100-continue", "content-length: 4"]).await;
    until_counted(&endpoint).await;
    let silent = timeout(Duration::from_millis(50), client.0.read_u8()).await;
    assert!(silent.is_err(), "asleep, it takes no body");
    endpoint.plane.awake.send_replace(true);
    assert!(client.head().await.starts_with("HTTP/1.1 100"));
    client.send("body").await;
    assert!(client.head().await.starts_with("HTTP/1.1 200"));
    assert_eq!(client.exactly(4).await, "body");

    let mut refused = endpoint.connect().await;
    refused.send(format!("POST / HTTP/1.1\r\nhost: {HOST}\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n")).await;
    assert!(refused.head().await.starts_with("HTTP/1.1 403"), "refused without a body");
}

#[tokio::test]
async fn an_application_decides_whether_a_client_continues() {
    for (answer, first) in [("HTTP/1.1 417 No\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 417"), ("", "HTTP/1.1 100")] {
        let endpoint = Endpoint::with_raw(move |mut stream| async move {
            let head = read_head(&mut stream).await;
            assert_eq!(header(&head, "expect"), Some("100-continue"));
            stream.write_all(answer.as_bytes()).await.unwrap();
            // Applications that do not know the expectation say nothing, and wait for the body.
            let mut body = [0; 4];
            if stream.read_exact(&mut body).await.is_ok() {
                assert!(answer.is_empty(), "it was told not to send {body:?}");
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
        })
        .await;
        let mut client = endpoint.connect().await;
        client.request(&endpoint, "POST / HTTP/1.1", &["expect: 100-continue", "content-length: 4"]).await;
        assert!(client.head().await.starts_with(first));
        if first.ends_with("100") {
            client.send("body").await;
            assert!(client.head().await.starts_with("HTTP/1.1 200"));
        }
    }
}

/// Sends chunks until told otherwise, as clients do that read the answer only at the end.
async fn flood(client: Client) -> String {
    let (mut reader, mut writer) = tokio::io::split(client.0);
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let write = async move {
        for _ in 0..256 {
            if writer.write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
        writer
    };
    let writer = tokio::spawn(write);
    let head = read_head(&mut reader).await;
    let mut body = String::new();
    let _ = timeout(PATIENCE, reader.read_to_string(&mut body)).await.expect("the connection ends in time");
    writer.abort();
    head + &body
}

#[tokio::test]
async fn a_refused_upload_learns_why() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text(""))).await;
    let mut client = endpoint.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ntransfer-encoding: chunked\r\n\r\n")).await;
    let answer = flood(client).await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with("Request missing authentication"), "{answer}");
}

/// An application that answers early; then it reads on as it should, says only that it is done, or closes right away.
async fn hasty_app(manner: &'static str) -> Endpoint {
    Endpoint::with_raw(move |mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 8\r\nconnection: close\r\n\r\ntoo long").await.unwrap();
        if manner != "closes" {
            stream.shutdown().await.unwrap();
        }
        if manner == "reads on" {
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
        }
    })
    .await
}

#[tokio::test]
async fn an_early_answer_of_the_application_arrives() {
    for manner in ["reads on", "is done", "closes"] {
        let endpoint = hasty_app(manner).await;
        // What is lost is lost to a race.
        for _ in 0..8 {
            let mut client = endpoint.connect().await;
            client.request(&endpoint, "POST / HTTP/1.1", &["transfer-encoding: chunked"]).await;
            let answer = flood(client).await;
            assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with("too long"), "{manner}: {answer}");
        }
        let file = endpoint.dir.path().join("upload");
        fs::write(&file, pattern(BIG)).unwrap();
        let upload = format!("@{}", file.display());
        for version in ["--http1.1", "--http2"] {
            let answer = endpoint.curl("/", &[version, "-H", "Expect:", "--data-binary", &upload]).await;
            assert_eq!((answer.status, answer.text()), (413, "too long"), "{manner}, {version}");
        }
    }
}

#[tokio::test]
async fn an_application_may_answer_while_the_client_still_sends() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| {
        Response::new(request.into_body().map_err(|_| unreachable!()).boxed_unsync())
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "POST /echo HTTP/1.1", &["transfer-encoding: chunked"]).await;
    assert!(client.head().await.starts_with("HTTP/1.1 200"));
    for piece in ["one", "two"] {
        client.send(format!("3\r\n{piece}\r\n")).await;
        assert_eq!(client.exactly(8).await, format!("3\r\n{piece}\r\n"));
    }
    client.send("0\r\n\r\n").await;
    assert_eq!(client.exactly(5).await, "0\r\n\r\n");
}
