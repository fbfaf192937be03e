//! Doors: sets of addresses in a slot's nftables rules that the answers for names open for a while.

use std::{
    collections::HashMap,
    fmt::Write,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use super::{NetworkError, rules::door_name, tools::nft};

/// Most addresses that are open at one door.
pub const MOST_OPEN: usize = 1024;

/// The doors of one slot.
#[derive(Debug)]
pub struct Doors {
    namespace: Arc<OwnedFd>,
    /// Until when each address is open, by door.
    open: Mutex<Vec<HashMap<Ipv4Addr, Instant>>>,
}

/// Addresses could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// the guest has resolved too much at once
    #[error("{MOST_OPEN} addresses of names are open already")]
    Full,
    /// the kernel was not told
    #[error(transparent)]
    Network(#[from] NetworkError),
}

impl Doors {
    /// Closed doors of a slot whose rules have that many.
    pub fn new(namespace: Arc<OwnedFd>, count: usize) -> Self {
        Self { namespace, open: Mutex::new(vec![HashMap::new(); count]) }
    }

    /// Opens doors, by their numbers, to addresses. When this returns they are open for that time at least, and for twice as long at most: so
    /// an address that is resolved again and again is renewed only now and then.
    pub async fn open(&self, doors: &[usize], addresses: &[Ipv4Addr], time: Duration) -> Result<(), DoorError> {
        let mut open = self.open.lock().await;
        let now = Instant::now();
        let (least, until) = (now + time, now + 2 * time);
        let mut orders = String::new();
        let mut renewed = Vec::new();
        for &number in doors {
            let door = &mut open[number];
            door.retain(|_, end| *end > now);
            let due: Vec<_> = addresses.iter().filter(|address| door.get(address).is_none_or(|end| *end < least)).collect();
            let fresh = due.iter().filter(|address| !door.contains_key(address)).count();
            if door.len() + fresh > MOST_OPEN {
                return Err(DoorError::Full);
            }
            if due.is_empty() {
                continue;
            }
            let list = |suffix: &str| due.iter().map(|address| format!("{address}{suffix}")).collect::<Vec<_>>().join(", ");
            let (name, timed) = (door_name(number), list(&format!(" timeout {}ms", 2 * time.as_millis())));
            // To add what is there leaves its end as it was, and to remove what is not there fails; this renews either.
            let _ = writeln!(orders, "add element ip slot {name} {{ {timed} }}");
            let _ = writeln!(orders, "delete element ip slot {name} {{ {} }}", list(""));
            let _ = writeln!(orders, "add element ip slot {name} {{ {timed} }}");
            renewed.extend(due.into_iter().map(|address| (number, *address)));
        }
        if orders.is_empty() {
            return Ok(());
        }
        nft(&self.namespace, &orders).await?;
        for (number, address) in renewed {
            open[number].insert(address, until);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;
    use crate::network::{EgressPolicy, Links, Slot, host::Nameservers, rules, slot::Surroundings, tools::inside};

    const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    fn listed(namespace: &OwnedFd) -> String {
        let mut command = Command::new("nft");
        inside(namespace, command.args(["list", "set", "ip", "slot", "door0"]));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    #[tokio::test]
    async fn a_door_closes_after_its_time_unless_that_is_renewed() {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: making a network slot needs root and /dev/net/tun");
            return;
        }
        let links = "192.168.201.0/24".parse::<Links>().unwrap();
        let around = Arc::new(Surroundings { links, nameservers: Nameservers::default(), mtu: 1500 });
        let slot = Slot::make(&around, &tokio_util::task::TaskTracker::new()).await.unwrap();
        let policy = EgressPolicy::parse("example.com", "").unwrap();
        nft(slot.namespace(), &rules::policy(&policy)).await.unwrap();
        let doors = Doors::new(slot.namespace().clone(), 1);
        let short = Duration::from_millis(750);
        doors.open(&[0], &[FIRST, SECOND], short).await.unwrap();
        doors.open(&[0], &[SECOND], Duration::from_secs(60)).await.unwrap();
        let before = listed(slot.namespace());
        assert!(before.contains("192.0.2.1 ") && before.contains("192.0.2.2 timeout 2m"), "{before}");
        tokio::time::sleep(2 * short).await;
        let after = listed(slot.namespace());
        assert!(!after.contains("192.0.2.1 ") && after.contains("192.0.2.2 "), "{after}");
        doors.open(&[0], &[FIRST], short).await.unwrap();
        assert!(listed(slot.namespace()).contains("192.0.2.1 "), "what has closed can be opened again");
    }

    #[tokio::test]
    async fn only_so_many_addresses_are_open_at_a_time() {
        let namespace = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let doors = Doors::new(namespace, 1);
        let many: Vec<_> = (0..=u32::try_from(MOST_OPEN).unwrap()).map(Ipv4Addr::from).collect();
        let refused = doors.open(&[0], &many, Duration::from_secs(60)).await;
        assert!(matches!(refused, Err(DoorError::Full)), "{refused:?}");
    }
}
