//! Layer stores: where the image builder keeps images and layers, each account apart.
//!
//! ```text
//! accounts/<account>/<n>/data     what the builder's daemon keeps in namespaces
//! accounts/<account>/<n>/disk     the same in virtual machines: a file system in a file
//! accounts/<account>/<n>/clean    the last machine has left it in order
//! accounts/<account>/<n>/born     when it was made: a store that is too old is made afresh, so that no layer is kept for ever
//! accounts/<account>/<n>/lock     held by the build that uses it, and by the processes of its sandbox
//! ```
//!
//! A daemon wants a store for itself. Builds of one account that run at once therefore have one each; a build takes the first that is free,
//! so that builds one after the other share their layers. The kernel gives a lock up when its last holder dies: a store whose server was
//! killed is free when its sandbox has noticed.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::task::spawn_blocking;

use crate::{
    BuildError,
    sandbox::FIRST_ID,
    trees::{self, disk_usage},
};

/// Most stores of one account, and so most builds of it at once.
const MOST_STORES: u32 = 64;

/// Largest disk of a store, in bytes: what ext4 holds with room to spare.
const MOST_DISK: u64 = 8 << 40;

/// What a disk has beyond the limit of all stores, at least.
const LEAST_ROOM: u64 = 16 << 30;

/// Limits of all stores together.
#[derive(Debug, Clone, Copy)]
pub struct CacheLimits {
    /// Bytes on the disk. Exceeded while builds run; afterwards stores go until it holds.
    pub bytes: u64,
    /// Longest time that a layer is used again.
    pub age: Duration,
}

impl Default for CacheLimits {
    fn default() -> Self {
        Self { bytes: 20 << 30, age: Duration::from_secs(7 * 24 * 60 * 60) }
    }
}

/// A store cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: String, source: io::Error },
    #[error("{MOST_STORES} builds of the account are running")]
    Busy,
}

impl From<StoreError> for BuildError {
    fn from(error: StoreError) -> Self {
        Self::Platform(Box::new(error))
    }
}

/// The directory of all stores.
#[derive(Debug, Clone)]
pub(crate) struct Stores {
    dir: PathBuf,
    limits: CacheLimits,
}

/// A store that one build has for itself.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    /// Size of its disk, if one is made.
    disk_bytes: u64,
    pub(crate) lock: File,
    /// It had become too old, and is empty now.
    pub(crate) renewed: bool,
}

/// What is kept, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheUsage {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Number of stores.
    pub stores: usize,
}

impl Stores {
    pub(crate) fn new(cache_dir: &Path, limits: CacheLimits) -> Self {
        Self { dir: cache_dir.join("accounts"), limits }
    }

    /// Waits for a store of an account.
    pub(crate) async fn take(&self, account: &str) -> Result<Store, StoreError> {
        let (dir, limits) = (self.dir.join(account), self.limits);
        spawn_blocking(move || take(&dir, limits)).await.expect("taking a store does not panic")
    }

    /// Deletes stores until `enough` says so or none is left but those in use. What they hold can be built again.
    pub(crate) async fn make_room(&self, enough: impl Fn() -> bool + Send + 'static) -> Result<(), StoreError> {
        let dir = self.dir.clone();
        spawn_blocking(move || make_room(&dir, enough)).await.expect("deleting stores does not panic")
    }

    /// Deletes stores until all together are within the limit: of accounts with more than an equal part of it, those that were used least
    /// recently. Those in use stay.
    pub(crate) async fn trim(&self) -> Result<(), StoreError> {
        let (dir, limit) = (self.dir.clone(), self.limits.bytes);
        spawn_blocking(move || trim(&dir, limit)).await.expect("deleting stores does not panic")
    }
}

/// How much the stores below a cache directory hold. Blocks.
pub fn cache_usage(cache_dir: &Path) -> io::Result<CacheUsage> {
    let stores = list(&cache_dir.join("accounts"))?;
    let mut bytes = 0;
    for store in &stores {
        bytes += disk_usage(store)?;
    }
    Ok(CacheUsage { bytes, stores: stores.len() })
}

