//! What a build needs of the world: a network slot with the policy of the image, and the logins of its role.

use std::{net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use hearth_build::{Connection, Login, LoginError, Logins, Uplink, UplinkError};
use hearth_machine::{Egress, Outlet};

use crate::roles::Roles;

/// Connects one build. Until the build restricts it, it lets out what the host routes: the managed base image is the server's matter.
#[derive(Debug)]
pub struct BuildUplink {
    outlet: Box<dyn Outlet>,
    egress: Egress,
}

impl BuildUplink {
    /// `egress` is what the image may reach.
    pub fn new(outlet: Box<dyn Outlet>, egress: Egress) -> Self {
        Self { outlet, egress }
    }
}

#[async_trait]
impl Uplink for BuildUplink {
    fn connection(&self) -> Connection {
        let network = self.outlet.network();
        Connection { nameservers: network.nameservers, mtu: network.mtu }
    }

    async fn connect(&mut self, pid: u32) -> Result<(), UplinkError> {
        self.outlet.plug(pid).await.map_err(|error| UplinkError(Box::new(error)))
    }

    async fn share(&mut self, address: SocketAddr) -> Result<(), UplinkError> {
        self.outlet.share(address).await.map_err(|error| UplinkError(Box::new(error)))
    }

    async fn restrict(&mut self) -> Result<(), UplinkError> {
        self.outlet.restrict(&self.egress).await.map_err(|error| UplinkError(Box::new(error)))
    }
}

/// The registry logins of a build role.
#[derive(Debug)]
pub struct RoleLogins {
    pub roles: Arc<dyn Roles>,
    pub role_arn: String,
    /// Name of the role's sessions.
    pub session: String,
}

#[async_trait]
impl Logins for RoleLogins {
    async fn login(&self, registry: &str) -> Result<Option<Login>, LoginError> {
        let login =
            self.roles.registry_login(&self.role_arn, &self.session, registry).await.map_err(|error| LoginError(Box::new(error)))?;
        Ok(login.map(|login| Login { registry: registry.to_owned(), user: login.user, password: login.password }))
    }
}
