//! Who calls: signatures of version 4 checked against the keys of the [`Directory`], or a caller that the listener itself vouches for.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, request::Parts};

use hearth_control::types::Caller;
use hearth_identity::{CredentialError, Directory, Principal};

use crate::{
    error::ApiError,
    sigv4::{Claims, SignatureError},
};

/// How far the clocks of caller and server may be apart.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

pub(crate) const SECURITY_TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");

/// How callers are told apart.
#[derive(Clone)]
pub enum Auth {
    /// Every request carries an AWS Signature Version 4 made with a key of the directory.
    SigV4(Arc<Directory>),
    /// Every request is this caller's, who is its account's administrator: for a listener that only the operator can reach.
    Trusted(Caller, Arc<Directory>),
}

/// Somebody whose signature was checked.
#[derive(Debug, Clone)]
pub(crate) struct Identified {
    pub caller: Caller,
    pub principal: Arc<Principal>,
}

/// Why nobody is identified. The texts are the ones callers of AWS see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    /// the signature is not good
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// the key or the session is not
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

impl Auth {
    /// Where principals and roles are.
    pub(crate) fn directory(&self) -> &Directory {
        match self {
            Self::SigV4(directory) | Self::Trusted(_, directory) => directory,
        }
    }

    /// Finds out who made a request to a service, which is named as signatures name it.
    pub(crate) fn identify(&self, parts: &Parts, body: &[u8], service: &str) -> Result<Identified, AuthError> {
        let directory = match self {
            Self::SigV4(directory) => directory,
            Self::Trusted(caller, _) => {
                let principal = Arc::new(Principal::root(&caller.account));
                return Ok(Identified { caller: caller.clone(), principal });
            }
        };
        let claims = Claims::of(&parts.headers)?;
        let token = match parts.headers.get(SECURITY_TOKEN) {
            Some(token) => Some(token.to_str().map_err(|_| CredentialError::Unknown)?),
            None => None,
        };
        let now = SystemTime::now();
        let known = directory.identify(claims.access_key_id, token, now);
        if known == Err(CredentialError::Unknown) {
            return Err(CredentialError::Unknown.into());
        }
        // That a session is over is only told to whom it was.
        let secret = directory.secret(claims.access_key_id).ok_or(CredentialError::Unknown)?;
        claims.verify(parts, body, &secret, service, now, CLOCK_SKEW)?;
        let principal = known?;
        let caller = Caller { account: principal.account.clone(), region: claims.region.to_owned(), principal: principal.arn.clone() };
        Ok(Identified { caller, principal })
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let exception = match &error {
            AuthError::Signature(SignatureError::Missing) => "MissingAuthenticationTokenException",
            AuthError::Signature(SignatureError::Incomplete(_)) => "IncompleteSignatureException",
            AuthError::Signature(SignatureError::Scope(_) | SignatureError::Mismatch) => "InvalidSignatureException",
            AuthError::Credential(CredentialError::Unknown) => "UnrecognizedClientException",
            AuthError::Credential(CredentialError::Expired) => "ExpiredTokenException",
        };
        Self::unauthenticated(exception, error.to_string())
    }
}