impl Store {
    /// What the daemon keeps.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The disk that a virtual machine keeps it on. All of it is a hole until it is written. A disk that was not left in order begins anew: what a
    /// machine that was killed had not written yet is missing, maybe in the middle of layers.
    pub(crate) async fn disk(&self) -> Result<PathBuf, StoreError> {
        let (path, mark) = (self.dir.join("disk"), self.clean_mark());
        let kept = tokio::fs::metadata(&path).await.is_ok_and(|found| found.len() == self.disk_bytes);
        let clean = tokio::fs::remove_file(&mark).await.is_ok();
        if !(kept && clean) {
            let file = tokio::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).await;
            let file = file.map_err(failed("making the layer store's disk", &path))?;
            file.set_len(self.disk_bytes).await.map_err(failed("sizing the layer store's disk", &path))?;
        }
        Ok(path)
    }

    /// The file that is there when the disk was left in order.
    pub(crate) fn clean_mark(&self) -> PathBuf {
        self.dir.join("clean")
    }

    /// Empties the store.
    pub(crate) async fn renew(&self) -> Result<(), StoreError> {
        let dir = self.dir.clone();
        spawn_blocking(move || renew(&dir)).await.expect("deleting a store does not panic")
    }
}

/// Twice what all stores may hold, and room for a large image at least: limits are seen to after the build.
fn disk_bytes(limits: CacheLimits) -> u64 {
    limits.bytes.saturating_mul(2).max(limits.bytes.saturating_add(LEAST_ROOM)).min(MOST_DISK)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.display().to_string();
    move |source| StoreError::Io { what, path, source }
}

fn take(account: &Path, limits: CacheLimits) -> Result<Store, StoreError> {
    for number in 0..MOST_STORES {
        let dir = account.join(number.to_string());
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed("making the layer store", &dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path);
        let lock = lock.map_err(failed("opening the lock", &path))?;
        match lock.try_lock() {
            Ok(()) => return open(dir, lock, limits),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(failed("locking", &path)(error)),
        }
    }
    Err(StoreError::Busy)
}

fn open(dir: PathBuf, lock: File, limits: CacheLimits) -> Result<Store, StoreError> {
    let born = fs::read_to_string(dir.join("born")).ok().and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let is_current = born.is_some_and(|born| born <= now && now - born < limits.age) && dir.join("data").exists();
    if !is_current {
        renew(&dir)?;
    }
    // Its time says when the store was last used.
    lock.set_modified(SystemTime::now()).map_err(failed("marking the layer store as used", &dir))?;
    Ok(Store { dir, disk_bytes: disk_bytes(limits), lock, renewed: !is_current && born.is_some() })
}

fn renew(dir: &Path) -> Result<(), StoreError> {
    empty(dir)?;
    let data = dir.join("data");
    DirBuilder::new().mode(0o700).create(&data).map_err(failed("making the layer store", &data))?;
    chown(&data, Some(FIRST_ID), Some(FIRST_ID)).map_err(failed("giving away the layer store", &data))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let born = dir.join("born");
    fs::write(&born, now.as_secs().to_string()).map_err(failed("writing", &born))
}

fn empty(dir: &Path) -> Result<(), StoreError> {
    let (data, disk) = (dir.join("data"), dir.join("disk"));
    trees::remove(&data).map_err(failed("deleting the layer store", &data))?;
    match fs::remove_file(&disk) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("deleting the layer store's disk", &disk)(error)),
        _ => Ok(()),
    }
}

/// The directories of all stores.
fn list(accounts: &Path) -> io::Result<Vec<PathBuf>> {
    let directories = |dir: &Path| -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(dir) {
            Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    };
    let mut stores = Vec::new();
    for account in directories(accounts)? {
        stores.extend(directories(&account)?);
    }
    Ok(stores)
}

/// What a store takes.
struct Held {
    used: SystemTime,
    bytes: u64,
    dir: PathBuf,
}

