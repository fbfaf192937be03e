//! Makes memory that nobody uses cheap to keep, before a snapshot is taken: what has been read from files and not used for longest is given
//! back, and free pages are filled with zeros, which a snapshot holds as holes.
//!
//! The page cache holds what the application has read since its start. The pages that it maps are its program and libraries: a clone that
//! lacked them would read them from its disk, one after another, before its first answer. Other pages are files that it has read, the last ones
//! perhaps for a request that warmed it up. All of the former stay, and as much of the latter as is read quickly.
//!
//! The kernel hands out zeroed pages; taking the free memory and giving it back leaves zeros. The kernel could zero pages as they are freed
//! (`init_on_free=1`), but would then touch all of the memory at every boot, and write to it on behalf of every clone.

use std::{fs, io, num::NonZero, path::Path, ptr::NonNull};

use nix::{
    errno::Errno,
    libc::c_void,
    sys::{
        mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap},
        sysinfo::sysinfo,
    },
};

use crate::cgroup;

/// How much memory is taken in one go, in bytes: much while there is much, then little, so that nearly all of it is found.
const LARGE_STEP: u64 = 32 << 20;
const SMALL_STEP: u64 = 256 << 10;
/// Bytes that stay free: with less, the kernel begins to throw out mapped files, which clones would have to read again. It is more than the
/// settings below have the kernel keep, so that something is left for what cannot wait.
const RESERVE: u64 = 2 << 20;
/// Bytes taken beyond those that have been used before. Memory is handed out in no order that tells the two apart, and what is taken is
/// the host's memory until the snapshot has been written.
const BEYOND: u64 = 2 << 30;

/// Bytes of files that stay in the page cache although no process maps them.
const UNMAPPED_FILES: u64 = 32 << 20;

/// What the kernel keeps free: for those who can use no other zone, for those who cannot wait, and for time to find more. Little of it, for
/// a moment.
const RESERVES: [(&str, &str); 3] = [
    ("/proc/sys/vm/lowmem_reserve_ratio", "0 0 0 0"),
    ("/proc/sys/vm/min_free_kbytes", "512"),
    ("/proc/sys/vm/watermark_scale_factor", "1"),
];

/// Memory could not be trimmed. The snapshot is larger than it could be.
#[derive(Debug, thiserror::Error)]
pub enum TrimError {
    /// a setting of the kernel could not be changed
    #[error("trimming memory: {path}: {error}")]
    Setting {
        /// Which file.
        path: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
    /// memory could not be taken
    #[error("taking free memory: {0}")]
    Memory(#[from] Errno),
}

/// Trims. `touched` is how many bytes of its memory the machine has touched so far.
pub fn trim(touched: u64) -> Result<(), TrimError> {
    nix::unistd::sync();
    reclaim_files(Path::new(cgroup::APP));
    let reserves = RESERVES.map(|(path, value)| Changed::new(path, value));
    let taken = take_free_memory(touched);
    for reserve in reserves {
        reserve?.restore()?;
    }
    Ok(taken?)
}

/// Gives back what a control group has in the page cache beyond [`UNMAPPED_FILES`] and the pages that are mapped. The kernel begins with pages
/// that were read once, the oldest first, and takes mapped ones only when they have not been used for long.
fn reclaim_files(group: &Path) {
    let excess = fs::read_to_string(group.join("memory.stat")).map_or(0, |stat| unmapped_bytes(&stat).saturating_sub(UNMAPPED_FILES));
    if excess > 0 {
        // The kernel says so when it found less. Then there was less to find.
        let _ = fs::write(group.join("memory.reclaim"), excess.to_string());
    }
}

/// Bytes of files in the page cache that no process maps, by a control group's `memory.stat`.
fn unmapped_bytes(stat: &str) -> u64 {
    let bytes = |name| cgroup::counter(stat, name);
    // Shared memory is counted as files, but cannot be read again from anywhere.
    bytes("file").saturating_sub(bytes("file_mapped")).saturating_sub(bytes("shmem"))
}

/// A setting of the kernel that has another value for a while.
struct Changed {
    path: &'static str,
    before: String,
}

impl Changed {
    fn new(path: &'static str, value: &str) -> Result<Self, TrimError> {
        let before = fs::read_to_string(path).map_err(|error| TrimError::Setting { path, error })?;
        set(path, value)?;
        Ok(Self { path, before })
    }

    fn restore(self) -> Result<(), TrimError> {
        set(self.path, &self.before)
    }
}

fn take_free_memory(touched: u64) -> Result<(), Errno> {
    let memory = sysinfo()?;
    let used = memory.ram_total() - memory.ram_unused();
    let mut left = touched.saturating_sub(used) + BEYOND;
    let mut taken = Vec::new();
    while left > 0 {
        let step = match sysinfo()?.ram_unused() {
            free if free > RESERVE + 2 * LARGE_STEP => LARGE_STEP,
            free if free > RESERVE => SMALL_STEP,
            _ => break,
        };
        taken.push(Taken::new(step.min(left))?);
        left = left.saturating_sub(step);
    }
    Ok(())
}

fn set(path: &'static str, value: &str) -> Result<(), TrimError> {
    fs::write(path, value).map_err(|error| TrimError::Setting { path, error })
}

/// Some memory, every page of which is there and zero. Dropping it gives it back.
struct Taken {
    start: NonNull<c_void>,
    length: usize,
}

impl Taken {
    fn new(length: u64) -> Result<Self, Errno> {
        let length = usize::try_from(length).ok().and_then(NonZero::new).ok_or(Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }?;
        let taken = Self { start, length: length.get() };
        // SAFETY: only has the pages of the mapping just made filled in.
        unsafe { madvise(start, taken.length, MmapAdvise::MADV_POPULATE_WRITE) }?;
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: made in `new` with this length; nothing refers to it.
        let unmapped = unsafe { munmap(self.start, self.length) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmapped_bytes_leave_out_programs_and_shared_memory() {
        let stat = "anon 31236096\nfile 25559040\nkernel 1818624\nshmem 1048576\nfile_mapped 10391552\nfile_dirty 0\n";
        assert_eq!(unmapped_bytes(stat), 25_559_040 - 10_391_552 - 1_048_576);
        assert_eq!(unmapped_bytes("file 4096\nfile_mapped 4096\nshmem 4096\n"), 0);
        assert_eq!(unmapped_bytes(""), 0);
    }

    #[test]
    fn reclaim_files_asks_for_what_is_too_much() {
        let group = tempfile::tempdir().unwrap();
        let asked = || fs::read_to_string(group.path().join("memory.reclaim")).ok();
        for (file, expected) in [(UNMAPPED_FILES, None), (UNMAPPED_FILES + 4096 + 512, Some("512"))] {
            fs::write(group.path().join("memory.stat"), format!("file {file}\nfile_mapped 4096\nshmem 0\n")).unwrap();
            reclaim_files(group.path());
            assert_eq!(asked().as_deref(), expected);
        }
    }

    #[test]
    fn memory_that_was_taken_is_there_and_zero() {
        let taken = Taken::new(1 << 20).unwrap();
        // SAFETY: the mapping has this many bytes and lives until the end of the test.
        let bytes = unsafe { std::slice::from_raw_parts(taken.start.cast::<u8>().as_ptr(), taken.length) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
