//! The composition of the domain: what it is started with, and how it ends.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::stream::{self, StreamExt};
use hearth_build::ImageBuilder;
use hearth_machine::Engine;
use hearth_objects::Objects;
use hearth_store::{Store, StoreError};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    capacity::Capacity,
    connectors::Policies,
    cursor::Cursors,
    images::{self, Snapshots, Turns},
    logs::LogStore,
    microvm,
    quota::Throttle,
    recovery,
    registry::Registry,
    roles::Roles,
    settings::Settings,
    sweep,
    token::Keyring,
};

/// MicroVMs that a shutdown suspends at once: each writes its memory to the disk.
const SUSPENDS_AT_ONCE: usize = 2;
/// How long tasks that have nothing left to do may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// What [`Control`] works with.
#[derive(Clone)]
pub struct Deps {
    pub store: Store,
    pub engine: Arc<dyn Engine>,
    pub builder: Arc<dyn ImageBuilder>,
    pub objects: Arc<dyn Objects>,
    pub logs: Arc<LogStore>,
    pub keyring: Arc<Keyring>,
    pub roles: Arc<dyn Roles>,
    pub settings: Settings,
}

/// The domain cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// the data directory cannot be used
    #[error("{what}: {source}")]
    Host {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the database cannot be used
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The domain, as the API ([`crate::plane::ControlPlane`]) and the endpoint proxy ([`crate::plane::DataPlane`]) see it.
pub struct Control {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub store: Store,
    pub keyring: Arc<Keyring>,
    pub settings: Settings,
    pub cursors: Cursors,
    pub throttle: Throttle,
    pub images: Arc<images::Shared>,
    pub image_handles: Mutex<HashMap<String, Arc<images::Handle>>>,
    pub microvms: Arc<microvm::Shared>,
    pub registry: Arc<Registry>,
    /// Cancelled when the server stops.
    pub stop: CancellationToken,
    tasks: TaskTracker,
    logs: Arc<LogStore>,
    changes: watch::Sender<u64>,
}

impl Control {
    /// Takes up what an earlier server left in the data directory, and starts. One server at a time; the caller holds the lock.
    pub async fn start(deps: Deps) -> Result<Arc<Self>, StartError> {
        let Deps { store, engine, builder, objects, logs, keyring, roles, settings } = deps;
        let keys = settings.data_dir.join("keys");
        let cursors = Cursors::load_or_create(&keys)
            .map_err(|source| StartError::Host { what: format!("reading or making the cursor key in {}", keys.display()), source })?;
        let (changes, _) = watch::channel(0);
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let snapshots = Arc::new(Snapshots::new(settings.data_dir.clone()));
        let capacity = Capacity::new(settings.capacity);
        let policies = Arc::new(Policies::new(store.clone(), settings.connectors.clone()));
        let images = Arc::new(images::Shared {
            store: store.clone(),
            engine: Arc::clone(&engine),
            builder,
            objects,
            logs: Arc::clone(&logs),
            snapshots: Arc::clone(&snapshots),
            policies: Arc::clone(&policies),
            roles: Arc::clone(&roles),
            capacity: Arc::clone(&capacity),
            sizes: settings.sizes(),
            turns: Turns::new(settings.max_concurrent_builds),
            settings: settings.clone(),
            stop: stop.clone(),
            changes: changes.clone(),
            tasks: tasks.clone(),
        });
        let microvms = Arc::new(microvm::Shared {
            store: store.clone(),
            engine,
            snapshots,
            policies,
            logs: Arc::clone(&logs),
            roles,
            guests: settings.guests,
            capacity,
            activity: settings.activity,
            dir: settings.data_dir.join("microvms"),
            stop_grace: settings.stop_grace,
            terminated: Notify::new(),
            changes: changes.clone(),
            tasks: tasks.clone(),
        });
        let registry = Arc::new(Registry::default());
        let image_handles = recovery::recover(&images, &microvms, &registry).await?;
        let sweeper = sweep::run(Arc::clone(&microvms), Arc::clone(&registry), settings.terminated_retention);
        tasks.spawn(stop.clone().run_until_cancelled_owned(sweeper));
        tasks.spawn(stop.clone().run_until_cancelled_owned(Arc::clone(&logs).keep()));
        tasks.spawn(stop.clone().run_until_cancelled_owned(Arc::clone(&keyring).keep_rotating()));
        let inner = Inner {
            store,
            keyring,
            throttle: Throttle::new(settings.quotas),
            settings,
            cursors,
            images,
            image_handles: Mutex::new(image_handles),
            microvms,
            registry,
            stop,
            tasks,
            logs,
            changes,
        };
        Ok(Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// Counts up whenever the state of an image or a MicroVM may look different. Wait for it, then look again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Suspends running MicroVMs, so that they wake after a restart, gives up builds, and closes logs and store. What does not make it in
    /// [`Settings::shutdown_timeout`] is killed. No call may come after it; the engine is the caller's to end, then.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        inner.stop.cancel();
        let handles = inner.registry.all();
        let suspending = stream::iter(&handles).for_each_concurrent(SUSPENDS_AT_ONCE, |handle| handle.shut_down());
        if timeout(inner.settings.shutdown_timeout, suspending).await.is_err() {
            tracing::error!(limit = ?inner.settings.shutdown_timeout, "not all MicroVMs could be suspended in time; the others are killed");
        }
        inner.tasks.close();
        if timeout(GRACE, inner.tasks.wait()).await.is_err() {
            handles.iter().for_each(|handle| handle.abort());
        }
        if timeout(GRACE, inner.tasks.wait()).await.is_err() {
            tracing::error!("a build did not end when the server stopped");
        }
        if timeout(GRACE, inner.logs.close()).await.is_err() {
            tracing::error!("the last lines of a log could not be written in time");
        }
        inner.store.close().await;
    }
}

impl Inner {
    pub fn image_handles(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<images::Handle>>> {
        self.image_handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
