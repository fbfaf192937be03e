//! The cache directory as a place that several builds, and several servers, may use.
//!
//! Three files are locked in it, each for one question:
//!
//! ```text
//! prepare.lock   exclusive while a server prepares                   one at a time
//! servers.lock   shared as long as a server lives                    is there another server?
//! builds.lock    shared by each build and all processes it started   does anything run here?
//! ```
//!
//! The kernel gives locks up when their holders die, so after `kill -9` the next server sees that its predecessor is gone, kills what still
//! runs, and by locking `builds.lock` waits for the moment the last of it is gone.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::{task::spawn_blocking, time::timeout};

use crate::storage::{Storage, StorageError};

/// Longest wait for a lock. The slowest holder is a server that imports the base image.
const LOCK_WAIT: Duration = Duration::from_secs(120);

const PREPARE: &str = "prepare.lock";
const SERVERS: &str = "servers.lock";
const BUILDS: &str = "builds.lock";

/// The cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkshopError {
    #[error("locking {path}: {source}")]
    Lock { path: String, source: io::Error },
    #[error("looking for processes of an earlier server: {0}")]
    Orphans(#[source] io::Error),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// An open cache directory.
#[derive(Debug)]
pub(crate) struct Workshop {
    dir: PathBuf,
    pub(crate) storage: Storage,
    /// A killed build may have left a working container.
    untidy: AtomicBool,
    /// Says that this server lives.
    _server: File,
}

impl Workshop {
    /// Waits for the turn to prepare `dir`. The turn lasts as long as the file is open.
    pub(crate) async fn turn(dir: &Path) -> Result<File, WorkshopError> {
        lock(dir.join(PREPARE), File::lock).await
    }

    /// Opens `dir`, which must exist, and removes what a killed server left. Only in turn.
    pub(crate) async fn open(dir: &Path) -> Result<Self, WorkshopError> {
        let storage = {
            let _building = lock(dir.join(BUILDS), File::lock_shared).await?;
            Storage::open(dir).await?
        };
        let servers = dir.join(SERVERS);
        let alone = open_lock(&servers).and_then(|file| held(file.try_lock()).map(|free| free.then_some(file)));
        let alone = alone.map_err(|source| WorkshopError::Lock { path: servers.display().to_string(), source })?;
        if alone.is_some() {
            let orphans = storage.clone();
            let killed = spawn_blocking(move || orphans.kill_orphans()).await.expect("reading /proc does not panic");
            killed.map_err(WorkshopError::Orphans)?;
            let _nobody = lock(dir.join(BUILDS), File::lock).await?;
            storage.tidy().await?;
        }
        drop(alone);
        let server = lock(servers, File::lock_shared).await?;
        Ok(Self { dir: dir.to_owned(), storage, untidy: AtomicBool::new(false), _server: server })
    }

    /// Announces a build, which lasts as long as the file is open.
    pub(crate) async fn begin(&self) -> Result<File, WorkshopError> {
        lock(self.dir.join(BUILDS), File::lock_shared).await
    }

    /// Remembers that a build did not end by itself.
    pub(crate) fn mark_untidy(&self) {
        self.untidy.store(true, Ordering::Relaxed);
    }

    /// Removes what killed builds left, unless a build is running: then the last one to end does it.
    pub(crate) async fn tidy(&self) -> Result<(), WorkshopError> {
        if !self.untidy.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let path = self.dir.join(BUILDS);
        let locked = open_lock(&path).and_then(|file| held(file.try_lock()).map(|free| free.then_some(file)));
        match locked.map_err(|source| WorkshopError::Lock { path: path.display().to_string(), source })? {
            Some(_nobody) => Ok(self.storage.tidy().await?),
            None => {
                self.mark_untidy();
                Ok(())
            }
        }
    }
}

/// Whether an attempt got the lock.
fn held(attempt: Result<(), TryLockError>) -> io::Result<bool> {
    match attempt {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

async fn lock(path: PathBuf, how: fn(&File) -> io::Result<()>) -> Result<File, WorkshopError> {
    let name = path.display().to_string();
    let locking = spawn_blocking(move || {
        let file = open_lock(&path)?;
        how(&file)?;
        Ok(file)
    });
    let result = match timeout(LOCK_WAIT, locking).await {
        Ok(result) => result.expect("locking does not panic"),
        Err(_) => Err(io::Error::other(format!("another process held it for {} seconds", LOCK_WAIT.as_secs()))),
    };
    result.map_err(|source| WorkshopError::Lock { path: name, source })
}
