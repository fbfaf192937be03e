//! Whether the host has memory for one more machine.
//!
//! Two things must hold when a machine is admitted, be it a launch, a resume or the boot of a build:
//!
//! - What is promised to all machines that have a process fits the host. A clone shares what it does not change with its image, so that only a
//!   part of its memory is promised: its size divided by the overcommit. The image's memory is promised along with the first of its clones,
//!   until the last is gone. A clone that is resumed is promised what it had changed when it was suspended, if that is more than its part. A
//!   machine that is booted shares nothing.
//! - What is available now, by the kernel's estimate, is enough for this machine and for those that were admitted but have not started yet.
//!   This notices what else the host is used for, and guests that use more than their part.
//!
//! The promise is a [`Reservation`], which is given back when it is dropped: two launches at once are never admitted to the same memory. What
//! the engine keeps of images that nobody runs is not promised; it shows in what is available.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{error::ControlError, settings::CapacitySettings};

/// Keeps account of the host's memory.
#[derive(Debug)]
pub(crate) struct Capacity {
    settings: CapacitySettings,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// To machines that have a process, or will have one at once.
    promised_mib: u64,
    /// The part of it whose machines have not started.
    starting_mib: u64,
    /// Memory of images that have clones, by their snapshots' directories.
    images: HashMap<PathBuf, ImageMemory>,
}

#[derive(Debug)]
struct ImageMemory {
    mib: u64,
    /// What of it is about to be loaded.
    starting_mib: u64,
    clones: usize,
}

/// The memory that all clones of an image share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shared<'a> {
    /// Directory of the snapshot.
    pub snapshot: &'a Path,
    pub bytes: u64,
    /// What of it is not in the host's memory yet.
    pub unloaded_bytes: u64,
}

/// The host's memory, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total_mib: u64,
    /// What programs can still have, by the kernel's estimate.
    pub available_mib: u64,
}

/// The host has no memory for a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Shortage {
    /// too much is promised already
    #[error(
        "MicroVMs may have {limit_mib} MiB of this host's memory, {promised_mib} MiB are promised, and the MicroVM needs {needed_mib} MiB. \
         Suspend or terminate MicroVMs, or use an image with less memory."
    )]
    Promised {
        /// What may be promised.
        limit_mib: u64,
        /// What is.
        promised_mib: u64,
        /// What this machine counts for.
        needed_mib: u64,
    },
    /// too little is left, whoever uses it
    #[error(
        "The host has {available_mib} MiB of memory available and keeps {reserve_mib} MiB in reserve, the MicroVM needs {needed_mib} MiB. \
         Suspend or terminate MicroVMs, or use an image with less memory."
    )]
    Used {
        /// What is available, without what is about to be used.
        available_mib: u64,
        /// What is never promised.
        reserve_mib: u64,
        /// What this machine counts for.
        needed_mib: u64,
    },
}

impl From<Shortage> for ControlError {
    fn from(shortage: Shortage) -> Self {
        Self::InsufficientCapacity(shortage.to_string())
    }
}

impl Capacity {
    pub fn new(settings: CapacitySettings) -> Arc<Self> {
        Arc::new(Self { settings, ledger: Mutex::default() })
    }

    /// Promises memory to a clone with this much, and to its image. `own_bytes` of it are the clone's own from the first moment.
    pub fn admit_clone(self: &Arc<Self>, memory_mib: u32, own_bytes: u64, image: Option<Shared<'_>>) -> Result<Reservation, Shortage> {
        self.admit(self.share(memory_mib).max(mib(own_bytes)), image, HostMemory::read())
    }

    /// Promises memory to a machine that is booted.
    pub fn admit_boot(self: &Arc<Self>, memory_mib: u32) -> Result<Reservation, Shortage> {
        self.admit(memory_mib.into(), None, HostMemory::read())
    }

