//! Verifies AWS Signature Version 4 in the `Authorization` header.
//!
//! Written here because the one maintained library for it encodes the path once, as S3 does, where every other service encodes it twice:
//! it refuses what SDKs sign for paths with an ARN in them. It also fixes the clock skew at 15 minutes and secrets at 40 characters.
//! Source: AWS IAM user guide, "Create a signed AWS API request".

use std::time::{Duration, SystemTime};

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, InvalidHeaderValue},
    request::Parts,
};
use ring::{digest, hmac};
use time::{OffsetDateTime, PrimitiveDateTime, format_description::BorrowedFormatItem, macros::format_description};

use crate::auth::SECURITY_TOKEN;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const AMZ_DATE: HeaderName = HeaderName::from_static("x-amz-date");
const BASIC_FORMAT: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// Why a signature is not accepted. The texts are the ones callers of AWS see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SignatureError {
    /// the request is not signed
    #[error("Missing Authentication Token")]
    Missing,
    /// the header or the date cannot be read
    #[error("{0}")]
    Incomplete(String),
    /// the scope is not for this service, or the date is not now
    #[error("{0}")]
    Scope(String),
    /// the signature is not the one that the secret makes
    #[error(
        "The request signature we calculated does not match the signature you provided. \
         Check your AWS Secret Access Key and signing method. Consult the service documentation for details."
    )]
    Mismatch,
}

/// The parts of an `Authorization` header, none of them verified yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Claims<'r> {
    pub access_key_id: &'r str,
    pub region: &'r str,
    /// For example `lambda` or `s3`.
    pub service: &'r str,
    date: &'r str,
    scope: &'r str,
    signed_headers: &'r str,
    signature: &'r str,
}

impl<'r> Claims<'r> {
    /// Reads the header `Authorization`.
    pub fn of(headers: &'r HeaderMap) -> Result<Self, SignatureError> {
        let header = headers.get(AUTHORIZATION).ok_or(SignatureError::Missing)?;
        let header = header.to_str().map_err(|_| SignatureError::Incomplete("Authorization header is not text.".to_owned()))?;
        let Some((ALGORITHM, parameters)) = header.trim().split_once(' ') else {
            let algorithm = header.split(' ').next().unwrap_or_default();
            return Err(SignatureError::Incomplete(format!("Unsupported AWS 'algorithm': '{algorithm}'.")));
        };
        let parameter = |name: &str| {
            let mut pairs = parameters.split(',').filter_map(|pair| pair.trim().split_once('='));
            pairs
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .ok_or_else(|| SignatureError::Incomplete(format!("Authorization header requires '{name}' parameter.")))
        };
        let credential = parameter("Credential")?;
        let (access_key_id, scope) = credential.split_once('/').unwrap_or((credential, ""));
        let [date, region, service, "aws4_request"] = *scope.split('/').collect::<Vec<_>>() else {
            return Err(SignatureError::Incomplete(format!(
                "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, got '{credential}'"
            )));
        };
        Ok(Self {
            access_key_id,
            region,
            service,
            date,
            scope,
            signed_headers: parameter("SignedHeaders")?,
            signature: parameter("Signature")?,
        })
    }

    /// Checks that `secret` made this signature for the request, at most `skew` from `now`, for `service`.
    pub fn verify(
        &self,
        parts: &Parts,
        body: &[u8],
        secret: &str,
        service: &str,
        now: SystemTime,
        skew: Duration,
    ) -> Result<(), SignatureError> {
        let timestamp =
            parts.headers.get(AMZ_DATE).and_then(|value| value.to_str().ok()).ok_or_else(|| {
                SignatureError::Incomplete("Authorization header requires existence of a 'X-Amz-Date' header.".to_owned())
            })?;
        self.check_date(timestamp, now.into(), skew)?;
        if self.service != service {
            return Err(SignatureError::Scope(format!("Credential should be scoped to correct service: '{service}'.")));
        }
        let signed = |header: &str| self.signed_headers.split(';').any(|name| name == header);
        if !signed("host") {
            return Err(SignatureError::Scope("'Host' must be a 'SignedHeader' in the AWS Authorization.".to_owned()));
        }
        // What is not signed could have been put there by anybody. The session token is sealed by itself, and some clients add it last.
        let meaningful = |name: &&HeaderName| name.as_str().starts_with("x-amz-") && *name != SECURITY_TOKEN && *name != AMZ_DATE;
        if let Some(name) = parts.headers.keys().filter(meaningful).find(|name| !signed(name.as_str())) {
            return Err(SignatureError::Scope(format!("There were headers present in the request which were not signed: {name}")));
        }

        let text = self.string_to_sign(parts, body, timestamp);
        let signature = unhex(self.signature).ok_or(SignatureError::Mismatch)?;
        hmac::verify(&self.signing_key(secret), text.as_bytes(), &signature).map_err(|_| SignatureError::Mismatch)
    }

