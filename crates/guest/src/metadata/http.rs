//! HTTP/1.1 for the service.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::{
    answer::{Asked, answer},
    host::Host,
    tokens::Tokens,
};

/// How long a client may take to send the head of a request, also of the next one on a connection.
const HEAD: Duration = Duration::from_secs(60);

/// Serves one connection.
pub async fn serve(connection: TcpStream, host: Host, tokens: Arc<Tokens>) {
    let service = service_fn(|request: Request<Incoming>| {
        let (host, tokens) = (host.clone(), Arc::clone(&tokens));
        async move { Ok::<_, Infallible>(respond(&request, &host, &tokens).await) }
    });
    let served =
        http1::Builder::new().timer(TokioTimer::new()).header_read_timeout(HEAD).serve_connection(TokioIo::new(connection), service);
    // A client that breaks off has noticed.
    let _ = served.await;
}

async fn respond(request: &Request<Incoming>, host: &Host, tokens: &Tokens) -> Response<Full<Bytes>> {
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let asked = Asked {
        method: request.method(),
        path: request.uri().path(),
        token: header("x-aws-ec2-metadata-token"),
        lifetime: header("x-aws-ec2-metadata-token-ttl-seconds"),
        forwarded: request.headers().contains_key("x-forwarded-for"),
    };
    let answer = answer(asked, host, tokens, SystemTime::now()).await;
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if let Some(seconds) = answer.lifetime {
        response.headers_mut().insert("x-aws-ec2-metadata-token-ttl-seconds", seconds.into());
    }
    response
}
