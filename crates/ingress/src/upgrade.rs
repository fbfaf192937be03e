//! Tells a WebSocket handshake from an ordinary request and from other upgrades, which the endpoint refuses (SPEC 10.1).

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};

use crate::{
    credentials::MARKER,
    error::RequestError,
    headers::{items, lists},
};

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADE: HeaderValue = HeaderValue::from_static("upgrade");

/// Whether a request is a WebSocket handshake (RFC 6455, 4.2.1).
pub(crate) fn is_websocket<B>(request: &Request<B>) -> Result<bool, RequestError> {
    let headers = request.headers();
    if !headers.contains_key(header::UPGRADE) || !lists(headers, &header::CONNECTION, "upgrade") {
        return Ok(false);
    }
    let handshake = request.method() == Method::GET
        && lists(headers, &header::UPGRADE, "websocket")
        && headers.contains_key(header::SEC_WEBSOCKET_KEY)
        && headers.contains_key(header::SEC_WEBSOCKET_VERSION);
    if handshake { Ok(true) } else { Err(RequestError::InvalidUpgrade) }
}

/// Asks for the upgrade on the next connection, or grants it.
pub(crate) fn set(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, UPGRADE);
    headers.insert(header::UPGRADE, WEBSOCKET);
}

/// A client that offered the proxy's subprotocols must be told one; when the application chose none it is the proxy's own.
pub(crate) fn select_subprotocol(headers: &mut HeaderMap) {
    const PROTOCOL: HeaderName = header::SEC_WEBSOCKET_PROTOCOL;
    if items(headers, &PROTOCOL).next().is_none() {
        headers.insert(PROTOCOL, HeaderValue::from_static(MARKER));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method);
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn only_whole_handshakes_are_upgrades() {
        let upgrade = ("connection", "keep-alive, Upgrade");
        let key = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let version = ("sec-websocket-version", "13");
        let websocket = ("upgrade", "WebSocket");
        assert!(is_websocket(&request("GET", &[upgrade, websocket, key, version])).unwrap());
        assert!(!is_websocket(&request("GET", &[key, version])).unwrap());
        assert!(!is_websocket(&request("GET", &[websocket, key, version])).unwrap(), "not for this connection");
        for (method, headers) in [
            ("GET", vec![upgrade, websocket]),
            ("GET", vec![upgrade, websocket, key]),
            ("POST", vec![upgrade, websocket, key, version]),
            ("GET", vec![upgrade, ("upgrade", "h2c"), key, version]),
        ] {
            assert!(matches!(is_websocket(&request(method, &headers)), Err(RequestError::InvalidUpgrade)), "{method} {headers:?}");
        }
    }
}
