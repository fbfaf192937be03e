//! Writes the archive format of initramfs images ("newc", cpio(5) and the kernel's `buffer-format.rst`). The same input gives the same
//! bytes: owners are root, times are zero, inodes count up.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const ALIGNMENT: usize = 4;

/// An archive that is being written.
pub struct Writer<W> {
    inner: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// Begins an archive.
    pub fn new(inner: W) -> Self {
        Self { inner, inode: 0 }
    }

    /// Adds a directory that anybody may read. Its parents must have been added.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, 2, &[])
    }

    /// Adds a file with these permissions.
    pub fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | permissions, 1, contents)
    }

    /// Ends the archive and returns what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.write("TRAILER!!!", 0, 0, 1, &[])?;
        Ok(self.inner)
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, contents: &[u8]) -> io::Result<()> {
        self.inode += 1;
        self.write(name, self.inode, mode, links, contents)
    }

    fn write(&mut self, name: &str, inode: u32, mode: u32, links: u32, contents: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} does not fit into a cpio archive"));
        let size = u32::try_from(contents.len()).map_err(too_long)?;
        // The terminating zero byte counts.
        let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
        let mut header = String::from("070701");
        // Inode, mode, owner, group, links, time, size, four device numbers, size of the name, checksum.
        for field in [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            header.push_str(&format!("{field:08x}"));
        }
        self.padded(&[header.as_bytes(), name.as_bytes(), b"\0"].concat())?;
        self.padded(contents)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_all(bytes)?;
        self.inner.write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_documented_layout() {
        let mut archive = Writer::new(Vec::new());
        archive.directory("d").unwrap();
        archive.file("d/f", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let fields = |inode: u32, mode: &str, links: u32, size: u32, name: u32| {
            let zero = "00000000";
            format!("070701{inode:08x}{mode}{zero}{zero}{links:08x}{zero}{size:08x}{zero}{zero}{zero}{zero}{name:08x}{zero}")
        };
        let expected = [
            fields(1, "000041ed", 2, 0, 2) + "d\0",
            fields(2, "000081a4", 1, 5, 4) + "d/f\0\0\0" + "hello\0\0\0",
            fields(0, "00000000", 1, 0, 11) + "TRAILER!!!\0" + "\0\0\0",
        ];
        assert_eq!(String::from_utf8(bytes).unwrap(), expected.concat());
    }
}
