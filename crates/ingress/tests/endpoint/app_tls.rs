//! Applications that speak TLS with a certificate nobody knows.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use http_body_util::BodyExt;
use hyper::{server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use crate::support::{Endpoint, Guest, raw_guest, read_head, text};

/// What servers do that get plain HTTP where they expect TLS.
#[derive(Clone, Copy, PartialEq)]
enum Complaint {
    Alert,
    Silence,
    BadRequest,
}

/// An application that echoes, in whichever version of HTTP the handshake agrees on.
async fn tls_app(complaint: Complaint, connections: Arc<AtomicUsize>) -> Endpoint {
    let made = rcgen::generate_simple_self_signed(["app.invalid".to_owned()]).unwrap();
    let key = PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes()).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let guest = raw_guest(move |mut stream| {
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        async move {
            connections.fetch_add(1, Ordering::Relaxed);
            let mut first = [0];
            stream.peek(&mut first).await.unwrap();
            if first != [22] {
                let _ = stream.read(&mut [0; 4096]).await;
                let answer: &[u8] = match complaint {
                    Complaint::Alert => b"\x15\x03\x01\0\x02\x02\x0a",
                    Complaint::Silence => b"",
                    Complaint::BadRequest => b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
                };
                return stream.write_all(answer).await.unwrap();
            }
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|request: http::Request<hyper::body::Incoming>| async {
                let version = format!("{:?} ", request.version());
                let body = request.into_body().collect().await?.to_bytes();
                Ok::<_, hyper::Error>(http::Response::new(text([version.as_bytes(), &body].concat())))
            });
            let stream = TokioIo::new(stream);
            if http2 {
                let _ = conn::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await;
            } else {
                let _ = conn::http1::Builder::new().serve_connection(stream, service).await;
            }
        }
    })
    .await;
    Endpoint::start(Guest::At(guest)).await
}

#[tokio::test]
async fn it_is_found_out_by_the_first_request_and_remembered() {
    for complaint in [Complaint::Alert, Complaint::Silence, Complaint::BadRequest] {
        let connections = Arc::new(AtomicUsize::new(0));
        let endpoint = tls_app(complaint, connections.clone()).await;
        let answer = endpoint.curl("/", &[]).await;
        assert_eq!((answer.status, answer.text()), (200, "HTTP/1.1 "));
        assert_eq!(connections.load(Ordering::Relaxed), 2);
        let answer = endpoint.curl("/", &["-d", "body"]).await;
        assert_eq!((answer.status, answer.text()), (200, "HTTP/1.1 body"));
        assert_eq!(connections.load(Ordering::Relaxed), 3, "known now");
        let answer = endpoint.curl("/", &["-H", "x-aws-proxy-force-h2: true", "-d", "body"]).await;
        assert_eq!((answer.status, answer.text()), (200, "HTTP/2.0 body"));
    }
}

#[tokio::test]
async fn a_body_is_not_sent_twice_but_the_header_spares_the_detour() {
    let endpoint = tls_app(Complaint::Silence, Arc::default()).await;
    let answer = endpoint.curl("/", &["-d", "body"]).await;
    assert_eq!((answer.status, answer.text()), (502, ""), "its body went to a server that could not read it");
    assert_eq!(endpoint.curl("/", &["-d", "body"]).await.text(), "HTTP/1.1 body");

    let connections = Arc::new(AtomicUsize::new(0));
    let endpoint = tls_app(Complaint::Silence, connections.clone()).await;
    assert_eq!(endpoint.curl("/", &["-H", "x-aws-proxy-force-tls: true", "-d", "body"]).await.text(), "HTTP/1.1 body");
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn plain_applications_are_not_bothered_with_handshakes() {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let endpoint = Endpoint::with_raw(move |mut stream| {
        let count = count.clone();
        async move {
            count.fetch_add(1, Ordering::Relaxed);
            let head = read_head(&mut stream).await;
            assert!(head.starts_with("GET /"), "{head}");
            let status = if head.starts_with("GET /bad") { "400 Bad Request" } else { "200 OK" };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            if !head.starts_with("GET /none") {
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    for (path, status) in [("/", 200), ("/bad", 400), ("/none", 502), ("/", 200), ("/bad", 400)] {
        assert_eq!(endpoint.curl(path, &[]).await.status, status);
    }
    assert_eq!(connections.load(Ordering::Relaxed), 5);
    assert_eq!(endpoint.curl("/", &["-H", "x-aws-proxy-force-tls: true"]).await.status, 502, "forced, it cannot be spoken to");
}
