//! What a clone changed in its image's memory, as a suspend keeps it.
//!
//! A page that the guest wrote need not differ from the image's, and mostly differs in a few bytes only: the kernel hands the buffers of a
//! queue out in turn, a few bytes in each; counters and lists lie between what never changes. So pages are compared with the image's, and
//! blocks much smaller than a page are kept. A resume writes them into a fresh clone, whose memory is the image's everywhere else.

use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
};

use serde::{Deserialize, Serialize};

use crate::memory::{Extent, Mapping, PAGE};

/// Size of a block that is kept as a whole, in bytes. A page is a multiple of it.
const BLOCK: usize = 256;
/// Equal blocks between two that differ which are kept along: saying where the second begins would cost no less.
const GAP: usize = 2 * BLOCK;
/// How much is compared and copied at a time, in bytes: a multiple of the page.
const PIECE: u64 = 1 << 20;

/// Bytes that follow one another, in guest memory and in the file of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Offset of the first byte in guest memory.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
}

/// Number of bytes that changes cover.
pub fn changed_bytes(changes: &[Change]) -> u64 {
    changes.iter().map(|change| change.length).sum()
}

/// Writes what differs from the image in the pages that a clone wrote, one change after the other. Nothing, if `stop` said so before the end.
pub fn save(clone: &Mapping, image: &File, out: &mut impl Write, stop: impl Fn() -> bool) -> io::Result<Option<Vec<Change>>> {
    let (mut ours, mut theirs) = (buffer(), buffer());
    let mut changes: Vec<Change> = Vec::new();
    for (start, length) in clone.dirty()?.iter().flat_map(extent_pieces) {
        if stop() {
            return Ok(None);
        }
        let (ours, theirs) = (&mut ours[..index(length)], &mut theirs[..index(length)]);
        clone.read_exact_at(ours, start)?;
        image.read_exact_at(theirs, start)?;
        for range in differences(ours, theirs) {
            let change = Change { start: start + range.start as u64, length: range.len() as u64 };
            match changes.last_mut() {
                Some(last) if last.start + last.length == change.start => last.length += change.length,
                _ => changes.push(change),
            }
            out.write_all(&ours[range])?;
        }
    }
    Ok(Some(changes))
}

/// Puts what [`save`] wrote into a fresh clone of the same image.
pub fn restore(clone: &Mapping, changes: &[Change], saved: &mut impl Read) -> io::Result<()> {
    let mut buffer = buffer();
    for change in changes {
        if change.start.checked_add(change.length).is_none_or(|end| end > clone.bytes()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a change lies outside of the guest's memory"));
        }
        for (start, length) in pieces(change.start, change.length) {
            let piece = &mut buffer[..index(length)];
            saved.read_exact(piece)?;
            clone.write_all_at(piece, start)?;
        }
    }
    Ok(())
}

/// The parts in which `ours` differs from `theirs`: whole blocks, more than [`GAP`] apart.
fn differences(ours: &[u8], theirs: &[u8]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (number, (ours, theirs)) in ours.chunks(BLOCK).zip(theirs.chunks(BLOCK)).enumerate() {
        if ours != theirs {
            let block = number * BLOCK..number * BLOCK + ours.len();
            match ranges.last_mut() {
                Some(last) if block.start - last.end <= GAP => last.end = block.end,
                _ => ranges.push(block),
            }
        }
    }
    ranges
}

fn extent_pieces(extent: &Extent) -> impl Iterator<Item = (u64, u64)> + use<> {
    pieces(extent.first * PAGE, extent.count * PAGE)
}

/// Starts and lengths of what is copied at a time.
fn pieces(start: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start + length;
    (0..length.div_ceil(PIECE)).map(move |number| start + number * PIECE).map(move |piece| (piece, PIECE.min(end - piece)))
}

fn buffer() -> Vec<u8> {
    vec![0; index(PIECE)]
}

