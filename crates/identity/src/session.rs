//! Temporary credentials of a role, and what their token says.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{policy::Policy, principal::Principal};

/// Temporary credentials.
#[derive(Clone)]
pub struct Session {
    /// `ASIA…`.
    pub access_key_id: String,
    pub secret_access_key: String,
    /// Goes with every request, as `X-Amz-Security-Token`.
    pub session_token: String,
    /// From this moment on they are void.
    pub expires_at: SystemTime,
    /// Whom they stand for.
    pub principal: Principal,
}

/// Neither the secret nor the token gets into logs.
impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("access_key_id", &self.access_key_id)
            .field("principal", &self.principal.arn)
            .finish_non_exhaustive()
    }
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Claims {
    #[serde(rename = "key")]
    pub access_key_id: String,
    /// ARN of the role.
    pub role: String,
    /// Id of the role, which tells it from an earlier one of the same name.
    pub role_id: String,
    pub session: String,
    /// Seconds since 1970.
    pub expires: u64,
    /// What narrows the role's policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
}

impl Claims {
    pub fn expires_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.expires)
    }
}
