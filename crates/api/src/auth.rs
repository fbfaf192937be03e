//! Who calls: signatures of version 4 checked against the configured credentials, or a caller that the listener itself vouches for.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, request::Parts};

use hearth_control::types::Caller;

use crate::{
    error::ApiError,
    sigv4::{Claims, SignatureError},
};

/// How far the clocks of caller and server may be apart.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

const SECURITY_TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");

/// A key pair and whom it stands for.
#[derive(Clone)]
pub struct Credential {
    /// Access key id.
    pub access_key_id: String,
    /// Secret access key.
    pub secret_access_key: String,
    /// Twelve digits.
    pub account: String,
    /// ARN of the principal, for example `arn:aws:iam::000000000000:root`.
    pub principal: String,
}

/// How callers are told apart.
#[derive(Clone)]
pub enum Auth {
    /// Every request carries an AWS Signature Version 4 made with one of these credentials.
    SigV4(Arc<[Credential]>),
    /// Every request is this caller's: for a listener that only the operator can reach.
    Trusted(Caller),
}

impl Auth {
    /// Finds out who made a request to the service `lambda`.
    pub(crate) fn authenticate(&self, parts: &Parts, body: &[u8]) -> Result<Caller, ApiError> {
        let credentials = match self {
            Self::Trusted(caller) => return Ok(caller.clone()),
            Self::SigV4(credentials) => credentials,
        };
        let claims = Claims::of(&parts.headers)?;
        // Session tokens come with temporary credentials, of which there are none.
        let credential = credentials
            .iter()
            .find(|credential| credential.access_key_id == claims.access_key_id)
            .filter(|_| !parts.headers.contains_key(SECURITY_TOKEN))
            .ok_or_else(|| {
                ApiError::unauthenticated("UnrecognizedClientException", "The security token included in the request is invalid.")
            })?;
        claims.verify(parts, body, &credential.secret_access_key, "lambda", SystemTime::now(), CLOCK_SKEW)?;
        Ok(Caller { account: credential.account.clone(), region: claims.region.to_owned(), principal: credential.principal.clone() })
    }
}

impl From<SignatureError> for ApiError {
    fn from(error: SignatureError) -> Self {
        let exception = match error {
            SignatureError::Missing => "MissingAuthenticationTokenException",
            SignatureError::Incomplete(_) => "IncompleteSignatureException",
            SignatureError::Scope(_) | SignatureError::Mismatch => "InvalidSignatureException",
        };
        Self::unauthenticated(exception, error.to_string())
    }
}
