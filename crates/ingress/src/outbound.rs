//! Makes a client's request the application's, and an application's answer the client's.

use std::sync::Arc;

use http::{HeaderValue, Request, Response, StatusCode, Uri, header, uri::PathAndQuery};
use http_body::Body;
use hyper::ext::on_informational;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    app::{Speech, Version},
    body::Upload,
    headers,
    upgrade::Handshake,
};

/// Makes a client's request the application's.
pub(crate) fn prepare(request: &mut Request<Upload>, endpoint: &str, speech: Speech, handshake: Option<Handshake>, id: Uuid) {
    if request.uri().authority().is_some() || !request.headers().contains_key(header::HOST) {
        let authority = request.uri().authority().map_or(endpoint, |authority| authority.as_str());
        let host = HeaderValue::try_from(authority).expect("an authority is visible ASCII");
        request.headers_mut().insert(header::HOST, host);
    }
    headers::toward_guest(request.headers_mut(), id);
    *request.uri_mut() = target(request, speech);
    match (speech.version, handshake) {
        (Version::Http1, Some(handshake)) => handshake.ask(request),
        (Version::Http1, None) => {
            *request.version_mut() = http::Version::HTTP_11;
            request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            ask_before_body(request);
        }
        (Version::Http2, _) => {
            *request.version_mut() = http::Version::HTTP_2;
            // The target has it.
            request.headers_mut().remove(header::HOST);
            // hyper passes no decision on.
            request.headers_mut().remove(header::EXPECT);
        }
    }
}

/// HTTP/1.1 applications get the path alone, because an absolute target is for proxies.
fn target<B>(request: &Request<B>, speech: Speech) -> Uri {
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    if speech.version == Version::Http1 {
        return Uri::from(path);
    }
    let host = request.headers().get(header::HOST).map_or(&b""[..], HeaderValue::as_bytes);
    let scheme = if speech.tls { "https" } else { "http" };
    Uri::builder().scheme(scheme).authority(host).path_and_query(path).build().expect("the host has been checked")
}

/// Leaves the decision about an expected 100 (Continue) to the application, and the client's body with the client until then.
fn ask_before_body(request: &mut Request<Upload>) {
    let headers = request.headers_mut();
    let expects = headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if !expects || request.body().is_end_stream() {
        request.headers_mut().remove(header::EXPECT);
        return;
    }
    let wanted = Arc::new(Notify::new());
    request.body_mut().hold(wanted.clone());
    on_informational(request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            wanted.notify_one();
        }
    });
}

/// The same request once more, without a body.
pub(crate) fn again(request: &Request<Upload>) -> Request<Upload> {
    let mut again = Request::new(Upload::empty());
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.version_mut() = request.version();
    *again.headers_mut() = request.headers().clone();
    again
}

/// Makes an application's answer the client's.
pub(crate) fn tidy<B>(response: &mut Response<B>, id: Uuid) {
    // hyper fits it to what the client speaks.
    *response.version_mut() = http::Version::HTTP_11;
    headers::toward_client(response.headers_mut(), id);
}
