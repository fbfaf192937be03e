//! What the domain must know of roles: who else can be asked for their credentials, and what they may do.

use std::fmt;

use async_trait::async_trait;

pub use hearth_guest_protocol::Credentials;

/// Assumes roles for MicroVMs and builds.
#[async_trait]
pub trait Roles: Send + Sync {
    /// Fresh temporary credentials of a role. The session is named after who they are for.
    async fn assume(&self, role_arn: &str, session_name: &str) -> Result<Credentials, RoleError>;

    /// Whether a role's policy allows an action.
    fn allows(&self, role_arn: &str, action: &str, resource: &str) -> bool;

    /// A login that a role has for a container registry (`host` or `host:port`); `None` if registries of that name take no roles.
    async fn registry_login(&self, role_arn: &str, session_name: &str, registry: &str) -> Result<Option<RegistryLogin>, RoleError> {
        let _ = (role_arn, session_name, registry);
        Ok(None)
    }
}

/// User and password for a container registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryLogin {
    /// User name.
    pub user: String,
    /// Password or token.
    pub password: String,
}

impl fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryLogin").field("user", &self.user).finish_non_exhaustive()
    }
}

/// There are no credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// the role does not exist, or does not let itself be assumed
    #[error("{0}")]
    Refused(String),
    /// who should know could not be asked
    #[error("{0}")]
    Failed(String),
}

impl fmt::Debug for dyn Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Roles")
    }
}
