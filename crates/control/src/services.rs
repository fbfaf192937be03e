//! What one guest may ask of the server: credentials of its role, its region, to be suspended, and the API (SPEC 12).
//!
//! Credentials are kept here, never in the guest, so that no snapshot has any. Each life of a MicroVM asks the same [`Services`], and they are
//! renewed when half of their time is over: SDKs ask again some minutes before the end.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use hearth_guest_protocol::{Credentials, MetadataReply, MetadataRequest};
use hearth_machine::{GuestServices, GuestStream};
use tokio::{net::TcpStream, sync::Mutex};

use crate::{
    microvm::Suspender,
    roles::{RoleError, Roles},
};

/// Of one MicroVM, or of one build.
#[derive(Debug)]
pub(crate) struct Services {
    /// Names the sessions of the role.
    id: String,
    region: String,
    role: Option<Role>,
    /// Where the API listens.
    api: Option<SocketAddr>,
    suspender: Option<Suspender>,
}

#[derive(Debug)]
struct Role {
    arn: String,
    roles: Arc<dyn Roles>,
    /// The last ones. Locked while new ones are fetched: whoever asks meanwhile gets the same.
    credentials: Mutex<Option<Credentials>>,
}

impl Services {
    /// Services of a guest that has a role or none.
    pub fn new(id: &str, region: &str, role_arn: Option<&str>, roles: &Arc<dyn Roles>, api: Option<SocketAddr>) -> Self {
        let role = role_arn.map(|arn| Role { arn: arn.to_owned(), roles: Arc::clone(roles), credentials: Mutex::default() });
        Self { id: id.to_owned(), region: region.to_owned(), role, api, suspender: None }
    }

    /// Lets the guest suspend its MicroVM.
    pub fn with_suspender(self, suspender: Option<Suspender>) -> Self {
        Self { suspender, ..self }
    }

    async fn suspend(&self) -> MetadataReply {
        match &self.suspender {
            Some(suspender) => match suspender.suspend().await {
                Ok(()) => MetadataReply::Done,
                Err(reason) => MetadataReply::Failed { reason },
            },
            None => MetadataReply::Absent,
        }
    }
}

impl Role {
    async fn credentials(&self, id: &str) -> MetadataReply {
        let mut last = self.credentials.lock().await;
        let now = now();
        if let Some(credentials) = last.as_ref().filter(|credentials| now < half_life(credentials)) {
            return MetadataReply::Credentials(credentials.clone());
        }
        let error = match self.roles.assume(&self.arn, id).await {
            Ok(credentials) => {
                let Credentials { access_key_id, expires_at, .. } = &credentials;
                tracing::info!(id, role = self.arn, access_key_id, expires_in = expires_at.saturating_sub(now), "assumed a role");
                *last = Some(credentials.clone());
                return MetadataReply::Credentials(credentials);
            }
            Err(error) => error,
        };
        tracing::warn!(id, role = self.arn, %error, "a role could not be assumed; the guest gets no new credentials");
        match (&*last, error) {
            (Some(old), RoleError::Failed(_)) if now < old.expires_at => MetadataReply::Credentials(old.clone()),
            // What exactly is wrong is for the operator.
            (_, RoleError::Refused(_)) => MetadataReply::Refused { reason: format!("The role {} cannot be assumed.", self.arn) },
            (_, RoleError::Failed(_)) => MetadataReply::Failed { reason: "The role could not be assumed now.".to_owned() },
        }
    }
}

