//! Certificates as clients judge them.

use std::process::Stdio;

use http::Response;
use tokio::process::Command;

use crate::support::{Client, ELSEWHERE, Endpoint, HOST, text};

async fn endpoint() -> Endpoint {
    Endpoint::with_app(async |_| Response::new(text("hello"))).await
}

#[tokio::test]
async fn curl_trusts_the_wildcard_of_any_region() {
    let endpoint = endpoint().await;
    let auth = endpoint.auth();
    for host in [HOST, ELSEWHERE] {
        for version in [["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3", "--tls-max", "1.3"]] {
            let answer = endpoint.curl_as(host, "/", &[&["-H", &auth], &version[..]].concat()).await.unwrap();
            assert_eq!((answer.status, answer.text()), (200, "hello"), "{host} {version:?}");
        }
    }
    let old = endpoint.curl_as(HOST, "/", &["--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"]).await;
    assert!(old.is_err());
}

#[tokio::test]
async fn clients_get_http2_if_they_have_it() {
    let endpoint = endpoint().await;
    for (flag, version) in [("--http2", "HTTP/2 200"), ("--http1.1", "HTTP/1.1 200"), ("--no-alpn", "HTTP/1.1 200")] {
        let answer = endpoint.curl("/", &[flag]).await;
        assert!(answer.head.starts_with(version), "{flag}: {}", answer.head);
    }
}

#[tokio::test]
async fn names_that_are_no_endpoint_s_are_not_recognised() {
    let endpoint = endpoint().await;
    for name in ["example.com", "a.b.lambda-microvm.us-east-1.localhost"] {
        let refusal = Client::new(endpoint.address, &endpoint.ca(), name).await.err().unwrap();
        assert!(refusal.to_string().contains("UnrecognisedName"), "{name}: {refusal}");
    }
    for name in ["localhost", "127.0.0.1"] {
        assert!(Client::new(endpoint.address, &endpoint.ca(), name).await.is_ok(), "{name}");
    }
}

/// Python verifies strictly from 3.13 on; older ones do when asked to.
#[tokio::test]
async fn python_s_strict_verification_accepts_the_certificate() {
    const SCRIPT: &str = r"
import socket, ssl, sys
ca, port, host, token = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
with context.wrap_socket(socket.create_connection(('127.0.0.1', int(port)), 20), server_hostname=host) as s:
    s.sendall(f'GET / HTTP/1.1\r\nhost: {host}\r\nx-aws-proxy-auth: {token}\r\nconnection: close\r\n\r\n'.encode())
    answer = b''.join(iter(lambda: s.recv(4096), b''))
assert answer.startswith(b'HTTP/1.1 200') and answer.endswith(b'hello'), answer
";
    let endpoint = endpoint().await;
    let output = Command::new("python3")
        .args(["-c", SCRIPT])
        .arg(endpoint.ca())
        .args([&endpoint.address.port().to_string(), HOST, &endpoint.token()])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
