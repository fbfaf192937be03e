//! A tar stream into files.

use std::{
    io::{self, Read},
    path::Path,
};

use tar::{Archive, EntryType};

use crate::{CopyError, failed};

/// Unpacks a stream into an existing directory, to the stream's end. Tells `skipped` what was left out. With `archive`, owners and all mode
/// bits are the stream's; without, the files are this process's and have neither set-user-id nor set-group-id nor sticky bits.
pub fn unpack(input: impl Read, into: &Path, archive: bool, skipped: &mut dyn FnMut(String)) -> Result<(), CopyError> {
    let mut tar = Archive::new(input);
    tar.set_preserve_permissions(archive);
    tar.set_preserve_ownerships(archive);
    tar.set_overwrite(true);
    // Modes come last: a directory that may not be written to must be filled first.
    let mut directories = Vec::new();
    for entry in tar.entries().map_err(failed("reading the copy for", into))? {
        let mut entry = entry.map_err(failed("reading the copy for", into))?;
        let name = entry.path().map_err(failed("reading the copy for", into))?.into_owned();
        match entry.header().entry_type() {
            EntryType::Directory => {
                directories.push(entry);
                continue;
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                skipped(format!("{}: a device or a pipe", name.display()));
                continue;
            }
            _ => {}
        }
        if !entry.unpack_in(into).map_err(failed("writing", &into.join(&name)))? {
            skipped(format!("{}: outside of {}", name.display(), into.display()));
        }
    }
    // The innermost first, so that what is outside can still be passed.
    for mut directory in directories.into_iter().rev() {
        let path = into.join(directory.path().unwrap_or_default());
        directory.unpack_in(into).map_err(failed("making", &path))?;
    }
    io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(failed("reading the copy for", into))?;
    Ok(())
}
