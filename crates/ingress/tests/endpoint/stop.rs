//! Stopping: what is under way may end, up to a limit.

use std::time::{Duration, Instant};

use hearth_ingress::IngressConfig;
use http::Response;
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};

use crate::support::{Endpoint, Guest, PATIENCE, app_guest, text};

async fn with_drain(drain_timeout: Duration) -> Endpoint {
    let guest = app_guest(async |_| Response::new(text("done"))).await;
    Endpoint::start_with(Guest::At(guest), IngressConfig { drain_timeout, ..IngressConfig::default() }).await
}

async fn hold(endpoint: &Endpoint) -> crate::support::Client {
    endpoint.plane.awake.send_replace(false);
    let mut client = endpoint.connect().await;
    client.request(endpoint, "GET / HTTP/1.1", &[]).await;
    timeout(PATIENCE, endpoint.plane.waiting.subscribe().wait_for(|count| *count == 1)).await.expect("the request waits").unwrap();
    client
}

#[tokio::test]
async fn a_request_under_way_is_answered_and_nobody_else_is() {
    let mut endpoint = with_drain(PATIENCE).await;
    let mut idle = endpoint.connect().await;
    let mut handshaking = TcpStream::connect(endpoint.address).await.unwrap();
    let mut busy = hold(&endpoint).await;
    endpoint.shutdown.cancel();
    assert_eq!(idle.rest().await.unwrap(), "", "an idle connection ends at once");
    assert!(matches!(timeout(PATIENCE, handshaking.read(&mut [0; 1])).await, Ok(Ok(0) | Err(_))));
    assert!(!endpoint.served.is_finished());
    endpoint.plane.awake.send_replace(true);
    let answer = busy.rest().await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
    timeout(PATIENCE, &mut endpoint.served).await.expect("serving ends").unwrap();
    assert!(TcpStream::connect(endpoint.address).await.is_err());
}

#[tokio::test]
async fn what_does_not_end_is_cut() {
    let limit = Duration::from_millis(200);
    let mut endpoint = with_drain(limit).await;
    let mut stuck = hold(&endpoint).await;
    let started = Instant::now();
    endpoint.shutdown.cancel();
    timeout(PATIENCE, &mut endpoint.served).await.expect("serving ends").unwrap();
    assert!(started.elapsed() >= limit);
    assert!(!stuck.rest().await.is_ok_and(|answer| answer.contains("200")));
    assert_eq!(*endpoint.plane.waiting.borrow(), 0, "the wait was given up");
}
