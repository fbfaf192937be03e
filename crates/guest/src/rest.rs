//! Tells when the application's container has come to rest: for a moment its processes have hardly used the processor, the disk or the
//! network. A server often listens before it has loaded what it serves, so a port alone does not say that an application is up.
//!
//! The kernel counts what a control group uses, and announces no change of it. The counters are looked at ten times a second, from the
//! application's start until its snapshot is taken.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use hearth_guest_protocol::Activity;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use crate::cgroup::{self, counter};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
/// Looks that make up the moment. They are counted, not timed: a machine that its host has held up for a second has not rested for one.
const LOOKS: usize = 10;
/// What a container at rest uses in such a moment. The clock of an interpreter, or a log that is written now and then, is less under software
/// emulation too. A program that loads is far above: one that computes takes a whole processor, one that reads takes a megabyte at least.
const MOST: Used = Used { cpu: Duration::from_millis(200), disk_bytes: 128 << 10, network_bytes: 64 << 10 };

/// Where the counters are.
#[derive(Debug)]
pub struct Counters {
    cgroup: PathBuf,
    disk: PathBuf,
    network: PathBuf,
}

impl Counters {
    /// Those of the application's container.
    pub fn of_the_application() -> Self {
        Self { cgroup: cgroup::APP.into(), disk: "/sys/block/vda".into(), network: "/sys/class/net/eth0/statistics".into() }
    }

    fn look(&self) -> io::Result<Look> {
        let read = |path: &Path| fs::read_to_string(path);
        // Absent until the first request, where the kernel has no controller, and without a network device.
        let optional = |path: &Path| match read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            result => result,
        };
        let bytes = |name: &str| optional(&self.network.join(name)).map(|text| text.trim().parse().unwrap_or(0));
        Ok(Look {
            used: Used {
                cpu: Duration::from_micros(counter(&read(&self.cgroup.join("cpu.stat"))?, "usage_usec")),
                disk_bytes: disk_bytes(&optional(&self.cgroup.join("io.stat"))?),
                network_bytes: bytes("rx_bytes")? + bytes("tx_bytes")?,
            },
            disk_waits: optional(&self.disk.join("inflight"))?.split_whitespace().any(|requests| requests != "0"),
        })
    }

    /// Sends each change of the container's activity until the receiver is gone. The container is taken to be busy at first.
    pub async fn watch(self, changes: mpsc::Sender<Activity>) -> io::Result<()> {
        let mut recent = Recent::default();
        let mut interval = interval(INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Activity::Busy;
        loop {
            interval.tick().await;
            let activity = recent.add(self.look()?);
            if activity != last && changes.send(activity).await.is_err() {
                return Ok(());
            }
            last = activity;
        }
    }
}

/// What the container has used since some point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    /// Time of all processors together.
    cpu: Duration,
    /// Read and written.
    disk_bytes: u64,
    /// Sent and received.
    network_bytes: u64,
}

/// What one look at the counters found.
#[derive(Debug, Clone, Copy)]
struct Look {
    used: Used,
    /// The disk has not yet answered a request. A process may wait for it, and uses nothing meanwhile.
    disk_waits: bool,
}

/// The looks of the last moment, oldest first.
#[derive(Debug, Default)]
struct Recent(VecDeque<Used>);

impl Recent {
    fn add(&mut self, look: Look) -> Activity {
        let now = look.used;
        self.0.push_back(now);
        if self.0.len() <= LOOKS {
            return Activity::Busy;
        }
        if self.0.len() > LOOKS + 1 {
            self.0.pop_front();
        }
        let before = self.0[0];
        let little = now.cpu.saturating_sub(before.cpu) <= MOST.cpu
            && now.disk_bytes.saturating_sub(before.disk_bytes) <= MOST.disk_bytes
            && now.network_bytes.saturating_sub(before.network_bytes) <= MOST.network_bytes;
        if little && !look.disk_waits { Activity::AtRest } else { Activity::Busy }
    }
}

