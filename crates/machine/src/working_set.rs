//! The working set of a snapshot: the pages that a clone touched until its application had checked that it works.
//!
//! It lies beside the snapshot, which is complete without it: whoever finds none, or one that it cannot read, does without. It serves reads
//! of the memory file from a cold disk: those pages are asked for all at once, before the file is read from front to back.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::Path,
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use crate::memory::{self, Extent, Mapping, PAGE};

/// Version of the file's layout.
const FORMAT: u32 = 1;
const FILE: &str = "working-set";
const DRAFT: &str = ".working-set.draft";

/// Pages of a snapshot's memory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    format: u32,
    extents: Vec<Extent>,
}

impl WorkingSet {
    /// Writes down what a clone has touched so far, and returns its bytes.
    pub fn record(snapshot_dir: &Path, mapping: &Mapping) -> io::Result<u64> {
        let set = Self { format: FORMAT, extents: mapping.touched()? };
        let draft = snapshot_dir.join(DRAFT);
        fs::write(&draft, serde_json::to_vec(&set)?)?;
        // Not synced: what a crash leaves of it need not be readable.
        fs::rename(&draft, snapshot_dir.join(FILE))?;
        Ok(memory::extent_bytes(&set.extents))
    }

    /// The working set of a snapshot, if it has one.
    pub fn open(snapshot_dir: &Path) -> Option<Self> {
        let text = fs::read(snapshot_dir.join(FILE)).ok()?;
        match serde_json::from_slice::<Self>(&text) {
            Ok(set) if set.format == FORMAT => Some(set),
            Ok(set) => {
                tracing::debug!(dir = %snapshot_dir.display(), set.format, "a working set of another format is not used");
                None
            }
            Err(error) => {
                tracing::warn!(dir = %snapshot_dir.display(), %error, "a working set cannot be read and is not used");
                None
            }
        }
    }

    /// Has the kernel begin to read these pages of a memory file.
    pub fn read_ahead(&self, memory: &File) {
        for extent in &self.extents {
            let (Some(offset), Some(length)) = (offset(extent.first), offset(extent.count)) else { continue };
            // Advice that is not taken changes nothing but the time that the reads take.
            let _ = posix_fadvise(memory.as_fd(), offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        }
    }
}

fn offset(pages: u64) -> Option<i64> {
    i64::try_from(pages.checked_mul(PAGE)?).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_a_clone_reads_and_writes_is_its_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        // The kernel maps up to 16 neighbours of a page that is read: a file that is large enough shows that it does not map all.
        const PAGES: usize = 1024;
        File::create_new(&path).unwrap().write_all_at(&vec![1; PAGES * 4096], 0).unwrap();
        let copy = memory::sealed_copy(&path, PAGES as u64 * PAGE, None).unwrap();
        let length = std::num::NonZero::new(PAGES * 4096).unwrap();
        let flags = (nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE, nix::sys::mman::MapFlags::MAP_PRIVATE);
        // SAFETY: a new private mapping at an address of the kernel's choice; it is only reached through the raw pointer below.
        let map = unsafe { nix::sys::mman::mmap(None, length, flags.0, flags.1, &copy, 0) }.unwrap().cast::<u8>();
        // SAFETY: both offsets lie within the mapping.
        let read = unsafe {
            map.add(900 * 4096).write(7);
            map.add(3 * 4096).read_volatile()
        };
        assert_eq!(read, 1);

        let mapping = Mapping::of(std::process::id(), PAGES as u64 * PAGE).unwrap();
        let bytes = WorkingSet::record(dir.path(), &mapping).unwrap();
        // SAFETY: the mapping was made above with this length and nothing refers to it any more.
        unsafe { nix::sys::mman::munmap(map.cast(), PAGES * 4096) }.unwrap();
        let set = WorkingSet::open(dir.path()).unwrap();
        let touched = |page| set.extents.iter().any(|extent| (extent.first..extent.first + extent.count).contains(&page));
        assert!(touched(3) && touched(900) && !touched(500), "{set:?}");
        assert!((2 * PAGE..64 * PAGE).contains(&bytes), "{bytes}");
        set.read_ahead(&File::open(&path).unwrap());
    }

    #[test]
    fn a_snapshot_does_without_one_that_is_missing_new_or_damaged() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(WorkingSet::open(dir.path()), None);
        for text in ["", "{", r#"{"format": 2, "extents": []}"#] {
            fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(WorkingSet::open(dir.path()), None, "{text}");
        }
        fs::write(dir.path().join(FILE), r#"{"format": 1, "extents": [{"first": 18446744073709551615, "count": 9}]}"#).unwrap();
        WorkingSet::open(dir.path()).unwrap().read_ahead(&File::open("/dev/null").unwrap());
    }
}