    fn string_to_sign(&self, parts: &Parts, body: &[u8], timestamp: &str) -> String {
        let canonical = canonical_request(parts, self.signed_headers, body);
        format!("{ALGORITHM}\n{timestamp}\n{}\n{}", self.scope, hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref()))
    }

    fn check_date(&self, timestamp: &str, now: OffsetDateTime, skew: Duration) -> Result<(), SignatureError> {
        let signed_at = PrimitiveDateTime::parse(timestamp, BASIC_FORMAT).map_err(|_| {
            SignatureError::Incomplete(format!(
                "Date must be in ISO-8601 'basic format'. Got '{timestamp}'. See http://en.wikipedia.org/wiki/ISO_8601"
            ))
        })?;
        let signed_at = signed_at.assume_utc();
        let basic = |at: OffsetDateTime| at.format(BASIC_FORMAT).unwrap_or_default();
        let minutes = skew.as_secs() / 60;
        if signed_at < now - skew {
            let earliest = basic(now - skew);
            return Err(SignatureError::Scope(format!(
                "Signature expired: {timestamp} is now earlier than {earliest} ({} - {minutes} min.)",
                basic(now)
            )));
        }
        if signed_at > now + skew {
            let latest = basic(now + skew);
            return Err(SignatureError::Scope(format!(
                "Signature not yet current: {timestamp} is still later than {latest} ({} + {minutes} min.)",
                basic(now)
            )));
        }
        if timestamp.split('T').next() != Some(self.date) {
            return Err(SignatureError::Scope(format!(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '{}' != '{}'.",
                self.date, timestamp
            )));
        }
        Ok(())
    }

    fn signing_key(&self, secret: &str) -> hmac::Key {
        let key = |bytes: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, bytes);
        [self.date, self.region, self.service, "aws4_request"]
            .iter()
            .fold(key(format!("AWS4{secret}").as_bytes()), |k, part| key(hmac::sign(&k, part.as_bytes()).as_ref()))
    }
}

/// What a request is signed with.
#[derive(Clone, Copy)]
pub struct Signing<'k> {
    pub access_key_id: &'k str,
    pub secret_access_key: &'k str,
    /// Of temporary credentials.
    pub session_token: Option<&'k str>,
    pub region: &'k str,
    /// For example `sts`.
    pub service: &'k str,
}

/// Signs a request to another server: all headers that it has, `Host` among them, and the date and the token, which are added.
pub fn sign(parts: &mut Parts, body: &[u8], signing: Signing<'_>, now: SystemTime) -> Result<(), InvalidHeaderValue> {
    let Signing { access_key_id, secret_access_key, session_token, region, service } = signing;
    let timestamp = OffsetDateTime::from(now).format(BASIC_FORMAT).unwrap_or_default();
    parts.headers.insert(AMZ_DATE, HeaderValue::from_str(&timestamp)?);
    if let Some(token) = session_token {
        parts.headers.insert(SECURITY_TOKEN, HeaderValue::from_str(token)?);
    }
    let mut names: Vec<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    let signed_headers = names.join(";");
    let date = timestamp.split('T').next().unwrap_or_default();
    let scope = format!("{date}/{region}/{service}/aws4_request");
    let claims = Claims { access_key_id, region, service, date, scope: &scope, signed_headers: &signed_headers, signature: "" };
    let signature = hmac::sign(&claims.signing_key(secret_access_key), claims.string_to_sign(parts, body, &timestamp).as_bytes());
    let signature = hex(signature.as_ref());
    let value = format!("{ALGORITHM} Credential={access_key_id}/{scope}, SignedHeaders={signed_headers}, Signature={signature}");
    parts.headers.insert(AUTHORIZATION, HeaderValue::from_str(&value)?);
    Ok(())
}

fn canonical_request(parts: &Parts, signed_headers: &str, body: &[u8]) -> String {
    let mut headers = String::new();
    for name in signed_headers.split(';') {
        let values =
            parts.headers.get_all(name).iter().map(|value| collapse(&String::from_utf8_lossy(value.as_bytes()))).collect::<Vec<_>>();
        headers += &format!("{name}:{}\n", values.join(","));
    }
    format!(
        "{}\n{}\n{}\n{headers}\n{signed_headers}\n{}",
        parts.method,
        canonical_path(parts.uri.path()),
        canonical_query(parts.uri.query().unwrap_or_default()),
        hex(digest::digest(&digest::SHA256, body).as_ref())
    )
}