impl Held {
    fn account(&self) -> PathBuf {
        self.dir.parent().unwrap_or(&self.dir).to_owned()
    }
}

/// All stores, those first that were used least recently.
fn measure(accounts: &Path) -> Result<Vec<Held>, StoreError> {
    let mut stores = Vec::new();
    for dir in list(accounts).map_err(failed("listing the layer stores", accounts))? {
        let bytes = disk_usage(&dir).map_err(failed("measuring the layer store", &dir))?;
        let used = fs::metadata(dir.join("lock")).and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
        stores.push(Held { used, bytes, dir });
    }
    stores.sort_by_key(|store| store.used);
    Ok(stores)
}

fn trim(accounts: &Path, limit: u64) -> Result<(), StoreError> {
    let mut stores = measure(accounts)?;
    let mut total = 0;
    let mut of_accounts: HashMap<PathBuf, u64> = HashMap::new();
    for store in &stores {
        total += store.bytes;
        *of_accounts.entry(store.account()).or_default() += store.bytes;
    }
    let share = limit / of_accounts.len().max(1) as u64;
    while total > limit && !stores.is_empty() {
        // Somebody has more than an equal part, and nobody else pays for that as long as there is something of theirs to delete.
        let Some(over) = stores.iter().position(|store| of_accounts[&store.account()] > share) else {
            // It is in stores that builds use.
            break;
        };
        let store = stores.remove(over);
        let Held { bytes, ref dir, .. } = store;
        if delete_unused(dir)? {
            tracing::info!(store = %dir.display(), bytes, "the layer cache is over its limit: deleted a store");
            total -= bytes;
            *of_accounts.entry(store.account()).or_default() -= bytes;
        }
    }
    Ok(())
}

