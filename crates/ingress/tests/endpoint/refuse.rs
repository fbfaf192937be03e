//! Who is refused, and in which words (SPEC 10.3).

use std::time::Duration;

use hearth_control::types::PortSpec;
use hearth_ingress::IngressConfig;
use http::Response;

use crate::support::{Client, ELSEWHERE, Endpoint, Guest, HOST, PATIENCE, VM, text};

async fn endpoint() -> Endpoint {
    Endpoint::with_app(async |request| Response::new(text(format!("reached {}", request.uri())))).await
}

#[tokio::test]
async fn refusals_are_the_service_s() {
    let endpoint = endpoint().await;
    let all = |vm, lifetime| endpoint.token_for(vm, vec![PortSpec::All], Duration::from_secs(lifetime));
    let (good, scoped, other, expired) = (all(VM, 60), endpoint.token(), all("microvm-other", 60), all(VM, 0));
    let flipped = if good.ends_with('A') { 'Q' } else { 'A' };
    let tampered = format!("{}{flipped}", &good[..good.len() - 1]);
    const MISSING: (u16, &str) = (403, "Request missing authentication");
    const FAILED: (u16, &str) = (403, "Token authentication failed");
    const DENIED: (u16, &str) = (403, "Access to port denied");
    const PORT: (u16, &str) = (400, "Invalid x-aws-proxy-port: expected a port from 1 to 65535");
    const REACHED: (u16, &str) = (200, "reached /path?query");
    for (what, token, port, expected) in [
        ("no token", None, None, MISSING),
        ("an empty token", Some(""), None, MISSING),
        ("something else", Some("Bearer abc"), None, MISSING),
        ("half a token", Some(&good[..400]), None, MISSING),
        ("another MicroVM's token", Some(&*other), None, FAILED),
        ("an expired token", Some(&*expired), None, FAILED),
        ("a tampered token", Some(&*tampered), None, FAILED),
        ("a port outside the scope", Some(&*scoped), Some("22"), DENIED),
        ("a port above a range", Some(&*scoped), Some("9011"), DENIED),
        ("port 0", Some(&*good), Some("0"), PORT),
        ("a port too high", Some(&*good), Some("65536"), PORT),
        ("no number", Some(&*good), Some("http"), PORT),
        ("the default port", Some(&*scoped), None, REACHED),
        ("a port in a range", Some(&*scoped), Some("9010"), REACHED),
        ("all ports", Some(&*good), Some("22"), REACHED),
    ] {
        // `Name;` is how curl sends an empty header.
        let token = token.map(|token| if token.is_empty() { "X-aws-proxy-auth;".into() } else { format!("X-aws-proxy-auth: {token}") });
        let port = port.map(|port| format!("X-aws-proxy-port: {port}"));
        let headers: Vec<&str> = [&token, &port].into_iter().flatten().flat_map(|header| ["-H", header]).collect();
        let answer = endpoint.curl_as(HOST, "/path?query", &headers).await.unwrap();
        assert_eq!((answer.status, answer.text()), expected, "{what}");
        assert!(answer.header("x-amzn-requestid").is_some_and(|id| id.len() == 36), "{what}");
        if answer.status != 200 {
            assert_eq!(answer.header("content-type"), Some("text/plain"), "{what}");
            assert_eq!(answer.header("cache-control"), Some("private, no-store"), "{what}");
        }
    }
}

#[tokio::test]
async fn the_host_header_must_name_the_endpoint_of_the_tls_client() {
    let endpoint = endpoint().await;
    let auth = endpoint.auth();
    for host in ["localhost", "127.0.0.1", ELSEWHERE, "example.com"] {
        let answer = endpoint.curl_as(HOST, "/", &["-H", &auth, "-H", &format!("Host: {host}")]).await.unwrap();
        assert_eq!((answer.status, answer.text()), (421, "This connection is for another host"), "{host}");
    }
    for host in ["localhost", "ffff.lambda-microvm.us-east-1.localhost"] {
        let answer = endpoint.curl_as(host, "/", &["-H", &auth]).await.unwrap();
        assert_eq!((answer.status, answer.text()), (403, "Token authentication failed"), "{host}");
    }
    let upper = format!("Host: {}", HOST.to_uppercase());
    assert_eq!(endpoint.curl("/", &["-H", &upper]).await.status, 200);
    assert_eq!(endpoint.curl_as(ELSEWHERE, "/", &["-H", &auth]).await.unwrap().status, 200);
}

