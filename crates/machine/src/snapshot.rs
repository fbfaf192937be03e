//! The files of a snapshot, and the manifest that says what they are.
//!
//! A snapshot is a directory, immutable once it has its name: it is written to a temporary directory beside it, synced, given its manifest
//! and renamed last. Its files are never read as a whole on the launch path.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use hearth_guest_protocol::Marker;
use serde::{Deserialize, Serialize};

/// Version of the snapshot directory's layout.
pub const FORMAT: u32 = 1;

/// Guest memory: a sparse raw file of the guest's size; holes are zeros.
pub const MEMORY: &str = "memory";
/// Device state as the engine wrote it.
pub const DEVICE_STATE: &str = "device-state";
/// Raw ext4 image that the machine was booted from.
pub const ROOTFS: &str = "rootfs.img";
/// What the boot wrote over the root file system.
pub const BOOT_OVERLAY: &str = "boot.qcow2";
/// An overlay that holds nothing: copied for each clone.
pub const EMPTY_OVERLAY: &str = "empty.qcow2";
const MANIFEST: &str = "manifest.json";

/// What a snapshot depends on to be launched. All of it must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `qemu`.
    pub engine: String,
    /// Version of the engine and of its machine type.
    pub engine_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// CPU model as the guest sees it.
    pub cpu_model: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} with {} and CPU {}", self.engine, self.engine_version, self.accelerator, self.cpu_model)
    }
}

/// `manifest.json` of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// [`FORMAT`].
    pub format: u32,
    /// What the snapshot can be launched on.
    pub platform: Platform,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Checksum of the guest kit that booted it.
    pub kit: String,
    /// Begins the session of a clone; the one that ended the session before the capture.
    pub marker: Marker,
    /// Bytes of the memory file that are not holes.
    pub memory_bytes: u64,
    /// Bytes of device state.
    pub device_state_bytes: u64,
    /// Bytes of the disk that the boot wrote.
    pub disk_bytes: u64,
    /// SHA-256 of each file's data (holes left out), by name, in hexadecimal. Never checked on the launch path.
    pub sha256: std::collections::BTreeMap<String, String>,
}

/// A snapshot on disk.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// What it says of itself.
    pub manifest: SnapshotManifest,
}

/// A snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// a file of the snapshot is missing or cannot be read
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// the manifest does not parse
    #[error("the manifest {path} does not parse ({reason}): rebuild the image")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// the snapshot has another format
    #[error("the snapshot {path} has format {found}, this version of Hearth reads {FORMAT}: rebuild the image")]
    Format {
        /// The snapshot's directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// a file of the snapshot is not what the manifest says
    #[error("the snapshot {path} is damaged: {reason}; rebuild the image")]
    Damaged {
        /// The snapshot's directory.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// the state that a suspend left cannot be used
    #[error("the suspended state {path} is damaged: {reason}; the MicroVM cannot be resumed")]
    SuspendedDamaged {
        /// The state's directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// the snapshot was made on another platform
    #[error("the snapshot was made by {made}, this host runs {here}: rebuild the image")]
    Platform {
        /// The snapshot's platform.
        made: Box<Platform>,
        /// The host's.
        here: Box<Platform>,
    },
}

impl Snapshot {
    /// Opens a snapshot: reads its manifest and checks that its files are there with the sizes it says.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(|source| SnapshotError::Io { what: format!("reading {}", path.display()), source })?;
        let manifest: SnapshotManifest =
            serde_json::from_slice(&text).map_err(|error| SnapshotError::Manifest { path: path.clone(), reason: error.to_string() })?;
        if manifest.format != FORMAT {
            return Err(SnapshotError::Format { path: dir.to_owned(), found: manifest.format });
        }
        let snapshot = Self { dir: dir.to_owned(), manifest };
        snapshot.expect_size(MEMORY, u64::from(snapshot.manifest.memory_mib) << 20)?;
        snapshot.expect_size(DEVICE_STATE, snapshot.manifest.device_state_bytes)?;
        for name in [ROOTFS, BOOT_OVERLAY, EMPTY_OVERLAY] {
            snapshot.size_of(name)?;
        }
        Ok(snapshot)
    }

    /// Path of one of the snapshot's files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Fails unless the snapshot can be launched on `here`.
    pub fn check_platform(&self, here: &Platform) -> Result<(), SnapshotError> {
        if self.manifest.platform == *here {
            return Ok(());
        }
        Err(SnapshotError::Platform { made: Box::new(self.manifest.platform.clone()), here: Box::new(here.clone()) })
    }

    /// Writes the manifest into `dir`, syncs the directory and gives it its name.
    pub fn publish(dir: &Path, into: &Path, manifest: SnapshotManifest) -> io::Result<Self> {
        let mut file = fs::File::create_new(dir.join(MANIFEST))?;
        file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
        file.sync_all()?;
        fs::File::open(dir)?.sync_all()?;
        fs::rename(dir, into)?;
        if let Some(parent) = into.parent() {
            fs::File::open(parent)?.sync_all()?;
        }
        Ok(Self { dir: into.to_owned(), manifest })
    }

    fn size_of(&self, name: &str) -> Result<u64, SnapshotError> {
        let path = self.file(name);
        let metadata = fs::metadata(&path).map_err(|source| SnapshotError::Io { what: format!("opening {}", path.display()), source })?;
        Ok(metadata.len())
    }

    fn expect_size(&self, name: &str, expected: u64) -> Result<(), SnapshotError> {
        let found = self.size_of(name)?;
        if found == expected {
            return Ok(());
        }
        let reason = format!("{name} has {found} bytes instead of {expected}");
        Err(SnapshotError::Damaged { path: self.dir.clone(), reason })
    }
}
