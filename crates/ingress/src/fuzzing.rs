//! What the fuzz targets reach of the parsers in here.

use http::{HeaderMap, Request};

use crate::{
    credentials::{Credentials, Offer},
    host,
};

/// Token and port of a request; takes what is the proxy's out of its subprotocols.
pub fn credentials(headers: &mut HeaderMap) -> Option<(Option<String>, u16)> {
    let offer = Offer::take(headers);
    let read = Credentials::read(headers, &offer).ok()?;
    Some((read.token, read.port))
}

/// The host that a request is for.
pub fn endpoint(request: &Request<()>, server_name: Option<&str>) -> Option<String> {
    host::endpoint(request, server_name).ok()
}
