//! The application's control group: everything that runs in the container is in `/app` of the machine's cgroup v2 hierarchy, or below.
//!
//! Its memory is limited a little below what the machine has, so that an application that takes all memory meets its own limit, is ended
//! as a whole and with a reason, and PID 1 goes on to tell of it. The group can also be frozen as a whole: nothing of the container runs then.
//!
//! ```text
//! /                 PID 1 and its helpers
//! └─ app            the container; root of its cgroup namespace
//!    ├─ init        its processes, when it has every capability: a group that hands controllers down may have none itself
//!    └─ …           the groups that it makes, for containers of its own
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;

/// Where PID 1 has mounted the hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The container's group.
pub const APP: &str = "/sys/fs/cgroup/app";

/// The group of a container's own processes if it may make groups beside them.
const INIT: &str = "init";
/// Controllers that containers get, where the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpuset", "cpu", "io", "memory", "pids"];
/// Memory that the application cannot have: for PID 1, its helpers, the log lines on their way, and the kernel's own needs of the moment.
const RESERVE_BYTES: u64 = 24 << 20;

/// A control group cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("control group: {doing} {}: {error}", path.display())]
pub struct CgroupError {
    doing: &'static str,
    path: PathBuf,
    error: io::Error,
}

/// Makes the application's group. Comes once, while nothing but PID 1 runs.
pub fn create() -> Result<(), CgroupError> {
    delegate(Path::new(ROOT))?;
    let app = Path::new(APP);
    make(app)?;
    write(&app.join("memory.max"), &memory_limit(&read(Path::new("/proc/meminfo"))?).to_string())?;
    // A container that has lost one of its processes for want of memory is seldom in a state worth keeping.
    write(&app.join("memory.oom.group"), "1")
}

/// Puts this process into the application's group. A delegated group has been given the controllers and is ready to have groups below it
/// as soon as [`step_aside`] has been called.
pub fn join() -> Result<(), CgroupError> {
    let app = Path::new(APP);
    // What an earlier attempt to start the application has left.
    let init = app.join(INIT);
    if init.exists() {
        let undo: Vec<String> = controllers(app)?.iter().map(|name| format!("-{name}")).collect();
        write(&app.join("cgroup.subtree_control"), &undo.join(" "))?;
        fs::remove_dir(&init).map_err(|error| CgroupError { doing: "removing", path: init, error })?;
    }
    enter(app)
}

/// Moves this process, the first in the application's group, one below it, and hands the controllers down.
pub fn step_aside() -> Result<(), CgroupError> {
    let app = Path::new(APP);
    make(&app.join(INIT))?;
    enter(&app.join(INIT))?;
    delegate(app)
}

/// Puts this process into the group of another.
pub fn join_process(pid: Pid) -> Result<(), CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let groups = read(&path)?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let missing = || CgroupError { doing: "finding a group in", path, error: io::ErrorKind::InvalidData.into() };
    enter(&Path::new(ROOT).join(group.ok_or_else(missing)?))
}

/// How many times the kernel has ended the application as a whole for want of memory.
pub fn out_of_memory_kills() -> Result<u64, CgroupError> {
    // The local file: what happens to a group that the application has made and limited itself is its own affair.
    Ok(counter(&read(&Path::new(APP).join("memory.events.local"))?, "oom_group_kill"))
}

/// What the application may use of the memory that is free when nothing else runs, in bytes.
fn memory_limit(meminfo: &str) -> u64 {
    let available = counter(meminfo, "MemAvailable:") << 10;
    available.saturating_sub(RESERVE_BYTES)
}

/// A number in a file of lines `name number`; 0 if it is not there.
pub fn counter(text: &str, name: &str) -> u64 {
    let mut fields = text.lines().map(str::split_whitespace);
    fields.find_map(|mut fields| fields.next().filter(|first| *first == name).and(fields.next())?.parse().ok()).unwrap_or(0)
}

/// Gives a group's children the controllers.
fn delegate(group: &Path) -> Result<(), CgroupError> {
    let wanted: Vec<String> = controllers(group)?.iter().map(|name| format!("+{name}")).collect();
    write(&group.join("cgroup.subtree_control"), &wanted.join(" "))
}

fn controllers(group: &Path) -> Result<Vec<&'static str>, CgroupError> {
    let there = read(&group.join("cgroup.controllers"))?;
    Ok(CONTROLLERS.into_iter().filter(|name| there.split_whitespace().any(|present| present == *name)).collect())
}

fn enter(group: &Path) -> Result<(), CgroupError> {
    write(&group.join("cgroup.procs"), "0")
}

fn make(group: &Path) -> Result<(), CgroupError> {
    fs::create_dir(group).map_err(|error| CgroupError { doing: "making", path: group.to_owned(), error })
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|error| CgroupError { doing: "reading", path: path.to_owned(), error })
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(|error| CgroupError { doing: "writing", path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_leaves_something_to_the_machine() {
        assert_eq!(
            memory_limit("MemTotal:         482344 kB\nMemFree:  1 kB\nMemAvailable:     438276 kB\n"),
            (438_276 << 10) - RESERVE_BYTES
        );
        assert_eq!(memory_limit(""), 0);
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        assert_eq!(counter("low 0\noom 3\noom_kill 2\noom_group_kill 1\n", "oom_kill"), 2);
        assert_eq!(counter("oom_kill two\n", "oom_kill"), 0);
    }
}