/// Deletes stores until `enough` says so or none is left.
fn make_room(accounts: &Path, enough: impl Fn() -> bool) -> Result<(), StoreError> {
    if enough() {
        return Ok(());
    }
    // The largest first: whoever has filled the disk is likely to have that.
    let mut stores = measure(accounts)?;
    stores.sort_by_key(|store| std::cmp::Reverse(store.bytes));
    for Held { bytes, dir, .. } in stores {
        if delete_unused(&dir)? {
            tracing::info!(store = %dir.display(), bytes, "the host's disk is nearly full: deleted a store of layers");
            if enough() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Empties a store unless a build uses it, and says whether it did.
fn delete_unused(dir: &Path) -> Result<bool, StoreError> {
    let Ok(lock) = File::open(dir.join("lock")) else { return Ok(false) };
    if lock.try_lock().is_err() {
        return Ok(false);
    }
    empty(dir).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stores(dir: &Path, bytes: u64, age: Duration) -> Option<Stores> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: layer stores are given to another user, which needs root");
            return None;
        }
        Some(Stores::new(dir, CacheLimits { bytes, age }))
    }

    #[tokio::test]
    async fn take_gives_each_build_a_store_and_accounts_none_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), u64::MAX, Duration::from_secs(60)) else { return };
        let one = stores.take("1").await.unwrap();
        let two = stores.take("1").await.unwrap();
        let other = stores.take("2").await.unwrap();
        assert_eq!(
            [&one, &two, &other].map(|store| store.dir.strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned()),
            ["accounts/1/0", "accounts/1/1", "accounts/2/0"]
        );
        fs::write(one.data().join("layer"), "content").unwrap();
        drop(one);
        let again = stores.take("1").await.unwrap();
        assert_eq!(fs::read_to_string(again.data().join("layer")).unwrap(), "content");
        assert!(!again.renewed);
    }

    #[tokio::test]
    async fn take_old_store_is_made_afresh() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), u64::MAX, Duration::from_secs(60)) else { return };
        let store = stores.take("1").await.unwrap();
        assert!(!store.renewed, "a new store is nothing to tell of");
        fs::write(store.data().join("layer"), "old").unwrap();
        fs::write(store.dir.join("born"), "1000").unwrap();
        drop(store);
        let store = stores.take("1").await.unwrap();
        assert!(store.renewed && !store.data().join("layer").exists());
    }

    #[tokio::test]
    async fn trim_deletes_what_was_used_least_recently_and_nothing_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), 300 << 10, Duration::from_secs(60)) else { return };
        let mut taken = Vec::new();
        for account in ["1", "2", "3"] {
            let store = stores.take(account).await.unwrap();
            fs::write(store.data().join("layer"), vec![1; 200 << 10]).unwrap();
            taken.push(store);
        }
        taken[0].lock.set_modified(UNIX_EPOCH).unwrap();
        taken[1].lock.set_modified(UNIX_EPOCH + Duration::from_secs(9)).unwrap();
        let layers: Vec<PathBuf> = taken.iter().map(|store| store.data().join("layer")).collect();
        let in_use = taken.remove(0);
        drop(taken);
        stores.trim().await.unwrap();
        let left: Vec<bool> = layers.iter().map(|layer| layer.exists()).collect();
        assert_eq!(left, [true, false, false], "the first is in use, and with another one there would still be too much");
        drop(in_use);
        assert!(cache_usage(dir.path()).unwrap().bytes > 200 << 10);
        assert_eq!(cache_usage(dir.path()).unwrap().stores, 3);
    }

    #[tokio::test]
    async fn trim_begins_with_accounts_that_have_more_than_an_equal_part() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), 500 << 10, Duration::from_secs(60)) else { return };
        let (modest, greedy, second) = (stores.take("1").await.unwrap(), stores.take("2").await.unwrap(), stores.take("2").await.unwrap());
        for (store, kib, age) in [(&modest, 100, 1), (&greedy, 300, 2), (&second, 200, 3)] {
            fs::write(store.data().join("layer"), vec![1; kib << 10]).unwrap();
            store.lock.set_modified(UNIX_EPOCH + Duration::from_secs(age)).unwrap();
        }
        let layers: Vec<PathBuf> = [&modest, &greedy, &second].map(|store| store.data().join("layer")).to_vec();
        drop((modest, greedy, second));
        stores.trim().await.unwrap();
        let left: Vec<bool> = layers.iter().map(|layer| layer.exists()).collect();
        assert_eq!(left, [true, false, true], "the modest account's was used least recently, and is within its part");
    }

    #[tokio::test]
    async fn disk_that_was_not_left_in_order_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), 1 << 20, Duration::from_secs(60)) else { return };
        let store = stores.take("1").await.unwrap();
        let disk = store.disk().await.unwrap();
        let write = || {
            let file = OpenOptions::new().write(true).open(&disk).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"layer", 0).unwrap();
        };
        let begins = || fs::read(&disk).is_ok_and(|content| content.starts_with(b"layer"));
        // Small enough to be read as a whole.
        let store = Store { disk_bytes: 4096, ..store };
        store.disk().await.unwrap();
        write();
        fs::write(store.clean_mark(), "").unwrap();
        store.disk().await.unwrap();
        assert!(begins() && !store.clean_mark().exists(), "it is kept, and must be left in order again");
        store.disk().await.unwrap();
        assert!(!begins());
    }

    #[tokio::test]
    async fn make_room_deletes_both_kinds_of_store_until_it_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let Some(stores) = stores(dir.path(), u64::MAX, Duration::from_secs(60)) else { return };
        let (first, second, in_use) = (stores.take("1").await.unwrap(), stores.take("2").await.unwrap(), stores.take("3").await.unwrap());
        let disk = first.disk().await.unwrap();
        first.lock.set_modified(UNIX_EPOCH).unwrap();
        let kept = second.data();
        drop((first, second));
        let gone = disk.clone();
        stores.make_room(move || !gone.exists()).await.unwrap();
        assert!(!disk.exists() && kept.exists());
        stores.make_room(|| false).await.unwrap();
        assert!(!kept.exists() && in_use.data().exists());
    }
}
