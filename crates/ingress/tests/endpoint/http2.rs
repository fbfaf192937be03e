//! Clients that speak HTTP/2, and applications that do.

use std::time::Duration;

use bytes::Bytes;
use hearth_ingress::IngressConfig;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use crate::support::{
    Body, Client, Client2, Endpoint, Guest, HOST, PATIENCE, app_guest, data, h2c_guest, header, read_head, request2, text, trickle,
};

fn empty() -> Body {
    text("")
}

async fn whole(response: Response<Incoming>) -> Bytes {
    timeout(PATIENCE, response.into_body().collect()).await.expect("a body in time").unwrap().to_bytes()
}

fn trailers(value: &'static str) -> Frame<Bytes> {
    Frame::trailers(HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static(value))]))
}

#[tokio::test]
async fn the_application_sees_http1_with_the_names_of_http1() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        let head = read_head(&mut stream).await;
        stream.write_all(format!("HTTP/1.1 200 OK\r\nconnection: close\r\nkeep-alive: x\r\n\r\n{head}").as_bytes()).await.unwrap();
    })
    .await;
    let mut client = Client2::new(&endpoint).await;
    let request = request2(&endpoint, "GET", "/a?b")
        .header("te", "trailers")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("x-aws-proxy-port", "9000")
        .body(empty());
    let answer = client.send(request.unwrap()).await.unwrap();
    let id = answer.headers()["x-amzn-requestid"].to_str().unwrap().to_owned();
    assert!(!answer.headers().contains_key("keep-alive"));
    let seen = String::from_utf8(whole(answer).await.to_vec()).unwrap();
    assert!(seen.starts_with("GET /a?b HTTP/1.1\r\n"), "{seen}");
    assert_eq!(header(&seen, "host"), Some(HOST));
    assert_eq!(header(&seen, "cookie"), Some("a=1; b=2"));
    assert_eq!(header(&seen, "connection"), Some("close"));
    assert_eq!(header(&seen, "te"), Some("trailers"));
    assert_eq!(header(&seen, "x-amzn-requestid"), Some(&*id));
    assert!(!seen.contains("x-aws-proxy") && !seen.contains("transfer-encoding"), "{seen}");
}

#[tokio::test]
async fn refusals_are_answers_on_their_own_streams() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text("hello"))).await;
    let mut client = Client2::new(&endpoint).await;
    for (request, status, body) in [
        (Request::builder().uri(format!("https://{HOST}/")), 403, "Request missing authentication"),
        (request2(&endpoint, "GET", "/").header("x-aws-proxy-port", "22"), 403, "Access to port denied"),
        (request2(&endpoint, "GET", "/").header("x-aws-proxy-port", "x"), 400, "Invalid x-aws-proxy-port: expected a port from 1 to 65535"),
        (request2(&endpoint, "GET", "/").uri("https://localhost/"), 421, "This connection is for another host"),
        (request2(&endpoint, "GET", "/"), 200, "hello"),
    ] {
        let answer = client.send(request.body(empty()).unwrap()).await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(answer.headers()["x-amzn-requestid"].len(), 36);
        assert_eq!(whole(answer).await, body);
    }
    *endpoint.plane.guest.lock().unwrap() = Guest::Unreachable;
    let answer = client.send(request2(&endpoint, "GET", "/").body(empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 502);
    assert_eq!(whole(answer).await, "");
}

#[tokio::test]
async fn both_directions_stream_at_once() {
    let endpoint = Endpoint::with_app(async |request: Request<Incoming>| {
        Response::new(request.into_body().map_err(|_| unreachable!()).boxed_unsync())
    })
    .await;
    let mut client = Client2::new(&endpoint).await;
    let (send, body) = trickle();
    let answer = client.send(request2(&endpoint, "POST", "/echo").body(body).unwrap()).await.unwrap();
    let mut echoed = answer.into_body();
    for piece in ["one", "two"] {
        send.send(data(piece)).await.unwrap();
        let frame = timeout(PATIENCE, echoed.frame()).await.expect("an echo in time").unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece);
    }
    drop(send);
    assert_eq!(timeout(PATIENCE, echoed.collect()).await.expect("the end in time").unwrap().to_bytes(), "");
}

#[tokio::test]
async fn an_upload_is_not_held_to_the_protocol_s_small_window() {
    // The application reads nothing, so what the client can send is the window.
    let endpoint = Endpoint::start(Guest::Unreachable).await;
    endpoint.plane.awake.send_replace(false);
    let mut client = Client2::new(&endpoint).await;
    let (send, body) = trickle();
    let request = request2(&endpoint, "POST", "/").body(body).unwrap();
    tokio::spawn(async move { client.send(request).await });
    let piece = Bytes::from(vec![b'x'; 64 << 10]);
    let mut sent = 0;
    while timeout(Duration::from_secs(1), send.send(Frame::data(piece.clone()))).await.is_ok() {
        sent += 64;
        assert!(sent < 8192, "nobody reads, and yet {sent} KiB are gone");
    }
    assert!(sent >= 1024, "only {sent} KiB were taken");
}

