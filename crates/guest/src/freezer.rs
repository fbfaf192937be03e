//! Holds the application still, by the freezer of its cgroup: from the host's `Detach` until what the next `Hello` says has been taken over,
//! nothing of the application runs. It never sees a clock that is behind, random numbers that another clone draws too, or a connection whose
//! other end is gone.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// How long the application may take to stand still. Only a process that the kernel lets wait without interruption (a disk, a server of a
/// file system) takes longer than an instant; it stops before its next instruction of its own, late or not.
const DEADLINE: Duration = Duration::from_secs(1);

/// The application could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// a control file could not be used
    #[error("{doing} the application: {error}")]
    Control {
        /// Present participle.
        doing: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
    /// a process is still in the kernel
    #[error("a process of the application did not stand still within {} ms", DEADLINE.as_millis())]
    Deadline,
}

/// The freezer of one cgroup (version 2).
#[derive(Debug)]
pub struct Freezer {
    cgroup: PathBuf,
}

impl Freezer {
    /// For the cgroup whose directory this is. It need not be there yet.
    pub fn new(cgroup: &Path) -> Self {
        Self { cgroup: cgroup.to_owned() }
    }

    /// Returns when every process stands still. After an error, none of them runs instructions of its own any more either, if it was the
    /// deadline that passed.
    pub async fn freeze(&self) -> Result<(), FreezerError> {
        let failed = |error| FreezerError::Control { doing: "freezing", error };
        match fs::write(self.cgroup.join("cgroup.freeze"), "1") {
            // There is no application yet.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            result => result.map_err(failed)?,
        }
        timeout(DEADLINE, self.stands_still()).await.map_err(|_| FreezerError::Deadline)?.map_err(failed)
    }

    /// Lets every process run again.
    pub fn thaw(&self) -> Result<(), FreezerError> {
        match fs::write(self.cgroup.join("cgroup.freeze"), "0") {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(|error| FreezerError::Control { doing: "thawing", error }),
        }
    }

    /// The kernel announces a change of `cgroup.events` as exceptional, until the file is read again.
    async fn stands_still(&self) -> io::Result<()> {
        let events = File::open(self.cgroup.join("cgroup.events"))?;
        // SAFETY: the file owns its descriptor, and keeps it for as long as it is registered.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) }?;
        let mut text = [0; 256];
        loop {
            let length = events.get_ref().read_at(&mut text, 0)?;
            if text[..length].split(|byte| *byte == b'\n').any(|line| line == b"frozen 1") {
                return Ok(());
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use nix::mount::{MsFlags, mount, umount};

    use super::*;

    /// A cgroup of its own with a process that never sleeps.
    struct Busy {
        mounted: tempfile::TempDir,
        process: Child,
    }

    impl Busy {
        /// Nothing, and a word on why, where cgroups cannot be made.
        fn start() -> Option<Self> {
            let mounted = tempfile::tempdir().unwrap();
            if let Err(error) = mount(Some("cgroup2"), mounted.path(), Some("cgroup2"), MsFlags::empty(), None::<&str>) {
                eprintln!("skipped: mounting cgroup2: {error}");
                return None;
            }
            let process = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
            let busy = Self { mounted, process };
            fs::create_dir(busy.cgroup()).unwrap();
            fs::write(busy.cgroup().join("cgroup.procs"), busy.process.id().to_string()).unwrap();
            Some(busy)
        }

        fn cgroup(&self) -> PathBuf {
            self.mounted.path().join(format!("hearth-freezer-{}", std::process::id()))
        }

        /// Processor time of the process, in the kernel's ticks.
        fn ticks(&self) -> u64 {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
            stat.split_whitespace().nth(13).unwrap().parse().unwrap()
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ = fs::remove_dir(self.cgroup());
            let _ = umount(self.mounted.path());
        }
    }

    #[tokio::test]
    async fn a_frozen_process_does_not_run_until_it_is_thawed() {
        let Some(busy) = Busy::start() else { return };
        let freezer = Freezer::new(&busy.cgroup());
        freezer.freeze().await.unwrap();
        let before = busy.ticks();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(busy.ticks(), before);
        freezer.freeze().await.expect("freezing what is frozen changes nothing");
        freezer.thaw().unwrap();
        let runs = async {
            while busy.ticks() == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), runs).await.expect("the process runs again");
    }

    #[tokio::test]
    async fn without_an_application_there_is_nothing_to_freeze() {
        let freezer = Freezer::new(Path::new("/no/such/cgroup"));
        freezer.freeze().await.unwrap();
        freezer.thaw().unwrap();
    }
}