fn index(length: u64) -> usize {
    usize::try_from(length).expect("no longer than a piece")
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use nix::sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
    };

    use super::*;
    use crate::memory::{NAME, seal};

    const PAGES: usize = 16;

    /// An image whose bytes are all 1, and a private mapping of it, as a clone's process has.
    struct Clone {
        image: File,
        map: *mut u8,
    }

    impl Clone {
        fn of(image: &[u8]) -> Self {
            let file = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap());
            file.write_all_at(image, 0).unwrap();
            seal(&file).unwrap();
            let length = NonZero::new(image.len()).unwrap();
            // SAFETY: a new private mapping at an address of the kernel's choice; it is only reached through the methods below.
            let map = unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, &file, 0) };
            Self { image: file, map: map.unwrap().cast::<u8>().as_ptr() }
        }

        fn mapping(&self) -> Mapping {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let line = maps.lines().find(|line| line.starts_with(&format!("{:x}-", self.map.addr()))).unwrap();
            assert!(line.contains("/memfd:hearth-image"), "{line}");
            Mapping::at(std::process::id(), self.map.addr() as u64, (PAGES as u64) * PAGE).unwrap()
        }

        fn write(&self, offset: usize, byte: u8) {
            assert!(offset < PAGES * 4096);
            // SAFETY: within the mapping, which lives as long as `self`.
            unsafe { self.map.add(offset).write_volatile(byte) }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes = vec![0; PAGES * 4096];
            self.mapping().read_exact_at(&mut bytes, 0).unwrap();
            bytes
        }
    }

    impl Drop for Clone {
        fn drop(&mut self) {
            // SAFETY: made in `of` with this length; nothing refers to it any more.
            unsafe { munmap(std::ptr::NonNull::new(self.map).unwrap().cast(), PAGES * 4096) }.unwrap();
        }
    }

    fn saved(clone: &Clone) -> (Vec<Change>, Vec<u8>) {
        let mut bytes = Vec::new();
        let changes = save(&clone.mapping(), &clone.image, &mut bytes, || false).unwrap().expect("nobody stopped it");
        (changes, bytes)
    }

    #[test]
    fn what_a_clone_changed_is_kept_and_put_into_another() {
        let image = vec![1; PAGES * 4096];
        let clone = Clone::of(&image);
        assert_eq!(saved(&clone), (vec![], vec![]));
        clone.write(3 * 4096 + 4095, 7);
        clone.write(4 * 4096, 8);
        clone.write(9 * 4096 + 300, 9);
        let (changes, bytes) = saved(&clone);
        let block = BLOCK as u64;
        let expected = [Change { start: 4 * PAGE - block, length: 2 * block }, Change { start: 9 * PAGE + block, length: block }];
        assert_eq!((&changes[..], bytes.len() as u64), (&expected[..], changed_bytes(&changes)));
        assert_eq!((bytes[BLOCK - 1], bytes[BLOCK], bytes[BLOCK + 1]), (7, 8, 1));

        let other = Clone::of(&image);
        restore(&other.mapping(), &changes, &mut bytes.as_slice()).unwrap();
        assert!(other.bytes() == clone.bytes());
        assert_eq!(saved(&other), (changes, bytes), "and is kept again");
    }

    #[test]
    fn pages_that_are_the_image_s_again_are_not_kept() {
        let mut image = vec![0; PAGES * 4096];
        image[4096] = 1;
        let clone = Clone::of(&image);
        clone.write(4096, 0);
        clone.write(8192, 5);
        assert_eq!(saved(&clone).0.len(), 2);
        clone.write(4096, 1);
        clone.write(8192, 0);
        assert_eq!(clone.mapping().dirty().unwrap(), [Extent { first: 1, count: 2 }]);
        assert_eq!(saved(&clone), (vec![], vec![]));
    }

    #[test]
    fn a_save_that_is_stopped_writes_nothing_more_and_a_restore_stays_inside() {
        let clone = Clone::of(&vec![1; PAGES * 4096]);
        clone.write(0, 2);
        let mut bytes = Vec::new();
        assert_eq!(save(&clone.mapping(), &clone.image, &mut bytes, || true).unwrap(), None);
        assert!(bytes.is_empty());
        for outside in [Change { start: 16 * PAGE, length: 1 }, Change { start: u64::MAX, length: 2 }] {
            let error = restore(&clone.mapping(), &[outside], &mut [0_u8; 8].as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn blocks_that_lie_close_are_one_difference() {
        let theirs = [0; 4096];
        let mut ours = theirs;
        assert_eq!(differences(&ours, &theirs), []);
        ours[0] = 1;
        ours[3 * BLOCK] = 1;
        ours[8 * BLOCK] = 1;
        assert_eq!(differences(&ours, &theirs), [0..4 * BLOCK, 8 * BLOCK..9 * BLOCK]);
    }

    #[test]
    fn what_is_long_is_copied_in_pieces() {
        assert_eq!(pieces(256, 2 * PIECE + 1).collect::<Vec<_>>(), [(256, PIECE), (256 + PIECE, PIECE), (256 + 2 * PIECE, 1)]);
        assert_eq!(pieces(5, 0).count(), 0);
    }
}
