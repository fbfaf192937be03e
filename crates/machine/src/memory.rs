//! Guest memory outside of the guest: sealed copies that clones map, and the pages in which a clone differs from them.
//!
//! A clone maps its image's memory privately: what it writes becomes anonymous memory of its process, what it only reads stays shared.
//! `/proc/PID/pagemap` tells the two apart, so a suspend looks only at what the guest wrote since the image was captured.

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
};

use nix::{
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{Whence, lseek64},
};
use serde::{Deserialize, Serialize};

use crate::working_set::WorkingSet;

/// Size of a guest page, in bytes.
pub const PAGE: u64 = 4096;

/// Pages that follow one another in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Index of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

/// Name of anonymous files with an image's memory, as `/proc/PID/maps` shows it after `/memfd:`.
pub const NAME: &CStr = c"hearth-image";

/// Copies a memory file into an anonymous file that nobody can change any more. Holes stay holes. What is known to be needed is read ahead.
pub fn sealed_copy(path: &Path, size: u64, working_set: Option<&WorkingSet>) -> io::Result<File> {
    let mut copy = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    copy.set_len(size)?;
    let mut memory = File::open(path)?;
    if let Some(set) = working_set {
        set.read_ahead(&memory);
    }
    for (start, end) in data_ranges(&memory)? {
        memory.seek(SeekFrom::Start(start))?;
        copy.seek(SeekFrom::Start(start))?;
        io::copy(&mut Read::by_ref(&mut memory).take(end.min(size) - start), &mut copy)?;
    }
    seal(&copy)?;
    Ok(copy)
}

/// Makes an anonymous file immutable for good. Fails while somebody maps it shared and writable.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

/// Writes what a file of guest memory holds to a new file, and returns the number of bytes. Pages of zeros become holes, in both files.
pub fn copy_data(memory: &File, path: &Path) -> io::Result<u64> {
    let copy = File::create_new(path)?;
    copy.set_len(memory.metadata()?.len())?;
    let mut page = [0; PAGE as usize];
    let mut written = 0;
    for (start, end) in data_ranges(memory)? {
        let mut zeros = start;
        for offset in (start..end).step_by(page.len()) {
            memory.read_exact_at(&mut page, offset)?;
            if page.iter().any(|byte| *byte != 0) {
                copy.write_all_at(&page, offset)?;
                written += PAGE;
                punch(memory, zeros, offset)?;
                zeros = offset + PAGE;
            }
        }
        punch(memory, zeros, end)?;
    }
    Ok(written)
}

/// Makes a part of a file a hole.
fn punch(file: &File, start: u64, end: u64) -> io::Result<()> {
    if start < end {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, flags, start.cast_signed(), (end - start).cast_signed())?;
    }
    Ok(())
}

/// The parts of a file that are not holes, as start and end offsets.
pub fn data_ranges(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut position = 0;
    loop {
        let start = match lseek64(file.as_fd(), position, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::errno::Errno::ENXIO) => return Ok(ranges),
            Err(error) => return Err(error.into()),
        };
        let end = lseek64(file.as_fd(), start, Whence::SeekHole)?;
        ranges.push((start.cast_unsigned(), end.cast_unsigned()));
        position = end;
    }
}

/// Bytes of memory or disk that a file takes up.
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(file.metadata()?.blocks() * 512)
}

/// Bytes of a file that are not holes.
pub fn data_bytes(path: &Path) -> io::Result<u64> {
    Ok(data_ranges(&File::open(path)?)?.into_iter().map(|(start, end)| end - start).sum())
}

/// A clone's guest memory as its process maps it.
#[derive(Debug)]
pub struct Mapping {
    memory: File,
    start: u64,
    bytes: u64,
    pid: u32,
}