#[tokio::test]
async fn a_slow_reader_holds_the_application_back_and_nobody_else() {
    let (pieces, mut ask) = mpsc::channel(1);
    let endpoint = Endpoint::with_app(move |request: Request<Incoming>| {
        let pieces = pieces.clone();
        async move {
            if request.uri().path() == "/quick" {
                return Response::new(text("quick"));
            }
            let (sender, body) = trickle();
            pieces.send(sender).await.unwrap();
            Response::new(body)
        }
    })
    .await;
    let mut client = Client2::new(&endpoint).await;
    let slow = client.send(request2(&endpoint, "GET", "/slow").body(empty()).unwrap()).await.unwrap();
    let stream = ask.recv().await.unwrap();
    let megabyte = Bytes::from(vec![b'x'; 1 << 20]);
    let mut sent = 0;
    while timeout(Duration::from_secs(1), stream.send(Frame::data(megabyte.clone()))).await.is_ok() {
        sent += 1;
        assert!(sent < 64, "nobody reads, and yet {sent} MiB are gone");
    }
    let quick = client.send(request2(&endpoint, "GET", "/quick").body(empty()).unwrap()).await.unwrap();
    assert_eq!(whole(quick).await, "quick");
    drop(slow);
    timeout(PATIENCE, stream.closed()).await.expect("a stream that the client resets frees the application");
}

#[tokio::test]
async fn an_early_answer_ends_an_upload_without_an_error() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 8\r\n\r\ntoo long").await.unwrap();
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
    })
    .await;
    let mut client = Client2::new(&endpoint).await;
    let (send, body) = trickle();
    let answer = client.send(request2(&endpoint, "POST", "/").body(body).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 413);
    assert_eq!(whole(answer).await, "too long");
    timeout(PATIENCE, send.closed()).await.expect("the client is told to stop");
}

#[tokio::test]
async fn an_aborted_upload_is_not_made_to_look_whole() {
    for (force_h2, reset) in [(false, false), (false, true), (true, false), (true, true)] {
        let (seen, mut ends) = mpsc::channel(2);
        let app = move |request: Request<Incoming>| {
            let seen = seen.clone();
            async move {
                let mut body = request.into_body();
                assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "some");
                seen.send(true).await.unwrap();
                seen.send(body.collect().await.is_ok()).await.unwrap();
                Response::new(text(""))
            }
        };
        let guest = if force_h2 { h2c_guest(app).await } else { app_guest(app).await };
        let endpoint = Endpoint::start(Guest::At(guest)).await;
        let mut client = raw(&endpoint).await;
        client.send([PREFACE, &post(&endpoint, force_h2), b"\0\0\x04\0\0\0\0\0\x01some"].concat()).await;
        assert!(timeout(PATIENCE, ends.recv()).await.expect("the upload begins").unwrap());
        if reset {
            client.send(b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08").await;
        } else {
            drop(client);
        }
        let whole = timeout(PATIENCE, ends.recv()).await.expect("the application learns of the end");
        // Dropped with its request, it sees no end at all.
        assert_ne!(whole, Some(true), "h2c: {force_h2}, reset: {reset}");
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_resets_its_stream() {
    let endpoint = Endpoint::with_raw(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
    })
    .await;
    let mut client = Client2::new(&endpoint).await;
    let answer = client.send(request2(&endpoint, "GET", "/").body(empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    timeout(PATIENCE, answer.into_body().collect()).await.expect("an end in time").unwrap_err();
    client.send(request2(&endpoint, "GET", "/").body(empty()).unwrap()).await.expect("the connection lives on");
}

/// What gRPC needs: HTTP/2 to the application, both streams at once, and trailers, also instead of a body.
async fn grpc(request: Request<Incoming>) -> Response<Body> {
    assert_eq!(request.headers()["te"], "trailers");
    assert_eq!(request.uri().authority().unwrap(), HOST);
    assert!(!request.headers().keys().any(|name| name.as_str().starts_with("x-aws-proxy")));
    if request.uri().path() == "/unimplemented" {
        return Response::builder().header("grpc-status", "12").body(empty()).unwrap();
    }
    let (sender, body) = trickle();
    tokio::spawn(async move {
        let mut messages = request.into_body();
        while let Some(frame) = messages.frame().await {
            if let Ok(message) = frame.unwrap().into_data() {
                sender.send(Frame::data(message)).await.unwrap();
            }
        }
        sender.send(trailers("0")).await.unwrap();
    });
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

#[tokio::test]
async fn grpc_streams_both_ways_and_ends_with_trailers() {
    let endpoint = Endpoint::start(Guest::At(h2c_guest(grpc).await)).await;
    let mut client = Client2::new(&endpoint).await;
    for (name, value) in [("content-type", "application/grpc"), ("x-aws-proxy-force-h2", "true")] {
        let request = |path| request2(&endpoint, "POST", path).header("te", "trailers").header(name, value);
        let (send, body) = trickle();
        let answer = client.send(request("/echo").body(body).unwrap()).await.unwrap();
        let mut echoed = answer.into_body();
        for message in ["one", "two"] {
            send.send(data(message)).await.unwrap();
            let frame = timeout(PATIENCE, echoed.frame()).await.expect("an echo in time").unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), message);
        }
        drop(send);
        let last = timeout(PATIENCE, echoed.frame()).await.expect("trailers in time").unwrap().unwrap();
        assert_eq!(last.into_trailers().unwrap()["grpc-status"], "0");

        let answer = client.send(request("/unimplemented").body(empty()).unwrap()).await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["grpc-status"]), (200, &HeaderValue::from_static("12")));
    }
}