/// Bytes read and written, from `io.stat`: a line for each device, of words such as `rbytes=4096`.
fn disk_bytes(io_stat: &str) -> u64 {
    let number = |word: &str| word.strip_prefix("rbytes=").or(word.strip_prefix("wbytes="))?.parse::<u64>().ok();
    io_stat.split_whitespace().filter_map(number).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Used = Used { cpu: Duration::ZERO, disk_bytes: 0, network_bytes: 0 };

    /// Activities at each look at a container that uses the same from look to look.
    fn activities(looks: usize, each: Used, disk_waits: bool) -> Vec<Activity> {
        let mut recent = Recent::default();
        let used = |look: usize| Used {
            cpu: each.cpu * u32::try_from(look).unwrap(),
            disk_bytes: each.disk_bytes * look as u64,
            network_bytes: each.network_bytes * look as u64,
        };
        (0..looks).map(|look| recent.add(Look { used: used(look), disk_waits })).collect()
    }

    fn last(each: Used, disk_waits: bool) -> Activity {
        activities(3 * LOOKS, each, disk_waits).pop().unwrap()
    }

    #[test]
    fn activity_of_idle_container_is_rest_after_a_whole_moment() {
        let seen = activities(LOOKS + 2, IDLE, false);
        assert_eq!(seen.iter().filter(|activity| **activity == Activity::Busy).count(), LOOKS);
        assert_eq!(seen[LOOKS..], [Activity::AtRest; 2]);
    }

    #[test]
    fn activity_of_ticking_container_is_rest() {
        // Under emulation, an interpreter that wakes ten times a second takes some milliseconds for each.
        assert_eq!(last(Used { cpu: Duration::from_millis(8), disk_bytes: 4096, network_bytes: 200 }, false), Activity::AtRest);
    }

    #[test]
    fn activity_of_loading_container_is_busy() {
        assert_eq!(last(Used { cpu: Duration::from_millis(95), ..IDLE }, false), Activity::Busy);
        assert_eq!(last(Used { disk_bytes: 128 << 10, ..IDLE }, false), Activity::Busy);
        assert_eq!(last(Used { network_bytes: 16 << 10, ..IDLE }, false), Activity::Busy);
        assert_eq!(last(IDLE, true), Activity::Busy, "it waits for the disk");
    }

    #[test]
    fn activity_after_rest_is_busy_at_once_and_rest_after_another_moment() {
        let mut recent = Recent::default();
        let look = |milliseconds| Look { used: Used { cpu: Duration::from_millis(milliseconds), ..IDLE }, disk_waits: false };
        for _ in 0..2 * LOOKS {
            recent.add(look(0));
        }
        assert_eq!(recent.add(look(250)), Activity::Busy);
        let after: Vec<Activity> = (0..LOOKS).map(|_| recent.add(look(250))).collect();
        assert_eq!(after.iter().position(|activity| *activity == Activity::AtRest), Some(LOOKS - 1));
    }

    #[test]
    fn disk_bytes_of_all_devices_are_added() {
        let text = "254:0 rbytes=4096 wbytes=512 rios=1 wios=1 dbytes=8192 dios=1\n7:0 rbytes=1 wbytes=x\n";
        assert_eq!(disk_bytes(text), 4609);
        assert_eq!(disk_bytes(""), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn watch_of_idle_container_tells_of_rest_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.stat"), "usage_usec 5000000\nuser_usec 1\n").unwrap();
        let at = |name: &str| dir.path().join(name);
        let counters = Counters { cgroup: dir.path().into(), disk: at("no disk"), network: at("no network") };
        let (sender, mut changes) = mpsc::channel(4);
        let watch = tokio::spawn(counters.watch(sender));
        assert_eq!(changes.recv().await, Some(Activity::AtRest));
        assert!(tokio::time::timeout(Duration::from_secs(5), changes.recv()).await.is_err(), "nothing has changed");
        fs::write(at("cpu.stat"), "usage_usec 5300000\n").unwrap();
        assert_eq!(changes.recv().await, Some(Activity::Busy));
        assert_eq!(changes.recv().await, Some(Activity::AtRest));
        drop(changes);
        fs::write(at("cpu.stat"), "usage_usec 9300000\n").unwrap();
        watch.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn watch_without_counters_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let counters = Counters { cgroup: dir.path().into(), disk: dir.path().into(), network: dir.path().into() };
        let (sender, _changes) = mpsc::channel(1);
        assert!(counters.watch(sender).await.is_err());
    }
}
