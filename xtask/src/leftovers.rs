//! What a server could leave behind on the host, looked at before and after.

use std::{collections::BTreeSet, fs, path::Path, process::Command, time::Duration};

use anyhow::Result;

use crate::process;

/// Programs that only a server, its builds and its MicroVMs start.
const PROGRAMS: &[&str] = &["qemu-system-x86", "qemu-img", "runc", "dockerd", "containerd", "mkfs.ext4", "hearth"];
/// Directories where temporary things of ours would lie, and how their names begin.
const TEMPORARY: &[&str] = &["/tmp", "/var/tmp", "/run", "/dev/shm"];
const NAMES: &[&str] = &["hearth", "buildkit", "runc", "qemu"];
/// Where iproute2 keeps named network namespaces: once a test has named one, it stays mounted, empty.
const NAMED_NAMESPACES: &str = "/run/netns";
const LIMIT: Duration = Duration::from_secs(20);

/// Everything of the kinds that a server makes, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host(BTreeSet<String>);

impl Host {
    /// Looks at the host as it is now.
    pub fn look() -> Result<Self> {
        let mut found = BTreeSet::new();
        found.extend(processes());
        found.extend(names_in(Path::new(NAMED_NAMESPACES), |_| true).map(|name| format!("network namespace {name}")));
        found.extend(names_in(Path::new("/sys/class/net"), |_| true).map(|name| format!("network device {name}")));
        for dir in TEMPORARY {
            let ours = |name: &str| NAMES.iter().any(|start| name.starts_with(start));
            found.extend(names_in(Path::new(dir), ours).map(|name| format!("file {dir}/{name}")));
        }
        found.extend(mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()));
        found.extend(control_groups(Path::new("/sys/fs/cgroup"), 0));
        found.extend(tables()?);
        Ok(Self(found))
    }

    /// What is there now and was not there before.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn processes() -> Vec<String> {
    let pids = names_in(Path::new("/proc"), |name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter_map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let name = name.trim_end();
        let zombie = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty());
        (!zombie && PROGRAMS.contains(&name)).then(|| format!("process {pid} ({name})"))
    })
    .collect()
}

fn mounts(mountinfo: &str) -> Vec<String> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| *point != NAMED_NAMESPACES).map(|point| format!("mount {point}")).collect()
}

/// Control groups are nested, but ours would lie near the top.
fn control_groups(dir: &Path, depth: usize) -> Vec<String> {
    let mut found = Vec::new();
    for name in names_in(dir, |_| true) {
        let path = dir.join(&name);
        if !path.is_dir() {
            continue;
        }
        if name.contains("hearth") || name.contains("buildkit") {
            found.push(format!("control group {}", path.display()));
        } else if depth < 2 {
            found.extend(control_groups(&path, depth + 1));
        }
    }
    found
}

fn tables() -> Result<Vec<String>> {
    let (status, text) = process::capture("nft", Command::new("nft").args(["list", "tables"]), LIMIT)?;
    if !status.success() {
        return Ok(Vec::new());
    }
    Ok(text.lines().filter(|line| line.starts_with("table ")).map(|line| format!("nftables {line}")).collect())
}

fn names_in(dir: &Path, keep: impl Fn(&str) -> bool) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(move |name| keep(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_told() {
        let before = Host(BTreeSet::from(["mount /".to_owned()]));
        let after = Host(BTreeSet::from(["mount /".to_owned(), "mount /mnt".to_owned()]));
        assert_eq!(after.since(&before), ["mount /mnt"]);
        assert!(before.since(&after).is_empty());
    }

    #[test]
    fn mount_points_are_read() {
        let text = "21 28 0:20 / /run/netns rw - tmpfs tmpfs rw\n22 28 0:20 / /sys rw,nosuid - sysfs sysfs rw\n23 28 0:21 / /data/build\\040cache rw - tmpfs tmpfs rw\n";
        assert_eq!(mounts(text), ["mount /sys", "mount /data/build\\040cache"]);
    }
}