    /// What a clone is promised of its memory.
    fn share(&self, memory_mib: u32) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "above 0 and at most a u32; a float's conversion saturates"
        )]
        let share = (f64::from(memory_mib) / self.settings.overcommit.max(1.0)).ceil() as u64;
        share
    }

    /// A host that hides its memory admits everything.
    fn admit(self: &Arc<Self>, own_mib: u64, image: Option<Shared<'_>>, host: Option<HostMemory>) -> Result<Reservation, Shortage> {
        let reserve_mib = self.settings.reserve_mib;
        let mut ledger = self.lock();
        // Whoever came first has it promised and brings it in.
        let new_image = image.filter(|image| !ledger.images.contains_key(image.snapshot));
        let (image_mib, unloaded_mib) = new_image.map_or((0, 0), |image| (mib(image.bytes), mib(image.unloaded_bytes)));
        if let Some(limit_mib) = self.settings.limit_mib(host) {
            let (promised_mib, needed_mib) = (ledger.promised_mib, own_mib + image_mib);
            if promised_mib + needed_mib > limit_mib {
                return Err(Shortage::Promised { limit_mib, promised_mib, needed_mib });
            }
        }
        if let Some(host) = host {
            let (available_mib, needed_mib) = (host.available_mib.saturating_sub(ledger.starting_mib), own_mib + unloaded_mib);
            if available_mib < needed_mib + reserve_mib {
                return Err(Shortage::Used { available_mib, reserve_mib, needed_mib });
            }
        }
        ledger.promised_mib += own_mib + image_mib;
        ledger.starting_mib += own_mib + unloaded_mib;
        let image = image.map(|image| {
            let new = || ImageMemory { mib: image_mib, starting_mib: unloaded_mib, clones: 0 };
            ledger.images.entry(image.snapshot.to_owned()).or_insert_with(new).clones += 1;
            image.snapshot.to_owned()
        });
        Ok(Reservation { capacity: Arc::clone(self), promised_mib: own_mib, image, starting: true })
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// The image's memory is loaded, or will not be.
    fn image_loaded(&mut self, snapshot: &Path) {
        if let Some(image) = self.images.get_mut(snapshot) {
            self.starting_mib -= std::mem::take(&mut image.starting_mib);
        }
    }

    fn clone_gone(&mut self, snapshot: &Path) {
        let Some(image) = self.images.get_mut(snapshot) else { return };
        image.clones -= 1;
        if image.clones == 0 {
            self.promised_mib -= image.mib;
            self.image_loaded(snapshot);
            self.images.remove(snapshot);
        }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Memory that is promised to one machine.
#[derive(Debug)]
pub(crate) struct Reservation {
    capacity: Arc<Capacity>,
    promised_mib: u64,
    /// Directory of the snapshot whose memory it shares.
    image: Option<PathBuf>,
    starting: bool,
}

impl Reservation {
    /// The machine runs: what it uses shows in what is available.
    pub fn started(&mut self) {
        if std::mem::take(&mut self.starting) {
            let mut ledger = self.capacity.lock();
            ledger.starting_mib -= self.promised_mib;
            if let Some(image) = &self.image {
                ledger.image_loaded(image);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut ledger = self.capacity.lock();
        ledger.promised_mib -= self.promised_mib;
        if self.starting {
            ledger.starting_mib -= self.promised_mib;
        }
        if let Some(image) = &self.image {
            ledger.clone_gone(image);
        }
    }
}

impl HostMemory {
    /// Nothing, if the host hides it.
    pub fn read() -> Option<Self> {
        // A file of the kernel's own memory: reading it waits for no disk.
        Self::parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    /// `MemTotal` and `MemAvailable` of /proc/meminfo (proc_meminfo(5)).
    fn parse(meminfo: &str) -> Option<Self> {
        let mib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib / 1024)
        };
        Some(Self { total_mib: mib("MemTotal:")?, available_mib: mib("MemAvailable:")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(overcommit: f64) -> Arc<Capacity> {
        Capacity::new(CapacitySettings { memory_mib: None, reserve_mib: 100, overcommit })
    }

    fn host(total_mib: u64, available_mib: u64) -> Option<HostMemory> {
        Some(HostMemory { total_mib, available_mib })
    }

    #[test]
    fn the_host_s_memory_is_read() {
        assert_eq!(HostMemory::parse("MemTotal: 4096000 kB\nMemAvailable:    2048000 kB\n"), host(4000, 2000));
        assert_eq!(HostMemory::parse("MemTotal: 10 kB\n"), None);
        assert!(HostMemory::read().is_some_and(|host| host.available_mib <= host.total_mib));
    }

    #[test]
    fn launches_at_once_are_not_admitted_to_the_same_memory() {
        let capacity = capacity(1.0);
        // As if none of them had touched its memory yet.
        let host = host(10_000, 1_200);
        let first = capacity.admit(512, None, host).unwrap();
        let mut second = capacity.admit(512, None, host).unwrap();
        let refused = capacity.admit(512, None, host).unwrap_err();
        assert_eq!(refused, Shortage::Used { available_mib: 176, reserve_mib: 100, needed_mib: 512 });
        drop(first);
        second.started();
        second.started();
        capacity.admit(512, None, host).expect("one is gone, and what the other uses is not available any more");
    }

    #[test]
    fn what_is_promised_never_exceeds_the_host() {
        let capacity = capacity(1.0);
        let host = host(1_124, 1_124);
        let mut running: Vec<_> = (0..2).map(|_| capacity.admit(512, None, host).unwrap()).collect();
        running.iter_mut().for_each(Reservation::started);
        let refused = capacity.admit(512, None, host).unwrap_err();
        assert_eq!(refused, Shortage::Promised { limit_mib: 1_024, promised_mib: 1_024, needed_mib: 512 });
        assert!(refused.to_string().contains("terminate MicroVMs"), "{refused}");
        running.pop();
        let _third = capacity.admit(512, None, host).unwrap();
        drop(running);
        assert_eq!(capacity.lock().promised_mib, 512);
    }

    #[test]
    fn clones_are_promised_a_part_and_boots_the_whole() {
        let capacity = capacity(4.0);
        assert_eq!((capacity.share(512), capacity.share(2049)), (128, 513));
        assert_eq!(Capacity::new(CapacitySettings { overcommit: 0.0, ..capacity.settings }).share(512), 512);
        let _boot = capacity.admit_boot(1).unwrap();
        assert_eq!(capacity.lock().promised_mib, 1);
    }

    /// What is promised, and what of it has not started.
    fn promised(capacity: &Capacity) -> (u64, u64) {
        let ledger = capacity.lock();
        (ledger.promised_mib, ledger.starting_mib)
    }

    #[test]
    fn the_memory_of_an_image_is_promised_once_for_all_of_its_clones() {
        let capacity = capacity(1.0);
        let host = host(2_000, 1_250);
        let image = |name, bytes, unloaded_bytes| Some(Shared { snapshot: Path::new(name), bytes, unloaded_bytes });
        let demo = image("demo", (400 << 20) - 1, (400 << 20) - 1);
        let mut first = capacity.admit(500, demo, host).unwrap();
        let refused = capacity.admit(500, demo, host).unwrap_err();
        assert_eq!(refused, Shortage::Used { available_mib: 350, reserve_mib: 100, needed_mib: 500 }, "the first brings it in");
        let refused = capacity.admit(100, image("other", 1_000 << 20, 0), host).unwrap_err();
        assert_eq!(refused, Shortage::Promised { limit_mib: 1_900, promised_mib: 900, needed_mib: 1_100 });

        first.started();
        assert_eq!(promised(&capacity), (900, 0));
        let mut second = capacity.admit(500, demo, host).unwrap();
        drop(first);
        assert_eq!(promised(&capacity), (900, 500));
        second.started();
        drop(second);
        assert_eq!(promised(&capacity), (0, 0));

        // The engine has kept it: it is not available any more, and not needed again.
        let third = capacity.admit(1_000, image("demo", 400 << 20, 0), host).unwrap();
        assert_eq!(promised(&capacity), (1_400, 1_000));
        drop(third);
        let never_started = capacity.admit(1, demo, host).unwrap();
        drop(never_started);
        assert_eq!(promised(&capacity), (0, 0));
    }

    #[test]
    fn a_host_that_hides_its_memory_admits_what_the_settings_allow() {
        let settings = CapacitySettings { memory_mib: Some(1_000), reserve_mib: 0, overcommit: 1.0 };
        let capacity = Capacity::new(settings);
        let _first = capacity.admit(600, None, None).unwrap();
        assert!(matches!(capacity.admit(600, None, None), Err(Shortage::Promised { .. })));
    }
}
