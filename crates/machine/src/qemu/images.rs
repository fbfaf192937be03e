//! Guest memory of the images in use, as sealed anonymous files that clones map.

use std::{
    collections::HashSet,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::{Mutex, OnceCell};

use crate::{
    memory,
    snapshot::{MEMORY, Snapshot},
    working_set::WorkingSet,
};

/// How many images keep their memory when no machine uses them. A sealed copy cannot be reclaimed, so the number is small.
const KEPT: usize = 2;

type Entry = Arc<OnceCell<Arc<File>>>;

/// Sealed copies by the directory of their snapshot.
#[derive(Debug, Default)]
pub struct Images {
    /// Most recently used last.
    entries: Mutex<Vec<(PathBuf, Entry)>>,
}

impl Images {
    /// The sealed copy of a snapshot's memory, made if it is not there.
    pub async fn get(&self, snapshot: &Snapshot) -> io::Result<Arc<File>> {
        let entry = self.entry(&snapshot.dir).await;
        let (dir, path) = (snapshot.dir.clone(), snapshot.file(MEMORY));
        let size = u64::from(snapshot.manifest.memory_mib) << 20;
        let fill = || async move {
            let copy = move || memory::sealed_copy(&path, size, WorkingSet::open(&dir).as_ref());
            Ok(Arc::new(tokio::task::spawn_blocking(copy).await.map_err(io::Error::other)??))
        };
        entry.get_or_try_init(fill).await.cloned()
    }

    /// Takes over memory that is already sealed: a capture has just made it.
    pub async fn insert(&self, snapshot: &Snapshot, memory: File) {
        // Somebody who asked for it in the meantime has filled the entry with the same bytes.
        let _ = self.entry(&snapshot.dir).await.set(Arc::new(memory));
    }

    /// Whether the sealed copy of a snapshot's memory is there.
    pub async fn holds(&self, snapshot_dir: &Path) -> bool {
        self.entries.lock().await.iter().any(|(dir, entry)| dir == snapshot_dir && entry.initialized())
    }

    /// Drops the copy of a snapshot; machines that use it keep it until they end.
    pub async fn forget(&self, snapshot_dir: &Path) {
        self.entries.lock().await.retain(|(dir, _)| dir != snapshot_dir);
    }

    /// Drops all copies.
    pub async fn clear(&self) {
        self.entries.lock().await.clear();
    }

    async fn entry(&self, dir: &Path) -> Entry {
        let mut entries = self.entries.lock().await;
        let entry = entries.iter().position(|(known, _)| known == dir).map_or_else(Entry::default, |index| entries.remove(index).1);
        entries.push((dir.to_owned(), entry.clone()));
        let unused: HashSet<PathBuf> = entries
            .iter()
            .rev()
            .filter(|(_, entry)| entry.get().is_some_and(|copy| Arc::strong_count(copy) == 1))
            .skip(KEPT)
            .map(|(dir, _)| dir.clone())
            .collect();
        entries.retain(|(dir, _)| !unused.contains(dir));
        entry
    }
}