/// The path as it was sent, normalised and encoded once more.
fn canonical_path(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    let encoded: String = segments.iter().map(|segment| format!("/{}", encode(segment.as_bytes()))).collect();
    if encoded.is_empty() || path.ends_with('/') { encoded + "/" } else { encoded }
}

fn canonical_query(query: &str) -> String {
    let recode = |text: &str| encode(&percent_encoding::percent_decode_str(text).collect::<Vec<u8>>());
    let mut pairs: Vec<(String, String)> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (recode(name), recode(value)))
        .collect();
    pairs.sort();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

fn encode(bytes: &[u8]) -> String {
    let mut encoded = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(*byte)),
            byte => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}

/// Trims a header's value and folds runs of spaces into one.
fn collapse(value: &str) -> String {
    value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    // The pair of AWS's published test suite.
    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const SKEW: Duration = Duration::from_secs(300);

    fn at(timestamp: &str) -> SystemTime {
        PrimitiveDateTime::parse(timestamp, BASIC_FORMAT).unwrap().assume_utc().into()
    }

    fn parts(request: http::request::Builder) -> Parts {
        request.body(()).unwrap().into_parts().0
    }

    fn authorization(scope: &str, headers: &str, signature: &str) -> String {
        format!("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/{scope}, SignedHeaders={headers}, Signature={signature}")
    }

    /// `get-vanilla-query-order-key-case` of the test suite.
    fn published(signature: &str) -> Parts {
        parts(
            Request::get("/?Param2=value2&Param1=value1")
                .header("host", "example.amazonaws.com")
                .header("x-amz-date", "20150830T123600Z")
                .header("authorization", authorization("20150830/us-east-1/service/aws4_request", "host;x-amz-date", signature)),
        )
    }

    const PUBLISHED: &str = "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500";

    fn verify(parts: &Parts, body: &[u8], secret: &str, now: &str) -> Result<(), SignatureError> {
        Claims::of(&parts.headers)?.verify(parts, body, secret, "service", at(now), SKEW)
    }

    #[test]
    fn the_published_example_verifies() {
        assert_eq!(verify(&published(PUBLISHED), b"", SECRET, "20150830T123600Z"), Ok(()));
    }

    #[test]
    fn what_is_signed_here_is_what_was_published() {
        let signing = Signing {
            access_key_id: "AKIDEXAMPLE",
            secret_access_key: SECRET,
            session_token: None,
            region: "us-east-1",
            service: "service",
        };
        let mut request = parts(Request::get("/?Param2=value2&Param1=value1").header("host", "example.amazonaws.com"));
        sign(&mut request, b"", signing, at("20150830T123600Z")).unwrap();
        assert_eq!(request.headers, published(PUBLISHED).headers);

        let mut request = parts(Request::post("/").header("host", "sts.amazonaws.com").header("content-type", "text/plain"));
        sign(&mut request, b"Action=x", Signing { session_token: Some("token"), ..signing }, at("20150830T123600Z")).unwrap();
        assert_eq!(request.headers[SECURITY_TOKEN], "token");
        assert_eq!(verify(&request, b"Action=x", SECRET, "20150830T123600Z"), Ok(()));
        assert_eq!(verify(&request, b"Action=y", SECRET, "20150830T123600Z"), Err(SignatureError::Mismatch));
    }

    #[test]
    fn anything_else_signed_does_not() {
        let now = "20150830T123600Z";
        assert_eq!(verify(&published(PUBLISHED), b"{}", SECRET, now), Err(SignatureError::Mismatch));
        assert_eq!(verify(&published(PUBLISHED), b"", "another", now), Err(SignatureError::Mismatch));
        for signature in ["", "b9", "zz", &PUBLISHED.replace('b', "c"), "\u{e9}\u{e9}"] {
            assert!(verify(&published(signature), b"", SECRET, now).is_err(), "{signature}");
        }
        let mut tampered = published(PUBLISHED);
        tampered.uri = "/?Param2=value2&Param1=value3".parse().unwrap();
        assert_eq!(verify(&tampered, b"", SECRET, now), Err(SignatureError::Mismatch));
        let mut tampered = published(PUBLISHED);
        tampered.method = http::Method::DELETE;
        assert_eq!(verify(&tampered, b"", SECRET, now), Err(SignatureError::Mismatch));
    }

    #[test]
    fn a_signature_is_good_for_five_minutes_around_its_date() {
        for now in ["20150830T123100Z", "20150830T124100Z"] {
            assert_eq!(verify(&published(PUBLISHED), b"", SECRET, now), Ok(()), "{now}");
        }
        assert_eq!(
            verify(&published(PUBLISHED), b"", SECRET, "20150830T124101Z").unwrap_err().to_string(),
            "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z (20150830T124101Z - 5 min.)"
        );
        assert_eq!(
            verify(&published(PUBLISHED), b"", SECRET, "20150830T123059Z").unwrap_err().to_string(),
            "Signature not yet current: 20150830T123600Z is still later than 20150830T123559Z (20150830T123059Z + 5 min.)"
        );
    }

    #[test]
    fn headers_that_cannot_be_read_are_incomplete() {
        let unsigned = parts(Request::get("/"));
        assert_eq!(Claims::of(&unsigned.headers), Err(SignatureError::Missing));
        for header in [
            "Bearer x",
            "AWS4-HMAC-SHA256",
            "AWS4-HMAC-SHA256 Credential=AKID/20150830/us-east-1/service/aws4_request",
            "AWS4-HMAC-SHA256 Credential=AKID/us-east-1/service/aws4_request, SignedHeaders=host, Signature=00",
            "AWS4-HMAC-SHA256 Credential=AKID/20150830/us-east-1/service/aws3, SignedHeaders=host, Signature=00",
            "AWS4-HMAC-SHA512 Credential=AKID/20150830/us-east-1/service/aws4_request, SignedHeaders=host, Signature=00",
        ] {
            let parts = parts(Request::get("/").header("authorization", header));
            assert!(matches!(Claims::of(&parts.headers), Err(SignatureError::Incomplete(_))), "{header}");
        }
        let undated =
            parts(Request::get("/").header("authorization", authorization("20150830/us-east-1/service/aws4_request", "host", "00")));
        assert!(matches!(verify(&undated, b"", SECRET, "20150830T123600Z"), Err(SignatureError::Incomplete(_))));
    }

    #[test]
    fn the_scope_must_fit() {
        let now = at("20150830T123600Z");
        let parts = published(PUBLISHED);
        let claims = Claims::of(&parts.headers).unwrap();
        assert!(matches!(claims.verify(&parts, b"", SECRET, "lambda", now, SKEW), Err(SignatureError::Scope(_))));
        let unsigned_host = Claims { signed_headers: "x-amz-date", ..Claims::of(&parts.headers).unwrap() };
        assert!(matches!(unsigned_host.verify(&parts, b"", SECRET, "service", now, SKEW), Err(SignatureError::Scope(_))));
        let yesterday = Claims { date: "20150829", ..claims };
        assert!(matches!(yesterday.verify(&parts, b"", SECRET, "service", now, SKEW), Err(SignatureError::Scope(_))));
    }

    #[test]
    fn headers_that_mean_something_must_be_signed() {
        let mut parts = published(PUBLISHED);
        parts.headers.insert("x-amz-target", http::HeaderValue::from_static("Logs_20140328.GetLogEvents"));
        let refused = verify(&parts, b"", SECRET, "20150830T123600Z").unwrap_err();
        assert_eq!(refused.to_string(), "There were headers present in the request which were not signed: x-amz-target");
        let mut parts = published(PUBLISHED);
        parts.headers.insert(SECURITY_TOKEN, http::HeaderValue::from_static("token"));
        assert_eq!(verify(&parts, b"", SECRET, "20150830T123600Z"), Ok(()));
    }

    #[test]
    fn escapes_in_paths_are_encoded_again() {
        assert_eq!(canonical_path("/2025-09-09/microvm-images/arn%3Aaws%3Alambda"), "/2025-09-09/microvm-images/arn%253Aaws%253Alambda");
        assert_eq!(canonical_path("/2025-09-09/microvm-images/arn:aws"), "/2025-09-09/microvm-images/arn%3Aaws");
        assert_eq!(canonical_path("//a/./b/../c/"), "/a/c/");
        assert_eq!(canonical_path("/.."), "/");
    }

    #[test]
    fn queries_are_sorted_and_encoded_once() {
        assert_eq!(canonical_query("b=2&a=%7e%2f&a&b=1"), "a=&a=~%2F&b=1&b=2");
    }

    #[test]
    fn header_values_are_trimmed_and_folded() {
        assert_eq!(collapse("  a   b  "), "a b");
    }
}