#[tokio::test]
async fn without_a_host_header_the_tls_name_counts() {
    let endpoint = Endpoint::with_app(async |request| Response::new(text(request.headers()["host"].to_str().unwrap().to_owned()))).await;
    let mut client = endpoint.connect().await;
    client.send(format!("GET / HTTP/1.0\r\n{}\r\n\r\n", endpoint.auth())).await;
    assert!(client.head().await.starts_with("HTTP/1.0 200"), "HTTP/1.0 is spoken too");
    assert_eq!(client.rest().await.unwrap(), HOST);
}

#[tokio::test]
async fn an_absolute_target_names_the_endpoint() {
    let endpoint =
        Endpoint::with_app(async |request| Response::new(text(format!("{} {:?}", request.uri(), request.headers()["host"])))).await;
    let mut client = endpoint.connect().await;
    let (host, auth) = (HOST.to_uppercase(), endpoint.auth());
    client.send(format!("GET https://{host}:8443/a?b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{auth}\r\n\r\n")).await;
    assert!(client.rest().await.unwrap().ends_with(&format!("/a?b \"{host}:8443\"")));
}

#[tokio::test]
async fn ambiguous_messages_are_refused() {
    let endpoint = endpoint().await;
    for (headers, body) in [
        (vec!["content-length: 3", "content-length: 4"], "abcd"),
        (vec!["content-length: +3"], "abc"),
        (vec!["content-length: 3, 4"], "abcd"),
        (vec!["transfer-encoding: chunked, identity"], "0\r\n\r\n"),
        (vec!["transfer-encoding: xchunked"], "0\r\n\r\n"),
        (vec!["host: second.localhost"], ""),
        (vec!["x-a: b\0c"], ""),
        (vec![" folded: header"], ""),
        (vec!["spaced : header"], ""),
    ] {
        let mut client = endpoint.connect().await;
        client.request(&endpoint, "POST / HTTP/1.1", &headers).await;
        client.send(body).await;
        let head = client.head().await;
        assert!(head.starts_with("HTTP/1.1 400"), "{headers:?}: {head}");
    }
}

/// The transfer coding wins over the length on both sides alike and the connection ends after it (RFC 9112, 6.3), so no second
/// request can hide in the first.
#[tokio::test]
async fn a_request_cannot_be_smuggled() {
    let endpoint = Endpoint::with_app(async |request| {
        let (parts, body) = request.into_parts();
        let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
        Response::new(text(format!("{} {} {body:?}", parts.uri, parts.headers.contains_key("content-length"))))
    })
    .await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "POST /outer HTTP/1.1", &["content-length: 60", "transfer-encoding: chunked"]).await;
    client.send("0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let answer = client.rest().await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n/outer false b\"\""), "{answer}");
}

#[tokio::test]
async fn other_methods_and_sizes_are_refused() {
    let endpoint = endpoint().await;
    let mut client = endpoint.connect().await;
    client.request(&endpoint, &format!("CONNECT {HOST}:80 HTTP/1.1"), &[]).await;
    assert!(client.head().await.starts_with("HTTP/1.1 405"));

    let big = format!("x-big: {}", "a".repeat(70_000));
    let mut client = endpoint.connect().await;
    client.request(&endpoint, "GET / HTTP/1.1", &[&big]).await;
    assert!(client.head().await.starts_with("HTTP/1.1 431"));

    let fits = format!("x-big: {}", "a".repeat(60_000));
    assert_eq!(endpoint.curl("/", &["-H", &fits]).await.status, 200);
}

#[tokio::test]
async fn slow_clients_are_left() {
    let brief = Duration::from_millis(200);
    let config = IngressConfig { handshake_timeout: brief, header_timeout: brief, ..IngressConfig::default() };
    let endpoint = Endpoint::start_with(Guest::Unreachable, config).await;
    let mut client = endpoint.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: x\r\n").await;
    assert_eq!(client.rest().await.unwrap(), "");

    let mut silent = tokio::net::TcpStream::connect(endpoint.address).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, tokio::io::AsyncReadExt::read(&mut silent, &mut [0; 8])).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))));
    assert!(Client::new(endpoint.address, &endpoint.ca(), HOST).await.is_ok(), "others are still served");
}
