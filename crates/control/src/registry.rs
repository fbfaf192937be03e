//! The MicroVMs by id and by host name, in memory: what every request on an endpoint and most calls of the API look up.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::microvm::Handle;

/// All MicroVMs that are not swept yet.
#[derive(Default)]
pub(crate) struct Registry {
    index: RwLock<Index>,
}

#[derive(Default)]
struct Index {
    by_id: HashMap<String, Arc<Handle>>,
    by_host: HashMap<String, Arc<Handle>>,
}

impl Registry {
    pub fn insert(&self, handle: Arc<Handle>) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.by_host.insert(handle.host.clone(), Arc::clone(&handle));
        index.by_id.insert(handle.id.clone(), handle);
    }

    pub fn remove(&self, id: &str) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = index.by_id.remove(id) {
            index.by_host.remove(&handle.host);
        }
    }

    pub fn by_id(&self, id: &str) -> Option<Arc<Handle>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).by_id.get(id).cloned()
    }

    /// `host` as a client wrote it: any case, with or without a port.
    pub fn by_host(&self, host: &str) -> Option<Arc<Handle>> {
        let name = host.split_once(':').map_or(host, |(name, _port)| name).to_ascii_lowercase();
        self.index.read().unwrap_or_else(PoisonError::into_inner).by_host.get(&name).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Handle>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }
}
