//! Which headers may cross the proxy: the application sees what the client meant for it, without the proxy's own and without those
//! of a single connection (RFC 9110, 7.6.1; SPEC 10.1).

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{self, Entry},
};
use uuid::Uuid;

/// Identifies a request to the client, to the application and in our log.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-amzn-requestid");

/// Headers that talk to the proxy.
const PROXY_PREFIX: &str = "x-aws-proxy-";

/// Belong to one connection, whether or not `Connection` lists them.
static HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Whom a message is for matters end to end; no `Connection` header may remove it.
static NEVER_HOP_BY_HOP: [HeaderName; 2] = [header::HOST, header::CONTENT_LENGTH];

/// Makes a client's headers the application's.
pub(crate) fn toward_guest(headers: &mut HeaderMap, request_id: Uuid) {
    // Trailers cross the proxy, if the client can take them.
    let trailers = lists(headers, &header::TE, "trailers");
    strip_hop_by_hop(headers);
    join_cookies(headers);
    let ours: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with(PROXY_PREFIX)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    identify(headers, request_id);
}

/// HTTP/2 clients may send cookies one by one, which HTTP/1.1 does not know (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        let joined = HeaderValue::from_bytes(&cookies.join(&b"; "[..])).expect("valid values and a separator are a valid value");
        headers.insert(header::COOKIE, joined);
    }
}

/// Makes an application's headers the client's.
pub(crate) fn toward_client(headers: &mut HeaderMap, request_id: Uuid) {
    strip_hop_by_hop(headers);
    identify(headers, request_id);
}

/// Sets the request's identifier, whatever was there.
pub(crate) fn identify(headers: &mut HeaderMap, request_id: Uuid) {
    let value = HeaderValue::try_from(request_id.to_string()).expect("a UUID is hexadecimal digits and dashes");
    headers.insert(REQUEST_ID, value);
}

/// Whether a header's comma-separated lists hold an item, in any case.
pub(crate) fn lists(headers: &HeaderMap, name: &HeaderName, item: &str) -> bool {
    items(headers, name).any(|listed| listed.eq_ignore_ascii_case(item))
}

/// The items of a header's comma-separated lists.
pub(crate) fn items<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = items(headers, &header::CONNECTION)
        .filter_map(|item| HeaderName::try_from(item).ok())
        .filter(|name| !NEVER_HOP_BY_HOP.contains(name))
        .collect();
    for name in listed.iter().chain(&HOP_BY_HOP) {
        if let Entry::Occupied(entry) = headers.entry(name) {
            entry.remove_entry_mult();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|&(name, value)| (HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap())).collect()
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_application_sees_neither_the_proxy_s_headers_nor_the_connection_s() {
        let mut headers = map(&[
            ("host", "a.localhost"),
            ("connection", "close, X-Secret , host, content-length"),
            ("x-secret", "1"),
            ("content-length", "5"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic x"),
            ("te", "gzip, Trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("x-aws-proxy-auth", "t"),
            ("x-aws-proxy-port", "80"),
            ("x-aws-proxy-whatever", "1"),
            ("x-amzn-requestid", "forged"),
            ("cookie", "a=b"),
        ]);
        headers.append(header::COOKIE, HeaderValue::from_static("c=d"));
        let id = Uuid::new_v4();
        toward_guest(&mut headers, id);
        assert_eq!(names(&headers), ["content-length", "cookie", "host", "te", "x-amzn-requestid"]);
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=b; c=d"]);
        assert_eq!(headers["x-amzn-requestid"], id.to_string());
    }

    #[test]
    fn the_client_sees_our_identifier_and_the_application_s_headers() {
        let mut headers = map(&[
            ("connection", "keep-alive, x-hop"),
            ("x-hop", "1"),
            ("set-cookie", "a=1"),
            ("x-amzn-requestid", "app"),
            ("trailer", "x-checksum"),
        ]);
        headers.append(header::SET_COOKIE, HeaderValue::from_static("b=2"));
        headers.append(REQUEST_ID, HeaderValue::from_static("app again"));
        toward_client(&mut headers, Uuid::nil());
        assert_eq!(names(&headers), ["set-cookie", "trailer", "x-amzn-requestid"]);
        assert_eq!(headers.get_all(header::SET_COOKIE).iter().count(), 2);
        assert_eq!(headers.get_all(REQUEST_ID).iter().collect::<Vec<_>>(), ["00000000-0000-0000-0000-000000000000"]);
    }
}
