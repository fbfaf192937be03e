//! Names of groups and streams as names of directories.
//!
//! Everything but letters, digits, `-`, `_` and inner dots becomes `%XX`. What is longer than a file name may be is cut into directories in
//! each other, of which all but the innermost end with `~`.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Longest name of a directory, in bytes (limits.h NAME_MAX is 255).
const PIECE: usize = 200;
const CONTINUED: char = '~';

/// The directory in `parent` that stands for a name.
pub(super) fn dir(parent: &Path, name: &str) -> PathBuf {
    let encoded = encode(name);
    let mut dir = parent.to_owned();
    let mut rest = encoded.as_str();
    // Encoded names are ASCII: every index is a boundary.
    while rest.len() > PIECE {
        let (piece, more) = rest.split_at(PIECE);
        dir.push(format!("{piece}{CONTINUED}"));
        rest = more;
    }
    dir.push(rest);
    dir
}

/// What stands in `parent`: names and their directories, by name.
pub(super) fn list(parent: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    collect(parent, "", &mut found)?;
    found.sort();
    Ok(found)
}

fn collect(parent: &Path, before: &str, found: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Some(piece) = entry.file_name().to_str().map(|piece| format!("{before}{piece}")) else { continue };
        match piece.strip_suffix(CONTINUED) {
            Some(piece) => collect(&entry.path(), piece, found)?,
            None => found.extend(decode(&piece).map(|name| (name, entry.path()))),
        }
    }
    Ok(())
}

/// Removes the directories of a name that hold nothing any more, up to `parent`, which stays.
pub(super) fn prune(dir: &Path, parent: &Path) {
    let mut dir = Some(dir);
    while let Some(empty) = dir.filter(|dir| *dir != parent) {
        // Fails while there is something in it, which is what we want.
        if std::fs::remove_dir(empty).is_err() {
            return;
        }
        dir = empty.parent();
    }
}

fn encode(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') || (byte == b'.' && index > 0) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_file_system() {
        let long = "ü/".repeat(256);
        let names = ["/aws/lambda-microvms/demo", "2025/12/31[1.0]microvm-x", "..", ".", "%", "ü", "a~", &long];
        let parent = tempfile::tempdir().unwrap();
        for name in names {
            let dir = dir(parent.path(), name);
            assert!(dir.starts_with(parent.path()) && dir != parent.path(), "{}", dir.display());
            std::fs::create_dir_all(dir).unwrap();
        }
        let mut expected = names.map(str::to_owned);
        expected.sort();
        let found = list(parent.path()).unwrap();
        assert_eq!(found.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), expected);
        for (_, dir) in found {
            prune(&dir, parent.path());
        }
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
