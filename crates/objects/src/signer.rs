//! Who a request says it is signed by, before anybody has checked it.

use http::{HeaderMap, Uri, header::AUTHORIZATION};

/// Longest validity of a presigned URL, in seconds: a week.
pub(crate) const LONGEST_PRESIGNED: u64 = 604_800;

/// The access key and the session token of a request, and how long it is good for if it is a presigned URL.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Signer {
    pub access_key_id: Option<String>,
    pub token: Option<String>,
    pub expires: Option<String>,
    /// Signed by a header of before version 4. Presigned URLs of version 2 are what SDKs still make where nothing tells them otherwise.
    pub outdated: bool,
}

impl Signer {
    /// Reads headers and query.
    pub fn of(uri: &Uri, headers: &HeaderMap) -> Self {
        let mut signer = Self::default();
        let key_of = |credential: &str| credential.split('/').next().map(str::to_owned);
        if let Some(header) = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()) {
            signer.outdated = header.starts_with("AWS ");
            signer.access_key_id = header.split_once("Credential=").and_then(|(_, credential)| key_of(credential));
        }
        signer.token = headers.get("x-amz-security-token").and_then(|value| value.to_str().ok()).map(str::to_owned);
        for (name, value) in uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')) {
            let value = || percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned();
            match name.to_ascii_lowercase().as_str() {
                "x-amz-credential" => signer.access_key_id = key_of(&value()),
                "x-amz-security-token" => signer.token = Some(value()),
                "x-amz-expires" => signer.expires = Some(value()),
                "awsaccesskeyid" => signer.access_key_id = Some(value()),
                _ => {}
            }
        }
        signer
    }

    /// Whether a presigned URL is good for longer than may be.
    pub fn is_too_long(&self) -> bool {
        self.expires.as_ref().is_some_and(|text| text.parse::<u64>().map_or(true, |seconds| seconds > LONGEST_PRESIGNED))
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn signer(request: http::request::Builder) -> Signer {
        let (parts, ()) = request.body(()).unwrap().into_parts();
        Signer::of(&parts.uri, &parts.headers)
    }

    #[test]
    fn headers_and_presigned_urls_name_their_key() {
        let signed = "AWS4-HMAC-SHA256 Credential=AKID/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00";
        let found = signer(Request::get("/b/k").header("authorization", signed).header("x-amz-security-token", "t"));
        assert_eq!((found.access_key_id.as_deref(), found.token.as_deref(), found.outdated), (Some("AKID"), Some("t"), false));
        let found = signer(Request::get("/b/k?X-Amz-Credential=ASIA%2F20260101&X-Amz-Security-Token=a%2Bb&X-Amz-Expires=604800"));
        assert_eq!((found.access_key_id.as_deref(), found.token.as_deref()), (Some("ASIA"), Some("a+b")));
        assert!(!found.is_too_long());
        assert!(signer(Request::get("/b/k?X-Amz-Expires=604801")).is_too_long());
        assert!(signer(Request::get("/b/k?X-Amz-Expires=-1")).is_too_long());
        let found = signer(Request::get("/b/k?AWSAccessKeyId=AKID&Signature=x&Expires=1&x-amz-security-token=t"));
        assert_eq!((found.access_key_id.as_deref(), found.token.as_deref(), found.outdated), (Some("AKID"), Some("t"), false));
        assert!(signer(Request::get("/b/k").header("authorization", "AWS AKID:x")).outdated);
        assert_eq!(signer(Request::get("/b/k")), Signer::default());
    }
}
