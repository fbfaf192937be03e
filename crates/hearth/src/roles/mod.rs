//! Where the credentials of MicroVMs' execution roles and of build roles come from: this server's own roles, or an AWS account.

mod aws;
mod ecr;
mod keys;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use hearth_control::roles::{Credentials, RoleError, Roles};
use hearth_identity::{Directory, SessionError};

pub use aws::AwsRoles;

/// Roles that this server keeps.
pub struct OwnRoles {
    /// All principals.
    pub directory: Arc<Directory>,
    /// How long credentials are good for.
    pub lifetime: Duration,
}

#[async_trait]
impl Roles for OwnRoles {
    async fn assume(&self, role_arn: &str, session_name: &str) -> Result<Credentials, RoleError> {
        let now = SystemTime::now();
        let session = self.directory.session_for_role(role_arn, session_name, self.lifetime, now).map_err(|error| match error {
            SessionError::NoSuchRole(_) | SessionError::NotTrusted(_) => RoleError::Refused(error.to_string()),
            SessionError::Random => RoleError::Failed(error.to_string()),
        })?;
        Ok(Credentials {
            access_key_id: session.access_key_id,
            secret_access_key: session.secret_access_key,
            session_token: session.session_token,
            issued_at: seconds(now),
            expires_at: seconds(session.expires_at),
        })
    }

    fn allows(&self, role_arn: &str, action: &str, resource: &str) -> bool {
        self.directory.role_allows(role_arn, action, resource)
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
