//! Who calls: signatures of version 4 checked against the configured credentials, or a caller that the listener itself vouches for.

use std::sync::Arc;

use hearth_control::types::Caller;

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
