//! The MicroVMs by id, in memory: what every request on an endpoint and most calls of the API look up.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::microvm::Handle;

/// All MicroVMs that are not swept yet.
#[derive(Default)]
pub(crate) struct Registry {
    by_id: RwLock<HashMap<String, Arc<Handle>>>,
}

impl Registry {
    pub fn insert(&self, handle: Arc<Handle>) {
        self.by_id.write().unwrap_or_else(PoisonError::into_inner).insert(handle.id.clone(), handle);
    }

    pub fn remove(&self, id: &str) {
        self.by_id.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    pub fn by_id(&self, id: &str) -> Option<Arc<Handle>> {
        self.by_id.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Handle>> {
        self.by_id.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
