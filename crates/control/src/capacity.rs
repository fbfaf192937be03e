//! Whether the host has memory for one more machine.
//!
//! Two things must hold when a machine is admitted, be it a launch, a resume or the boot of a build:
//!
//! - What is promised to all machines that have a process fits the host. A clone shares what it does not change with its image, so that only a
//!   part of its memory is promised: its size divided by the overcommit. A machine that is booted shares nothing.
//! - What is available now, by the kernel's estimate, is enough for this machine and for those that were admitted but have not started yet.
//!   This notices what else the host is used for, and guests that use more than their part.
//!
//! The promise is a [`Reservation`], which is given back when it is dropped: two launches at once are never admitted to the same memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
}

/// The host's memory, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostMemory {
    pub total_mib: u64,
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

    /// Promises memory to a clone with this much.
    pub fn admit_clone(self: &Arc<Self>, memory_mib: u32) -> Result<Reservation, Shortage> {
        self.admit(self.share(memory_mib), HostMemory::read())
    }

    /// Promises memory to a machine that is booted.
    pub fn admit_boot(self: &Arc<Self>, memory_mib: u32) -> Result<Reservation, Shortage> {
        self.admit(memory_mib.into(), HostMemory::read())
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
    fn admit(self: &Arc<Self>, needed_mib: u64, host: Option<HostMemory>) -> Result<Reservation, Shortage> {
        let reserve_mib = self.settings.reserve_mib;
        let mut ledger = self.lock();
        if let Some(limit_mib) = self.settings.limit_mib(host) {
            let promised_mib = ledger.promised_mib;
            if promised_mib + needed_mib > limit_mib {
                return Err(Shortage::Promised { limit_mib, promised_mib, needed_mib });
            }
        }
        if let Some(host) = host {
            let available_mib = host.available_mib.saturating_sub(ledger.starting_mib);
            if available_mib < needed_mib + reserve_mib {
                return Err(Shortage::Used { available_mib, reserve_mib, needed_mib });
            }
        }
        ledger.promised_mib += needed_mib;
        ledger.starting_mib += needed_mib;
        Ok(Reservation { capacity: Arc::clone(self), promised_mib: needed_mib, starting: true })
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that is promised to one machine.
#[derive(Debug)]
pub(crate) struct Reservation {
    capacity: Arc<Capacity>,
    promised_mib: u64,
    starting: bool,
}

impl Reservation {
    /// The machine runs: what it uses shows in what is available.
    pub fn started(&mut self) {
        if std::mem::take(&mut self.starting) {
            self.capacity.lock().starting_mib -= self.promised_mib;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.started();
        self.capacity.lock().promised_mib -= self.promised_mib;
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
        let first = capacity.admit(512, host).unwrap();
        let mut second = capacity.admit(512, host).unwrap();
        let refused = capacity.admit(512, host).unwrap_err();
        assert_eq!(refused, Shortage::Used { available_mib: 176, reserve_mib: 100, needed_mib: 512 });
        drop(first);
        second.started();
        second.started();
        capacity.admit(512, host).expect("one is gone, and what the other uses is not available any more");
    }

    #[test]
    fn what_is_promised_never_exceeds_the_host() {
        let capacity = capacity(1.0);
        let host = host(1_124, 1_124);
        let mut running: Vec<_> = (0..2).map(|_| capacity.admit(512, host).unwrap()).collect();
        running.iter_mut().for_each(Reservation::started);
        let refused = capacity.admit(512, host).unwrap_err();
        assert_eq!(refused, Shortage::Promised { limit_mib: 1_024, promised_mib: 1_024, needed_mib: 512 });
        assert!(refused.to_string().contains("terminate MicroVMs"), "{refused}");
        running.pop();
        let _third = capacity.admit(512, host).unwrap();
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

    #[test]
    fn a_host_that_hides_its_memory_admits_what_the_settings_allow() {
        let settings = CapacitySettings { memory_mib: Some(1_000), reserve_mib: 0, overcommit: 1.0 };
        let capacity = Capacity::new(settings);
        let _first = capacity.admit(600, None).unwrap();
        assert!(matches!(capacity.admit(600, None), Err(Shortage::Promised { .. })));
    }
}
