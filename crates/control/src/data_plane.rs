//! [`DataPlane`] for the endpoint proxy.

use std::{sync::Arc, time::SystemTime};

use async_trait::async_trait;
use hearth_machine::{GuestStream, Target};
use subtle::ConstantTimeEq;

use crate::{
    control::Control,
    microvm::Handle,
    plane::{Admission, ConnectError, DataPlane, Refusal},
    token::{Claims, TokenKind},
};

#[async_trait]
impl DataPlane for Control {
    fn admit(&self, host: &str, token: &str, port: u16) -> Result<Admission, Refusal> {
        let (claims, handle) = self.authenticate(host, token)?;
        // A shell's token opens a shell whatever the port.
        if claims.kind == TokenKind::Http && !claims.allows(port) {
            return Err(Refusal::PortDenied);
        }
        Ok(Admission {
            microvm_id: handle.id.clone(),
            kind: claims.kind,
            port,
            memory_mib: handle.memory_mib,
            activity: Arc::clone(&handle.activity),
        })
    }

    async fn open(&self, admission: &Admission, target: &Target) -> Result<Box<dyn GuestStream>, ConnectError> {
        match self.inner.registry.by_id(&admission.microvm_id) {
            Some(handle) => handle.connect(target, self.inner.settings.wake_timeout).await,
            None => Err(ConnectError::Unreachable("the MicroVM is terminated".to_owned())),
        }
    }
}

impl Control {
    /// The MicroVM that a token is for, if the request names that very one. The token leads to it; the request's name is compared and never
    /// looked up, so that whoever has a token for one MicroVM cannot find out which others there are.
    fn authenticate(&self, host: &str, token: &str) -> Result<(Claims, Arc<Handle>), Refusal> {
        let claims = self.inner.keyring.verify(token, SystemTime::now())?;
        let handle = self.inner.registry.by_id(&claims.microvm_id).ok_or(Refusal::AuthenticationFailed)?;
        // As a client writes it: any case, with or without a port.
        let name = host.split_once(':').map_or(host, |(name, _port)| name).to_ascii_lowercase();
        if !bool::from(name.as_bytes().ct_eq(handle.host.as_bytes())) {
            return Err(Refusal::AuthenticationFailed);
        }
        Ok((claims, handle))
    }
}
