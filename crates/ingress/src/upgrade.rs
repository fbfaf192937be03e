//! WebSocket handshakes: over HTTP/1.1 (RFC 6455) and over HTTP/2 (RFC 8441), which the application sees in HTTP/1.1 too. Other upgrades
//! are refused (SPEC 10.1).

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::ext::Protocol;

use crate::{
    credentials::MARKER,
    error::RequestError,
    headers::{items, lists},
};

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADE: HeaderValue = HeaderValue::from_static("upgrade");

/// How a client asked for a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handshake {
    /// GET with `Upgrade`: the whole connection becomes the WebSocket.
    Upgrade,
    /// Extended CONNECT: one stream of the connection does.
    Connect,
}

impl Handshake {
    /// Whether a request is a WebSocket handshake, and of which kind.
    pub(crate) fn of<B>(request: &Request<B>) -> Result<Option<Self>, RequestError> {
        let headers = request.headers();
        if let Some(protocol) = request.extensions().get::<Protocol>() {
            let whole = protocol.as_str().eq_ignore_ascii_case("websocket") && headers.contains_key(header::SEC_WEBSOCKET_VERSION);
            return if whole { Ok(Some(Self::Connect)) } else { Err(RequestError::InvalidUpgrade) };
        }
        if request.method() == Method::CONNECT {
            return Err(RequestError::MethodNotAllowed);
        }
        if !headers.contains_key(header::UPGRADE) || !lists(headers, &header::CONNECTION, "upgrade") {
            return Ok(None);
        }
        let whole = request.method() == Method::GET
            && lists(headers, &header::UPGRADE, "websocket")
            && headers.contains_key(header::SEC_WEBSOCKET_KEY)
            && headers.contains_key(header::SEC_WEBSOCKET_VERSION);
        if whole { Ok(Some(Self::Upgrade)) } else { Err(RequestError::InvalidUpgrade) }
    }

    /// Makes the client's handshake the application's, which is always an upgrade.
    pub(crate) fn ask<B>(self, request: &mut Request<B>) {
        *request.version_mut() = Version::HTTP_11;
        if self == Self::Connect {
            *request.method_mut() = Method::GET;
            request.extensions_mut().remove::<Protocol>();
            // A nonce for the next hop alone. HTTP/2 has no need of one, so the client sent none.
            let nonce = base64::engine::Engine::encode(&base64::engine::general_purpose::STANDARD, uuid::Uuid::new_v4());
            let nonce = HeaderValue::try_from(nonce).expect("base64 is visible ASCII");
            request.headers_mut().insert(header::SEC_WEBSOCKET_KEY, nonce);
        }
        set(request.headers_mut());
    }

    /// Makes an accepted upgrade the client's answer.
    pub(crate) fn grant<B>(self, response: &mut Response<B>) {
        match self {
            Self::Upgrade => set(response.headers_mut()),
            Self::Connect => {
                *response.status_mut() = StatusCode::OK;
                response.headers_mut().remove(header::SEC_WEBSOCKET_ACCEPT);
            }
        }
    }
}

fn set(headers: &mut HeaderMap) {
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
        assert_eq!(Handshake::of(&request("GET", &[upgrade, websocket, key, version])).unwrap(), Some(Handshake::Upgrade));
        assert_eq!(Handshake::of(&request("GET", &[key, version])).unwrap(), None);
        assert_eq!(Handshake::of(&request("GET", &[websocket, key, version])).unwrap(), None, "not for this connection");
        for (method, headers) in [
            ("GET", vec![upgrade, websocket]),
            ("GET", vec![upgrade, websocket, key]),
            ("POST", vec![upgrade, websocket, key, version]),
            ("GET", vec![upgrade, ("upgrade", "h2c"), key, version]),
        ] {
            assert!(matches!(Handshake::of(&request(method, &headers)), Err(RequestError::InvalidUpgrade)), "{method} {headers:?}");
        }
    }
    #[test]
    fn an_extended_connect_becomes_an_upgrade() {
        let connect = |protocol: &str| {
            let mut connect = request("CONNECT", &[("sec-websocket-version", "13")]);
            connect.extensions_mut().insert(Protocol::from(protocol));
            connect
        };
        let mut asked = connect("websocket");
        let handshake = Handshake::of(&asked).unwrap().unwrap();
        assert_eq!(handshake, Handshake::Connect);
        handshake.ask(&mut asked);
        assert_eq!(Handshake::of(&asked).unwrap(), Some(Handshake::Upgrade));
        assert_eq!(asked.headers()["sec-websocket-key"].len(), 24, "16 bytes in base64");

        assert!(matches!(Handshake::of(&connect("connect-udp")), Err(RequestError::InvalidUpgrade)));
        assert!(matches!(Handshake::of(&request("CONNECT", &[])), Err(RequestError::MethodNotAllowed)));
    }
}
