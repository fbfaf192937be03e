//! Requests to a MicroVM that sleeps, is gone, or breaks.

use std::time::Duration;

use http::Response;
use tokio::{io::AsyncWriteExt, time::timeout};

use crate::support::{Endpoint, Guest, PATIENCE, header, read_head, text};

async fn until_waiting(endpoint: &Endpoint, count: usize) {
    let mut waiting = endpoint.plane.waiting.subscribe();
    let reached = waiting.wait_for(|now| *now == count);
    timeout(PATIENCE, reached).await.expect("the count of those who wait is reached in time").unwrap();
}

#[tokio::test]
async fn a_request_is_held_until_the_microvm_is_awake() {
    let endpoint = Endpoint::with_app(async |request| {
        let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap().to_bytes();
        Response::new(text(body))
    })
    .await;
    endpoint.plane.awake.send_replace(false);
    let wake = async {
        until_waiting(&endpoint, 2).await;
        endpoint.plane.awake.send_replace(true);
    };
    let (first, second, ()) = tokio::join!(endpoint.curl("/", &["-d", "held"]), endpoint.curl("/", &[]), wake);
    assert_eq!((first.status, first.text()), (200, "held"));
    assert_eq!(second.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_wait() {
    let endpoint = Endpoint::start(Guest::Unreachable).await;
    endpoint.plane.awake.send_replace(false);
    for headers in [&[][..], &["content-length: 4"]] {
        let mut client = endpoint.connect().await;
        client.request(&endpoint, "POST / HTTP/1.1", headers).await;
        client.send(if headers.is_empty() { "" } else { "body" }).await;
        until_waiting(&endpoint, 1).await;
        drop(client);
        until_waiting(&endpoint, 0).await;
    }
}

#[tokio::test]
async fn what_cannot_be_reached_is_a_502_without_a_body() {
    let endpoint = Endpoint::start(Guest::Unreachable).await;
    let answer = endpoint.curl("/", &[]).await;
    assert_eq!((answer.status, answer.text()), (502, ""));
    assert_eq!(answer.header("content-length"), Some("0"));
    assert!(answer.header("x-amzn-requestid").is_some());
}

#[tokio::test]
async fn what_does_not_wake_is_a_503_to_try_again() {
    let endpoint = Endpoint::start(Guest::TooSlow).await;
    let answer = endpoint.curl("/", &[]).await;
    assert_eq!(answer.status, 503);
    assert!(answer.header("retry-after").unwrap().parse::<u32>().unwrap() > 0);
}

#[tokio::test]
async fn an_application_that_gives_no_answer_is_a_502() {
    for answer in ["", "garbage\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-le", "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"] {
        let endpoint = Endpoint::with_raw(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        })
        .await;
        let answered = endpoint.curl("/", &[]).await;
        assert_eq!((answered.status, answered.text()), (502, ""), "{answer:?}");
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_is_not_made_to_look_whole() {
    for head in ["content-length: 10", "transfer-encoding: chunked"] {
        let endpoint = Endpoint::with_raw(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n3\r\nabc").as_bytes()).await.unwrap();
        })
        .await;
        let auth = endpoint.auth();
        let error = endpoint.curl_as(crate::support::HOST, "/", &["-H", &auth]).await.unwrap_err();
        assert!(error.starts_with("curl: ("), "{error}");
    }
}

#[tokio::test]
async fn waiting_is_no_activity_and_bytes_are() {
    let endpoint = Endpoint::with_app(async |_| Response::new(text("x"))).await;
    endpoint.plane.awake.send_replace(false);
    let before = endpoint.plane.activity.last();
    let wake = async {
        until_waiting(&endpoint, 1).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(endpoint.plane.activity.last(), before);
        endpoint.plane.awake.send_replace(true);
    };
    let (answer, ()) = tokio::join!(endpoint.curl("/", &[]), wake);
    assert_eq!(answer.status, 200);
    assert!(endpoint.plane.activity.last() > before);

    let after = endpoint.plane.activity.last();
    assert_eq!(endpoint.curl("/", &["-H", "x-aws-proxy-port: 22"]).await.status, 403);
    assert_eq!(endpoint.plane.activity.last(), after, "a refused request keeps nobody awake");
}

#[tokio::test]
async fn a_connection_survives_what_fails_on_it() {
    let endpoint = Endpoint::start(Guest::Unreachable).await;
    let mut client = endpoint.connect().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        client.request(&endpoint, "GET / HTTP/1.1", &[]).await;
        let head = client.head().await;
        assert!(head.starts_with("HTTP/1.1 502"), "{head}");
        ids.push(header(&head, "x-amzn-requestid").unwrap().to_owned());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3, "each request has an identifier of its own");
}
