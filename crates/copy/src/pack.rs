//! Files into a tar stream.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use tar::{Builder, EntryType, Header};

use crate::{CopyError, failed};

/// `st_blocks` counts these.
const BLOCK_BYTES: u64 = 512;

/// Writes a file, a directory with all that is in it, or a symbolic link as `name`. Tells `skipped` what was left out.
pub fn pack(path: &Path, name: &Path, out: impl Write, skipped: &mut dyn FnMut(String)) -> Result<(), CopyError> {
    let mut tar = Builder::new(out);
    tar.follow_symlinks(false);
    add(&mut tar, path, name, skipped)?;
    tar.into_inner().and_then(|mut out| out.flush()).map_err(failed("finishing the copy of", path))
}

fn add(tar: &mut Builder<impl Write>, path: &Path, name: &Path, skipped: &mut dyn FnMut(String)) -> Result<(), CopyError> {
    let metadata = fs::symlink_metadata(path).map_err(failed("looking at", path))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        tar.append_path_with_name(path, name).map_err(failed("copying", path))?;
        let mut children: Vec<_> = fs::read_dir(path).and_then(Iterator::collect).map_err(failed("listing", path))?;
        children.sort_by_key(fs::DirEntry::file_name);
        for child in children {
            let file_name = child.file_name();
            match add(tar, &child.path(), &name.join(file_name), skipped) {
                // It has gone since the directory was listed.
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    } else if kind.is_file() && metadata.blocks() * BLOCK_BYTES >= metadata.len() {
        add_file(tar, path, name, &metadata)
    } else if kind.is_symlink() {
        add_link(tar, path, name, &metadata)
    } else if kind.is_file() {
        // Files with holes keep them on the way.
        tar.append_path_with_name(path, name).map_err(failed("copying", path))
    } else {
        let what = if kind.is_fifo() {
            "a pipe"
        } else if kind.is_socket() {
            "a socket"
        } else {
            "a device"
        };
        skipped(format!("{}: {what}", path.display()));
        Ok(())
    }
}

/// Byte by byte as it is: the library would tidy the target up.
fn add_link(tar: &mut Builder<impl Write>, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), CopyError> {
    let target = fs::read_link(path).map_err(failed("reading the link", path))?;
    let mut header = Header::new_gnu();
    header.set_metadata(metadata);
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    let added = match header.set_link_name_literal(target.as_os_str().as_bytes()) {
        Ok(()) => tar.append_data(&mut header, name, io::empty()),
        // Too long for the header.
        Err(_) => tar.append_link(&mut header, name, &target),
    };
    added.map_err(failed("copying", path))
}

/// Exactly as many bytes as announced, whatever happens to the file meanwhile.
fn add_file(tar: &mut Builder<impl Write>, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), CopyError> {
    let file = File::open(path).map_err(failed("opening", path))?;
    let mut header = Header::new_gnu();
    header.set_metadata(metadata);
    header.set_entry_type(EntryType::Regular);
    let content = file.chain(io::repeat(0)).take(metadata.len());
    tar.append_data(&mut header, name, content).map_err(failed("copying", path))
}
