//! [`DataPlane`] for the endpoint proxy.

use std::{sync::Arc, time::SystemTime};

use async_trait::async_trait;
use hearth_machine::{GuestStream, Target};

use crate::{
    control::Control,
    plane::{Admission, ConnectError, DataPlane, Refusal},
};

#[async_trait]
impl DataPlane for Control {
    fn admit(&self, host: &str, token: &str, port: u16) -> Result<Admission, Refusal> {
        let handle = self.inner.registry.by_host(host);
        let id = handle.as_ref().map(|handle| handle.id.as_str());
        let kind = self.inner.keyring.admit(token, id, port, SystemTime::now())?;
        // The keyring admits nobody to a host that is not there.
        let handle = handle.ok_or(Refusal::AuthenticationFailed)?;
        Ok(Admission { microvm_id: handle.id.clone(), kind, port, activity: Arc::clone(&handle.activity) })
    }

    async fn open(&self, admission: &Admission, target: &Target) -> Result<Box<dyn GuestStream>, ConnectError> {
        match self.inner.registry.by_id(&admission.microvm_id) {
            Some(handle) => handle.connect(target, self.inner.settings.wake_timeout).await,
            None => Err(ConnectError::Unreachable("the MicroVM is terminated".to_owned())),
        }
    }
}
