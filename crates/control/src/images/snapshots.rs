//! The snapshots of images, opened once and then shared by every launch.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use hearth_machine::{Engine, Snapshot, SnapshotError};
use hearth_store::Store;

use crate::records::version_name;

/// Directory of an image's snapshots.
pub(crate) fn image_dir(data_dir: &Path, image_id: &str) -> PathBuf {
    data_dir.join("images").join(image_id)
}

/// Directory of a version's snapshot.
pub(crate) fn version_dir(data_dir: &Path, image_id: &str, number: i64) -> PathBuf {
    image_dir(data_dir, image_id).join(version_name(number))
}

type Open = HashMap<(String, i64), Arc<Snapshot>>;

/// Open snapshots, by image and version number.
#[derive(Debug)]
pub(crate) struct Snapshots {
    data_dir: PathBuf,
    open: Mutex<Open>,
}

impl Snapshots {
    pub fn new(data_dir: PathBuf) -> Self {
        Self { data_dir, open: Mutex::default() }
    }

    /// The snapshot of a version.
    pub async fn get(&self, image_id: &str, number: i64) -> Result<Arc<Snapshot>, SnapshotError> {
        let key = (image_id.to_owned(), number);
        if let Some(snapshot) = self.lock().get(&key) {
            return Ok(Arc::clone(snapshot));
        }
        let dir = version_dir(&self.data_dir, image_id, number);
        let what = format!("opening {}", dir.display());
        let opened = tokio::task::spawn_blocking(move || Snapshot::open(&dir)).await;
        let snapshot = opened.map_err(|error| SnapshotError::Io { what, source: io::Error::other(error) })??;
        Ok(Arc::clone(self.lock().entry(key).or_insert_with(|| Arc::new(snapshot))))
    }

    /// Adds a snapshot that was made just now.
    pub fn insert(&self, image_id: &str, number: i64, snapshot: Arc<Snapshot>) {
        self.lock().insert((image_id.to_owned(), number), snapshot);
    }

    /// Lets go of a snapshot whose files are about to be deleted, and returns it if it exists.
    pub async fn forget(&self, image_id: &str, number: i64) -> Option<Arc<Snapshot>> {
        let snapshot = self.get(image_id, number).await.ok()?;
        self.lock().remove(&(image_id.to_owned(), number));
        Some(snapshot)
    }

    /// Deletes a version's snapshot if the version is gone and no MicroVM can be resumed from it any more.
    pub async fn release(&self, store: &Store, engine: &dyn Engine, image_id: &str, number: i64) {
        match store.is_version_needed(image_id, number).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(image_id, number, %error, "the snapshot of a version is left until the next start");
                return;
            }
        }
        if let Some(snapshot) = self.forget(image_id, number).await {
            engine.forget(&snapshot).await;
        }
        let dir = version_dir(&self.data_dir, image_id, number);
        match tokio::fs::remove_dir_all(&dir).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(dir = %dir.display(), %error, "files of a deleted version are left until the next start");
            }
            _ => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