/// When new credentials are fetched, in seconds since the Unix epoch.
fn half_life(credentials: &Credentials) -> u64 {
    credentials.issued_at + credentials.expires_at.saturating_sub(credentials.issued_at) / 2
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[async_trait]
impl GuestServices for Services {
    async fn metadata(&self, request: MetadataRequest) -> MetadataReply {
        match request {
            MetadataRequest::Credentials => match &self.role {
                Some(role) => role.credentials(&self.id).await,
                None => MetadataReply::Absent,
            },
            MetadataRequest::Region => MetadataReply::Region(self.region.clone()),
            MetadataRequest::Suspend => self.suspend().await,
        }
    }

    /// Who has no credentials has no business there.
    async fn api(&self) -> io::Result<Box<dyn GuestStream>> {
        let address = self.api.filter(|_| self.role.is_some()).ok_or(io::ErrorKind::ConnectionRefused)?;
        let connection = TcpStream::connect(address).await?;
        connection.set_nodelay(true)?;
        Ok(Box::new(connection))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as StdMutex;

    use super::*;

    /// Gives credentials out until told not to.
    #[derive(Default)]
    struct Vault {
        calls: StdMutex<Vec<String>>,
        error: StdMutex<Option<RoleError>>,
        /// Seconds before now at which credentials were issued, and for which they are good.
        age: u64,
        lifetime: u64,
    }

    #[async_trait]
    impl Roles for Vault {
        async fn assume(&self, role_arn: &str, session_name: &str) -> Result<Credentials, RoleError> {
            if let Some(error) = self.error.lock().unwrap().clone() {
                return Err(error);
            }
            let mut calls = self.calls.lock().unwrap();
            calls.push(format!("{role_arn} {session_name}"));
            let issued_at = now() - self.age;
            Ok(Credentials {
                access_key_id: format!("ASIA{}", calls.len()),
                secret_access_key: "s".to_owned(),
                session_token: "t".to_owned(),
                issued_at,
                expires_at: issued_at + self.lifetime,
            })
        }

        fn allows(&self, _: &str, _: &str, _: &str) -> bool {
            true
        }
    }

    fn services(vault: &Arc<Vault>, role: Option<&str>) -> Services {
        let roles: Arc<dyn Roles> = Arc::clone(vault) as _;
        Services::new("microvm-1", "us-east-1", role, &roles, None)
    }

    async fn key(services: &Services) -> String {
        match services.metadata(MetadataRequest::Credentials).await {
            MetadataReply::Credentials(credentials) => credentials.access_key_id,
            other => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn credentials_are_kept_for_half_of_their_time() {
        let fresh = Arc::new(Vault { age: 40, lifetime: 100, ..Vault::default() });
        let of_fresh = services(&fresh, Some("role"));
        assert_eq!([key(&of_fresh).await, key(&of_fresh).await], ["ASIA1", "ASIA1"]);
        assert_eq!(*fresh.calls.lock().unwrap(), ["role microvm-1"]);

        let aged = Arc::new(Vault { age: 51, lifetime: 100, ..Vault::default() });
        let of_aged = services(&aged, Some("role"));
        assert_eq!([key(&of_aged).await, key(&of_aged).await], ["ASIA1", "ASIA2"]);
    }

    #[tokio::test]
    async fn what_cannot_be_renewed_now_is_used_to_its_end_and_what_is_refused_is_not() {
        let vault = Arc::new(Vault { age: 51, lifetime: 100, ..Vault::default() });
        let services = services(&vault, Some("role"));
        assert_eq!(key(&services).await, "ASIA1");
        *vault.error.lock().unwrap() = Some(RoleError::Failed("no route to 10.1.2.3".to_owned()));
        assert_eq!(key(&services).await, "ASIA1");
        *vault.error.lock().unwrap() = Some(RoleError::Refused("trust policy of 10.1.2.3".to_owned()));
        let refused = key(&services).await;
        assert!(refused.starts_with("Refused") && !refused.contains("10.1.2.3"), "{refused}");
    }

    #[tokio::test]
    async fn without_a_role_there_is_a_region_and_nothing_else() {
        let services = services(&Arc::default(), None);
        assert_eq!(services.metadata(MetadataRequest::Credentials).await, MetadataReply::Absent);
        assert_eq!(services.metadata(MetadataRequest::Suspend).await, MetadataReply::Absent);
        assert_eq!(services.metadata(MetadataRequest::Region).await, MetadataReply::Region("us-east-1".to_owned()));
        assert_eq!(services.api().await.err().map(|error| error.kind()), Some(io::ErrorKind::ConnectionRefused));
    }
}