impl Mapping {
    /// Finds the mapping of `bytes` bytes of a sealed copy in a process. The process must be held by the caller: a pid that is reused in
    /// between would name another one.
    pub fn of(pid: u32, bytes: u64) -> io::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let start = find_mapping(&maps, "/memfd:hearth-image", bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("process {pid} does not map {bytes} bytes of its image's memory"))
        })?;
        Self::at(pid, start, bytes)
    }

    /// The mapping at an address.
    pub(crate) fn at(pid: u32, start: u64, bytes: u64) -> io::Result<Self> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { memory, start, bytes, pid })
    }

    /// Pages that the guest wrote since it was cloned.
    pub fn dirty(&self) -> io::Result<Vec<Extent>> {
        self.pages(is_dirty)
    }

    /// Pages that the guest read or wrote since it was cloned, and neighbours that the host's kernel mapped along with them.
    pub fn touched(&self) -> io::Result<Vec<Extent>> {
        self.pages(is_touched)
    }

    /// Pages whose entry of pagemap(5) is such.
    fn pages(&self, such: impl Fn(u64) -> bool) -> io::Result<Vec<Extent>> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut entries = vec![0; 1 << 20];
        let (mut page, count) = (0, self.bytes / PAGE);
        while page < count {
            let batch = (count - page).min(entries.len() as u64 / 8);
            let batch_bytes = usize::try_from(batch * 8).expect("a batch is at most the buffer");
            pagemap.read_exact_at(&mut entries[..batch_bytes], (self.start / PAGE + page) * 8)?;
            for entry in entries[..batch_bytes].chunks_exact(8) {
                if such(u64::from_ne_bytes(entry.try_into().expect("chunks of eight bytes"))) {
                    match extents.last_mut() {
                        Some(last) if last.first + last.count == page => last.count += 1,
                        _ => extents.push(Extent { first: page, count: 1 }),
                    }
                }
                page += 1;
            }
        }
        Ok(extents)
    }

    /// Number of bytes that are mapped.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the guest's memory at an offset within it.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_exact_at(buffer, self.start + offset)
    }

    /// Writes the guest's memory at an offset within it.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.memory.write_all_at(bytes, self.start + offset)
    }
}

/// Number of bytes that extents cover.
pub fn extent_bytes(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.count * PAGE).sum()
}

/// Bits of an entry of pagemap(5).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Present or swapped out.
fn is_touched(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0
}

/// The same, and anonymous memory.
fn is_dirty(entry: u64) -> bool {
    is_touched(entry) && entry & FILE_OR_SHARED == 0
}

/// Start of the mappings of `name` that follow one another and cover `bytes`.
fn find_mapping(maps: &str, name: &str, bytes: u64) -> Option<u64> {
    let mut run: Option<(u64, u64)> = None;
    for line in maps.lines().filter(|line| line.contains(name)) {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        run = match run {
            Some((first, last)) if last == start => Some((first, end)),
            _ => Some((start, end)),
        };
        if let Some((first, last)) = run
            && last - first == bytes
        {
            return Some(first);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_anonymous_pages_are_dirty() {
        assert!(is_dirty(1 << 63));
        assert!(is_dirty(1 << 62));
        assert!(!is_dirty(1 << 63 | 1 << 61));
        assert!(!is_dirty(0));
    }

    #[test]
    fn a_split_mapping_is_found_whole() {
        let maps = "7f0000000000-7f0000001000 rw-p 0 00:01 5 /memfd:hearth-image (deleted)\n\
                    7f0000001000-7f0000004000 rw-p 1000 00:01 5 /memfd:hearth-image (deleted)\n\
                    7f0000004000-7f0000005000 rw-p 0 00:00 0\n";
        assert_eq!(find_mapping(maps, "/memfd:hearth-image", 0x4000), Some(0x7f00_0000_0000));
        assert_eq!(find_mapping(maps, "/memfd:hearth-image", 0x5000), None);
    }

    #[test]
    fn a_sealed_copy_keeps_holes_and_refuses_writes() {
        let path = std::env::temp_dir().join(format!("hearth-memory-{}", uuid::Uuid::new_v4()));
        let file = File::create_new(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"guest", 1 << 19).unwrap();
        let copy = sealed_copy(&path, 1 << 20, None).unwrap();
        let mut text = [0; 5];
        copy.read_exact_at(&mut text, 1 << 19).unwrap();
        assert_eq!(&text, b"guest");
        assert_eq!(data_ranges(&copy).unwrap().len(), 1);
        assert_eq!(copy.write_at(b"x", 0).unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
        assert_eq!(data_bytes(&path).unwrap(), 4096);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn pages_of_zeros_are_holes_in_a_snapshot_and_take_no_memory() {
        let memory = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(64 * PAGE).unwrap();
        memory.write_all_at(&vec![0; 40 * 4096], 8 * PAGE).unwrap();
        for page in [9, 10, 30] {
            memory.write_all_at(b"guest", page * PAGE).unwrap();
        }
        assert_eq!(allocated_bytes(&memory).unwrap(), 40 * PAGE);
        let path = std::env::temp_dir().join(format!("hearth-memory-{}", uuid::Uuid::new_v4()));
        assert_eq!(copy_data(&memory, &path).unwrap(), 3 * PAGE);
        assert_eq!((data_bytes(&path).unwrap(), allocated_bytes(&memory).unwrap()), (3 * PAGE, 3 * PAGE));
        let mut text = [0; 5];
        for file in [&memory, &File::open(&path).unwrap()] {
            file.read_exact_at(&mut text, 30 * PAGE).unwrap();
            assert_eq!(&text, b"guest");
        }
        fs::remove_file(&path).unwrap();
    }
}
