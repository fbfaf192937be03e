//! Reads from a request which port it is for and the token that opens it: from headers, or from WebSocket subprotocols, because
//! browsers cannot set headers on those (SPEC 10.1, 10.2).

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::{error::RequestError, headers::items};

/// Offered by WebSocket clients that put token and port into subprotocols.
pub(crate) const MARKER: &str = "lambda-microvms";

const AUTHENTICATION: &str = "lambda-microvms.authentication.";
const PORT: &str = "lambda-microvms.port.";

/// Digits of the largest port.
const MAX_PORT_DIGITS: usize = 5;

const AUTH_HEADER: HeaderName = HeaderName::from_static("x-aws-proxy-auth");
const PORT_HEADER: HeaderName = HeaderName::from_static("x-aws-proxy-port");

/// Where requests go that name no port.
const DEFAULT_PORT: u16 = 8080;

/// What a request shows to be let in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// `None` if there is none, or several, or one that is no text: which of them was meant is nobody's guess.
    pub(crate) token: Option<String>,
    pub(crate) port: u16,
}

/// What a WebSocket client offered beside the application's own subprotocols.
#[derive(Debug, Default)]
pub(crate) struct Offer {
    /// The proxy's subprotocols were offered, so the answer must select one.
    pub(crate) marker: bool,
    tokens: Vec<String>,
    ports: Vec<String>,
}

impl Offer {
    /// Takes the proxy's subprotocols out of a WebSocket handshake; the application's own stay.
    pub(crate) fn take(headers: &mut HeaderMap) -> Self {
        const PROTOCOL: HeaderName = header::SEC_WEBSOCKET_PROTOCOL;
        let mut offer = Self::default();
        let mut others = Vec::new();
        for item in items(headers, &PROTOCOL) {
            if item == MARKER {
                offer.marker = true;
            } else if let Some(token) = item.strip_prefix(AUTHENTICATION) {
                offer.tokens.push(token.to_owned());
            } else if let Some(port) = item.strip_prefix(PORT) {
                offer.ports.push(port.to_owned());
            } else {
                others.push(item);
            }
        }
        // Without a visible item left there is nothing to forward; blanks and commas alone offer nothing.
        match HeaderValue::try_from(others.join(", ")) {
            Ok(value) if !value.is_empty() => headers.insert(PROTOCOL, value),
            _ => headers.remove(PROTOCOL),
        };
        if offer.marker { offer } else { Self::default() }
    }
}

impl Credentials {
    /// Reads the headers; the subprotocols count where a header is missing.
    pub(crate) fn read(headers: &HeaderMap, offer: &Offer) -> Result<Self, RequestError> {
        let mut tokens = headers.get_all(AUTH_HEADER).iter();
        let token = match (tokens.next(), tokens.next()) {
            (None, _) => only(&offer.tokens),
            (Some(value), None) => value.to_str().ok().map(str::trim),
            (Some(_), Some(_)) => None,
        };
        let mut ports = headers.get_all(PORT_HEADER).iter();
        let port = match (ports.next(), ports.next()) {
            (None, _) if offer.ports.is_empty() => DEFAULT_PORT,
            (None, _) => parse_port(only(&offer.ports).ok_or(RequestError::InvalidPort)?)?,
            (Some(value), None) => parse_port(value.to_str().map_err(|_| RequestError::InvalidPort)?)?,
            (Some(_), Some(_)) => return Err(RequestError::InvalidPort),
        };
        Ok(Self { token: token.filter(|token| !token.is_empty()).map(str::to_owned), port })
    }
}

/// The item of a list that has one.
fn only(list: &[String]) -> Option<&str> {
    match list {
        [item] => Some(item),
        _ => None,
    }
}

fn parse_port(text: &str) -> Result<u16, RequestError> {
    let text = text.trim();
    // `parse` alone would take a sign, and zeros without end.
    if text.len() > MAX_PORT_DIGITS || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(RequestError::InvalidPort);
    }
    text.parse().ok().filter(|&port| port != 0).ok_or(RequestError::InvalidPort)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for &(name, value) in pairs {
            headers.append(name, HeaderValue::try_from(value).unwrap());
        }
        headers
    }

    fn read(pairs: &[(&'static str, &str)]) -> Option<(Option<String>, u16)> {
        Credentials::read(&map(pairs), &Offer::default()).ok().map(|read| (read.token, read.port))
    }

    #[test]
    fn headers_name_token_and_port() {
        assert_eq!(read(&[]), Some((None, 8080)));
        assert_eq!(read(&[("x-aws-proxy-auth", "")]), Some((None, 8080)));
        assert_eq!(read(&[("x-aws-proxy-auth", "t"), ("x-aws-proxy-port", "65535")]), Some((Some("t".into()), 65535)));
        assert_eq!(read(&[("x-aws-proxy-port", " 1 ")]), Some((None, 1)));
    }

    #[test]
    fn malformed_ports_are_refused() {
        for port in ["", "0", "65536", "-1", "+80", "8080x", "0x50", "80,81", "8 0", "99999999999999999999", "000080", "é"] {
            assert_eq!(read(&[("x-aws-proxy-port", port)]), None, "{port:?}");
        }
        assert_eq!(read(&[("x-aws-proxy-port", "80"), ("x-aws-proxy-port", "81")]), None);
    }

    #[test]
    fn subprotocols_are_taken_and_the_application_s_stay() {
        let mut headers = map(&[
            ("sec-websocket-protocol", "lambda-microvms, lambda-microvms.authentication.e.y.J"),
            ("sec-websocket-protocol", "lambda-microvms.port.9000, myapp.v1,graphql-ws"),
        ]);
        let offer = Offer::take(&mut headers);
        assert!(offer.marker);
        assert_eq!(headers.get_all("sec-websocket-protocol").iter().collect::<Vec<_>>(), ["myapp.v1, graphql-ws"]);
        assert_eq!(Credentials::read(&headers, &offer).unwrap(), Credentials { token: Some("e.y.J".into()), port: 9000 });
        headers.insert("x-aws-proxy-auth", HeaderValue::from_static("header"));
        headers.insert("x-aws-proxy-port", HeaderValue::from_static("1"));
        assert_eq!(Credentials::read(&headers, &offer).unwrap(), Credentials { token: Some("header".into()), port: 1 });
    }

    #[test]
    fn of_several_tokens_or_ports_none_counts() {
        assert_eq!(read(&[("x-aws-proxy-auth", "a"), ("x-aws-proxy-auth", "b")]), Some((None, 8080)));
        let offered = |protocols: &str| {
            let mut headers = map(&[("sec-websocket-protocol", protocols)]);
            let offer = Offer::take(&mut headers);
            Credentials::read(&headers, &offer).ok().map(|read| (read.token, read.port))
        };
        let twice = "lambda-microvms, lambda-microvms.authentication.a, lambda-microvms.authentication.b";
        assert_eq!(offered(twice), Some((None, 8080)));
        assert_eq!(offered("lambda-microvms, lambda-microvms.port.80, lambda-microvms.port.80"), None);
    }

    #[test]
    fn without_the_marker_subprotocols_let_nobody_in() {
        let mut headers = map(&[("sec-websocket-protocol", "lambda-microvms.authentication.t, lambda-microvms.port.x")]);
        let offer = Offer::take(&mut headers);
        assert_eq!(Credentials::read(&headers, &offer).unwrap(), Credentials { token: None, port: 8080 });
        assert!(headers.is_empty(), "but the application does not see them");
    }
}
