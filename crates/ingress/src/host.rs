//! Finds out which endpoint a request is for.

use http::{Request, header, uri::Authority};

use crate::error::RequestError;

/// The endpoint's name, in lower case and without a port: from an absolute request target, else from `Host` (RFC 9112, 3.2.2), else
/// from the name that the TLS client asked for. A request for another name than that one came by the wrong connection: HTTP/2 clients try
/// that, because one certificate is good for many endpoints (RFC 9113, 9.1.1), and repeat it on a connection of its own when told.
pub(crate) fn endpoint<B>(request: &Request<B>, server_name: Option<&str>) -> Result<String, RequestError> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = match (request.uri().authority(), hosts.next(), hosts.next()) {
        (_, _, Some(_)) => return Err(RequestError::InvalidHost),
        (Some(authority), _, _) => authority.host().to_owned(),
        (None, Some(host), None) => {
            let authority = Authority::try_from(host.as_bytes()).map_err(|_| RequestError::InvalidHost)?;
            if authority.as_str().contains('@') {
                return Err(RequestError::InvalidHost);
            }
            authority.host().to_owned()
        }
        (None, None, None) => server_name.ok_or(RequestError::InvalidHost)?.to_owned(),
    };
    let host = normal(&host);
    match server_name {
        Some(server_name) if normal(server_name) != host => Err(RequestError::Misdirected),
        _ => Ok(host),
    }
}

fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(target: &str, hosts: &[&str]) -> Result<String, RequestError> {
        with_name(target, hosts, None)
    }

    fn with_name(target: &str, hosts: &[&str], server_name: Option<&str>) -> Result<String, RequestError> {
        let mut request = Request::builder().uri(target);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        endpoint(&request.body(()).unwrap(), server_name)
    }

    #[test]
    fn the_host_header_names_the_endpoint() {
        assert_eq!(of("/", &["A.Localhost:8443"]).unwrap(), "a.localhost");
        assert_eq!(of("/", &["a.localhost."]).unwrap(), "a.localhost");
        assert_eq!(of("https://b.localhost:1/x", &["a.localhost"]).unwrap(), "b.localhost");
        assert_eq!(of("/", &["[::1]:8443"]).unwrap(), "[::1]");
    }

    #[test]
    fn the_name_of_the_tls_client_is_the_request_s() {
        let named = |host: &[&str]| with_name("/", host, Some("SNI.localhost"));
        assert_eq!(named(&[]).unwrap(), "sni.localhost");
        assert_eq!(named(&["sni.Localhost.:8443"]).unwrap(), "sni.localhost");
        for other in ["localhost", "a.localhost", "127.0.0.1", "sni.localhost.example.com"] {
            assert!(matches!(named(&[other]), Err(RequestError::Misdirected)), "{other}");
        }
    }

    #[test]
    fn ambiguous_hosts_are_refused() {
        for hosts in [&["a.localhost", "b.localhost"][..], &[""], &["a b"], &["a@b"], &["a/b"]] {
            assert!(matches!(of("/", hosts), Err(RequestError::InvalidHost)), "{hosts:?}");
        }
    }
}
