//! The builder's root file system, unpacked from the guest kit once and shared by all builds.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, task::spawn_blocking, time::timeout};

use crate::process::{ProcessError, Stop, run_captured};

const UNPACK: Duration = Duration::from_secs(300);
/// Longest wait for another server that unpacks.
const TURN: Duration = Duration::from_secs(620);
/// Ends the name of a version's disk.
const DISK: &str = "disk";
/// Size of the disk. All that is not written is a hole.
const DISK_SIZE: &str = "32G";

/// The root file system cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("another server has been unpacking the builder for {} seconds", TURN.as_secs())]
    Busy,
    #[error("unpacking the builder's root file system: {0}")]
    Tar(String),
    #[error("making a disk of the builder's root file system: {0}")]
    Disk(String),
}

/// A root file system that is there as long as this value lives.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) dir: PathBuf,
    /// The same on a disk, for machines.
    pub(crate) disk: Option<PathBuf>,
    /// Says that a server uses it.
    _used: File,
}

impl Root {
    /// Unpacks `archive` below `roots`, unless that was done, with a disk of it if there are `machines`, and deletes the versions that no server
    /// uses.
    pub(crate) async fn ensure(roots: &Path, archive: &Path, checksum: &str, machines: bool) -> Result<Self, RootError> {
        let io_error = |what| move |source| RootError::Io { what, source };
        fs::create_dir_all(roots).map_err(io_error("making the builder's directory"))?;
        let _turn = turn(roots).await?;
        let name = &checksum[..16];
        let used = lock_of(roots, name).map_err(io_error("opening the builder's lock"))?;
        used.lock_shared().map_err(io_error("locking the builder's root file system"))?;
        let dir = roots.join(name);
        if !dir.exists() {
            unpack(archive, &roots.join("unfinished")).await?;
            fs::rename(roots.join("unfinished"), &dir).map_err(io_error("finishing the builder's root file system"))?;
        }
        let disk = roots.join(format!("{name}.{DISK}"));
        if machines && !disk.exists() {
            let unfinished = roots.join("unfinished.disk");
            make_disk(&dir, &unfinished).await?;
            fs::rename(unfinished, &disk).map_err(io_error("finishing the builder's disk"))?;
        }
        if let Err(error) = remove_unused(roots, name) {
            tracing::warn!(%error, "an earlier version of the image builder is left");
        }
        Ok(Self { dir, disk: machines.then_some(disk), _used: used })
    }
}

/// Waits until no other server prepares. The turn lasts as long as the file is open.
async fn turn(roots: &Path) -> Result<File, RootError> {
    let file = lock_of(roots, "prepare").map_err(|source| RootError::Io { what: "opening the builder's lock", source })?;
    let locking = spawn_blocking(move || file.lock().map(|()| file));
    let locked = timeout(TURN, locking).await.map_err(|_| RootError::Busy)?.expect("locking does not panic");
    locked.map_err(|source| RootError::Io { what: "locking the builder's directory", source })
}

async fn unpack(archive: &Path, into: &Path) -> Result<(), RootError> {
    if into.exists() {
        fs::remove_dir_all(into).map_err(|source| RootError::Io { what: "deleting what an interrupted start left", source })?;
    }
    fs::create_dir(into).map_err(|source| RootError::Io { what: "making the builder's root file system", source })?;
    let mut tar = Command::new("tar");
    // The sandbox has devices of its own.
    tar.args(["--extract", "--numeric-owner", "--exclude=./dev/*", "--file"]).arg(archive).arg("--directory").arg(into);
    tar.stdin(Stdio::null());
    let ran = run_captured(tar, &Stop::after(UNPACK)).await?;
    if ran.status.success() { Ok(()) } else { Err(RootError::Tar(ran.stderr)) }
}

/// A file system of the tree, with room for a build's context.
async fn make_disk(tree: &Path, disk: &Path) -> Result<(), RootError> {
    if disk.exists() {
        fs::remove_file(disk).map_err(|source| RootError::Io { what: "deleting what an interrupted start left", source })?;
    }
    let mut mke2fs = Command::new("mke2fs");
    // Nothing that is written to it outlives its machine.
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d"]).arg(tree);
    mke2fs.arg(disk).arg(DISK_SIZE).stdin(Stdio::null());
    let ran = run_captured(mke2fs, &Stop::after(UNPACK)).await?;
    if !ran.status.success() {
        return Err(RootError::Disk(ran.stderr));
    }
    // Machines have users of their own, which open it.
    let mode = fs::set_permissions(disk, fs::Permissions::from_mode(0o644));
    mode.map_err(|source| RootError::Io { what: "sharing the builder's disk", source })
}

fn lock_of(roots: &Path, name: &str) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).open(roots.join(format!("{name}.lock")))
}

fn remove_unused(roots: &Path, current: &str) -> io::Result<()> {
    for entry in fs::read_dir(roots)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if name == current || !path.is_dir() || lock_of(roots, name)?.try_lock().is_err() {
            continue;
        }
        fs::remove_dir_all(&path)?;
        let disk = roots.join(format!("{name}.{DISK}"));
        if disk.exists() {
            fs::remove_file(disk)?;
        }
        fs::remove_file(roots.join(format!("{name}.lock")))?;
    }
    Ok(())
}
