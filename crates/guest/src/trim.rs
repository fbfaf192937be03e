//! Makes memory that nobody uses cheap to keep, before a snapshot is taken: caches are dropped, and free pages are filled with zeros, which a
//! snapshot holds as holes. What the application maps stays where it is.
//!
//! The kernel hands out zeroed pages; taking all the free memory that has ever been touched and giving it back leaves zeros. The kernel could
//! zero pages as they are freed (`init_on_free=1`), but would then touch all of the memory at boot, and again while the clones run.

use std::{fs, io, num::NonZero, ptr::NonNull};

use nix::{
    errno::Errno,
    libc::c_void,
    sys::{
        mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap},
        sysinfo::sysinfo,
    },
};

/// How much memory is taken in one go, in bytes.
const STEP: usize = 4 << 20;
/// Bytes that stay free: below some megabytes the kernel begins to throw out mapped files, which clones would have to read again.
const RESERVE: u64 = 16 << 20;

/// Memory could not be trimmed. The snapshot is larger than it could be.
#[derive(Debug, thiserror::Error)]
pub enum TrimError {
    /// caches could not be dropped
    #[error("dropping caches: {0}")]
    Caches(io::Error),
    /// memory could not be taken
    #[error("taking free memory: {0}")]
    Memory(#[from] Errno),
}

/// Trims. `touched` is how many bytes of its memory the machine has ever touched: the rest is zero anyway and shall not be touched now.
pub fn trim(touched: u64) -> Result<(), TrimError> {
    nix::unistd::sync();
    // Clean pages of files that nobody maps, directory entries and inodes.
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(TrimError::Caches)?;
    let memory = sysinfo()?;
    let used = memory.ram_total() - memory.ram_unused();
    let mut taken = Vec::new();
    let mut left = touched.saturating_sub(used);
    while left > 0 && sysinfo()?.ram_unused() > RESERVE + STEP as u64 {
        taken.push(Taken::new()?);
        left = left.saturating_sub(STEP as u64);
    }
    Ok(())
}

/// Some memory, every page of which is there and zero. Dropping it gives it back.
struct Taken(NonNull<c_void>);

impl Taken {
    fn new() -> Result<Self, Errno> {
        let length = NonZero::new(STEP).expect("a constant over zero");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let taken = Self(unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }?);
        // Huge pages would come out of the memory that has stayed in one piece, which is the least likely to have been touched.
        // SAFETY: both only change how the mapping just made is backed.
        unsafe {
            madvise(taken.0, STEP, MmapAdvise::MADV_NOHUGEPAGE)?;
            madvise(taken.0, STEP, MmapAdvise::MADV_POPULATE_WRITE)?;
        }
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: made in `new` with this length; nothing refers to it.
        let unmapped = unsafe { munmap(self.0, STEP) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_taken_is_there_and_zero() {
        let taken = Taken::new().unwrap();
        // SAFETY: the mapping has this many bytes and lives until the end of the test.
        let bytes = unsafe { std::slice::from_raw_parts(taken.0.cast::<u8>().as_ptr(), STEP) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