/// Answers with the trailers that it got.
async fn parrot(request: Request<Incoming>) -> Response<Body> {
    let trailers = request.into_body().collect().await.unwrap().trailers().cloned();
    let (sender, body) = trickle();
    tokio::spawn(async move {
        sender.send(data("abc")).await.unwrap();
        sender.send(Frame::trailers(trailers.unwrap_or_default())).await.unwrap();
    });
    Response::builder().header("trailer", "grpc-status").body(body).unwrap()
}

#[tokio::test]
async fn trailers_pass_both_ways_to_applications_of_both_versions() {
    for http2 in [false, true] {
        let guest = if http2 { h2c_guest(parrot).await } else { app_guest(parrot).await };
        let endpoint = Endpoint::start(Guest::At(guest)).await;
        let mut client = Client2::new(&endpoint).await;
        let (send, body) = trickle();
        let request = request2(&endpoint, "POST", "/").header("te", "trailers").header("trailer", "grpc-status");
        let request = request.header("x-aws-proxy-force-h2", http2.to_string()).body(body).unwrap();
        tokio::spawn(async move {
            send.send(data("xyz")).await.unwrap();
            send.send(trailers("7")).await.unwrap();
        });
        let answer = client.send(request).await.unwrap().into_body().collect();
        let answer = timeout(PATIENCE, answer).await.expect("an answer in time").unwrap();
        assert_eq!(answer.trailers().unwrap()["grpc-status"], "7", "h2c: {http2}");
        assert_eq!(answer.to_bytes(), "abc");
    }
}

#[tokio::test]
async fn an_application_without_http2_is_a_502_when_it_is_forced() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text("old"))).await;
    for version in ["--http2", "--http1.1"] {
        let answer = endpoint.curl("/", &[version, "-H", "x-aws-proxy-force-h2: true"]).await;
        assert_eq!((answer.status, answer.text()), (502, ""), "{version}");
    }
    let http2 = h2c_guest(async |request: Request<Incoming>| Response::new(text(format!("{:?}", request.version())))).await;
    *endpoint.plane.guest.lock().unwrap() = Guest::At(http2);
    for version in ["--http2", "--http1.1"] {
        let answer = endpoint.curl("/", &[version, "-H", "x-aws-proxy-force-h2: true"]).await;
        assert_eq!((answer.status, answer.text()), (200, "HTTP/2.0"), "{version}");
        assert_eq!(endpoint.curl("/", &[version]).await.status, 502, "in HTTP/1.1 it does not answer");
    }
}

async fn raw(endpoint: &Endpoint) -> Client {
    Client::speaking(&["h2"], endpoint.address, &endpoint.ca(), HOST).await.unwrap()
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A HEADERS frame that opens stream 1 with a POST and a token, and leaves it open.
fn post(endpoint: &Endpoint, force_h2: bool) -> Vec<u8> {
    // HPACK's static table has the method, the scheme, the path and the name of the authority; the rest is written out (RFC 7541, 6.2.2).
    let mut block = b"\x83\x87\x84\x01".to_vec();
    block.extend(string(HOST));
    for (name, value) in [("x-aws-proxy-auth", &*endpoint.token()), ("x-aws-proxy-force-h2", if force_h2 { "true" } else { "false" })] {
        block.push(0);
        block.extend(string(name));
        block.extend(string(value));
    }
    let length = u32::try_from(block.len()).unwrap().to_be_bytes();
    [&length[1..], b"\x01\x04\0\0\0\x01", &block].concat()
}

/// A string of HPACK without compression: its length with a prefix of seven bits, then its bytes.
fn string(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    match text.len() {
        length @ ..127 => bytes.push(u8::try_from(length).unwrap()),
        length => {
            bytes.push(127);
            let mut rest = length - 127;
            while rest >= 128 {
                bytes.push(u8::try_from(rest % 128).unwrap() | 128);
                rest /= 128;
            }
            bytes.push(u8::try_from(rest).unwrap());
        }
    }
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Reads to the end, and looks whether a frame of a type was among the bytes.
async fn ends_with_goaway(mut client: Client) -> bool {
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, client.0.read_to_end(&mut bytes)).await.expect("the connection ends in time");
    let mut rest = &bytes[..];
    while let Some(length) = rest.first_chunk::<3>() {
        if rest[3] == 7 {
            return true;
        }
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]) as usize;
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    false
}

