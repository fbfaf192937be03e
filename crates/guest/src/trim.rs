//! Makes memory that nobody uses cheap to keep, before a snapshot is taken: caches are dropped, and free pages are filled with zeros, which a
//! snapshot holds as holes. What the application maps stays where it is.
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

/// Bytes of mapped files that are given back.
const MAPPED_FILES: u64 = 4 << 20;

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
    // Clean pages of files that nobody maps, directory entries and inodes.
    set("/proc/sys/vm/drop_caches", "3")?;
    reclaim_unused_files();
    let reserves = RESERVES.map(|(path, value)| Changed::new(path, value));
    let taken = take_free_memory(touched);
    for reserve in reserves {
        reserve?.restore()?;
    }
    Ok(taken?)
}

/// Gives back some pages of mapped files, those first that were read only because they lie beside others. A clone reads from its disk again
/// what it needs of them.
fn reclaim_unused_files() {
    // The kernel says so when it found less. Then there was less to find.
    let _ = fs::write(Path::new(cgroup::APP).join("memory.reclaim"), MAPPED_FILES.to_string());
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
    fn memory_that_was_taken_is_there_and_zero() {
        let taken = Taken::new(1 << 20).unwrap();
        // SAFETY: the mapping has this many bytes and lives until the end of the test.
        let bytes = unsafe { std::slice::from_raw_parts(taken.start.cast::<u8>().as_ptr(), taken.length) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
