//! What a suspend leaves in a machine's directory, and a resume takes from there.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use hearth_guest_protocol::Marker;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{NEXT_STATE, OVERLAY};
use crate::{
    changes::{self, Change},
    engine::Suspended,
    memory::Mapping,
    snapshot::{DEVICE_STATE, SnapshotError},
};

/// Version of the directory's layout.
const FORMAT: u32 = 2;

/// What a suspend leaves in a machine's directory.
#[derive(Debug)]
pub struct SuspendedState {
    dir: PathBuf,
    manifest: SuspendedManifest,
}

#[derive(Debug, Serialize, Deserialize)]
struct SuspendedManifest {
    format: u32,
    generation: u64,
    /// Begins the next session.
    marker: Marker,
    /// What differs from the snapshot, in the order in which it is in the file of changes.
    changes: Vec<Change>,
    device_state_bytes: u64,
}

const SUSPENDED: &str = "suspended";
const SUSPENDED_MANIFEST: &str = "manifest.json";
const CHANGES: &str = "changes";

impl SuspendedState {
    /// Writes the state of a stopped machine. It has its name when all of it is on disk. Nothing, if it was cancelled in time.
    pub fn write(
        dir: &Path,
        mapping: &Mapping,
        image: &File,
        marker: Marker,
        generation: u64,
        cancel: &CancellationToken,
    ) -> io::Result<Option<Suspended>> {
        let draft = dir.join("suspended.draft");
        let _ = fs::remove_dir_all(&draft);
        fs::create_dir(&draft)?;
        let mut file = BufWriter::with_capacity(1 << 20, File::create_new(draft.join(CHANGES))?);
        let saved = changes::save(mapping, image, &mut file, || cancel.is_cancelled())?;
        if saved.is_some() {
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
        }
        // From here on the rest is faster than starting over.
        let Some(changes) = saved.filter(|_| !cancel.is_cancelled()) else {
            fs::remove_dir_all(&draft)?;
            return Ok(None);
        };
        let state = File::open(dir.join(NEXT_STATE))?;
        state.sync_data()?;
        // The disk must not be older than the memory that knows it.
        File::open(dir.join(OVERLAY))?.sync_data()?;
        fs::rename(dir.join(NEXT_STATE), draft.join(DEVICE_STATE))?;
        let device_state_bytes = state.metadata()?.len();
        let dirty_bytes = changes::changed_bytes(&changes);
        let manifest = SuspendedManifest { format: FORMAT, generation, marker, changes, device_state_bytes };
        let mut file = File::create_new(draft.join(SUSPENDED_MANIFEST))?;
        file.write_all(&serde_json::to_vec(&manifest)?)?;
        file.sync_data()?;
        fs::rename(&draft, dir.join(SUSPENDED))?;
        File::open(dir)?.sync_all()?;
        Ok(Some(Suspended { dirty_bytes, device_state_bytes }))
    }

    /// Opens what [`SuspendedState::write`] wrote.
    pub fn open(machine_dir: &Path) -> Result<Self, SnapshotError> {
        let dir = machine_dir.join(SUSPENDED);
        let path = dir.join(SUSPENDED_MANIFEST);
        let io_error = |path: &Path, source| SnapshotError::Io { what: format!("opening {}", path.display()), source };
        let text = fs::read(&path).map_err(|source| io_error(&path, source))?;
        let damaged = |reason: String| SnapshotError::SuspendedDamaged { path: dir.clone(), reason };
        let manifest: SuspendedManifest = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(damaged(format!("its format is {}, this version of Hearth reads {FORMAT}", manifest.format)));
        }
        for (name, expected) in [(CHANGES, changes::changed_bytes(&manifest.changes)), (DEVICE_STATE, manifest.device_state_bytes)] {
            let path = dir.join(name);
            let found = fs::metadata(&path).map_err(|source| io_error(&path, source))?.len();
            if found != expected {
                return Err(damaged(format!("{name} has {found} bytes instead of {expected}")));
            }
        }
        Ok(Self { dir, manifest })
    }

    /// What a resume writes into the machine's memory, in bytes.
    pub async fn bytes(machine_dir: &Path) -> u64 {
        // Without it the resume fails, and says why.
        tokio::fs::metadata(machine_dir.join(SUSPENDED).join(CHANGES)).await.map_or(0, |changes| changes.len())
    }

    /// Path of the device state.
    pub fn device_state(&self) -> PathBuf {
        self.dir.join(DEVICE_STATE)
    }

    /// Begins the next session.
    pub fn marker(&self) -> Marker {
        self.manifest.marker
    }

    /// Writes the changes into a fresh clone.
    pub fn restore(&self, mapping: &Mapping) -> io::Result<()> {
        let saved = File::open(self.dir.join(CHANGES))?;
        changes::restore(mapping, &self.manifest.changes, &mut BufReader::with_capacity(1 << 20, saved))
    }

    /// Removes the state, if there is one. It is invalid from the first moment, even if not all of it can be removed.
    pub fn discard(machine_dir: &Path) -> io::Result<()> {
        let stale = machine_dir.join("suspended.stale");
        match fs::rename(machine_dir.join(SUSPENDED), &stale) {
            Ok(()) => fs::remove_dir_all(&stale),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}