#[tokio::test]
async fn invalid_frames_end_the_connection_and_nothing_else() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text("hello"))).await;
    for (what, bytes) in [
        ("another preface", &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..]),
        ("DATA on no stream", &[PREFACE, b"\0\0\x01\0\0\0\0\0\x01x"].concat()),
        ("a frame too large", &[PREFACE, b"\xff\xff\xff\x01\x04\0\0\0\x01"].concat()),
        ("CONTINUATION without HEADERS", &[PREFACE, b"\0\0\x01\x09\x04\0\0\0\x01x"].concat()),
        ("headers that do not decompress", &[PREFACE, b"\0\0\x02\x01\x05\0\0\0\x01\xff\xff"].concat()),
        ("a window beyond its limit", &[PREFACE, b"\0\0\x04\x08\0\0\0\0\0\x7f\xff\xff\xff"].concat()),
    ] {
        let mut client = raw(&endpoint).await;
        client.send(bytes).await;
        let goaway = ends_with_goaway(client).await;
        assert!(goaway || what == "another preface", "{what}");
    }
    assert_eq!(endpoint.curl("/", &["--http2"]).await.text(), "hello");
}

#[tokio::test]
async fn floods_of_resets_and_of_continuations_end_the_connection() {
    let endpoint = Endpoint::start(Guest::Unreachable).await;
    let mut client = raw(&endpoint).await;
    // A request that HPACK's static table has: GET, https, /.
    let mut flood = PREFACE.to_vec();
    for stream in (1_u32..10_000).step_by(2) {
        flood.extend_from_slice(b"\0\0\x03\x01\x05");
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(b"\x82\x87\x84\0\0\x04\x03\0");
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(&8_u32.to_be_bytes());
    }
    let _ = client.0.write_all(&flood).await;
    assert!(ends_with_goaway(client).await, "rapid reset");

    let mut client = raw(&endpoint).await;
    let mut flood = [PREFACE, b"\0\0\x03\x01\x01\0\0\0\x01\x82\x87\x84"].concat();
    for _ in 0..100_000 {
        flood.extend_from_slice(b"\0\0\0\x09\0\0\0\0\x01");
    }
    let _ = client.0.write_all(&flood).await;
    assert!(ends_with_goaway(client).await, "continuation flood");
}

#[tokio::test]
async fn oversize_headers_are_a_431_on_their_stream() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text("hello"))).await;
    let mut client = Client2::new(&endpoint).await;
    for (count, status) in [(55, 200), (65, 431)] {
        let mut request = request2(&endpoint, "GET", "/");
        for _ in 0..count {
            request = request.header("x-big", "a".repeat(1000));
        }
        assert_eq!(client.send(request.body(empty()).unwrap()).await.unwrap().status(), status);
    }
}

#[tokio::test]
async fn silent_connections_are_left_and_busy_ones_are_not() {
    let brief = Duration::from_millis(200);
    let guest = app_guest(async |_| Response::new(text("hello"))).await;
    let endpoint = Endpoint::start_with(Guest::At(guest), IngressConfig { idle_timeout: brief, ..IngressConfig::default() }).await;
    let nothing = raw(&endpoint).await;
    assert!(!ends_with_goaway(nothing).await, "not even a preface");
    let mut half = raw(&endpoint).await;
    half.send([PREFACE, b"\0\0\x03\x01\x01\0\0\0\x01\x82\x87\x84"].concat()).await;
    assert!(ends_with_goaway(half).await, "headers that do not end");

    endpoint.plane.awake.send_replace(false);
    let mut client = Client2::new(&endpoint).await;
    let request = request2(&endpoint, "GET", "/").body(empty()).unwrap();
    let busy = tokio::spawn(async move { client.send(request).await });
    tokio::time::sleep(brief * 3).await;
    endpoint.plane.awake.send_replace(true);
    assert_eq!(busy.await.unwrap().unwrap().status(), 200);
}
