//! Intake of the zip that holds a Dockerfile and its context. Its author is not trusted.
//!
//! The archive is judged as a whole before anything is written ([`Plan`]). Then directories and files are made, and symbolic links last, so
//! that nothing can ever be written through one. What the headers declare about sizes is not believed: bytes are counted as they come out.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, BufReader, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};
use zip::{ZipArchive, read::ZipFile, result::ZipError};

use crate::{
    ArchiveLimits,
    process::{Stop, Stopped},
};

/// Longest component of a path, in bytes (NAME_MAX).
const MAX_COMPONENT: usize = 255;
/// Longest path inside the archive, in bytes. Leaves room for the work directory below PATH_MAX.
const MAX_PATH: usize = 2048;
/// Longest target of a symbolic link, in bytes.
const MAX_TARGET: u64 = 2048;

/// An archive could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    #[error("no Dockerfile at the root")]
    DockerfileNotFound,
    #[error("{0}")]
    Invalid(String),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Unpacks `archive` into the new directory `context`. Blocks.
pub(crate) fn unpack(archive: &Path, context: &Path, limits: ArchiveLimits, stop: &Stop) -> Result<(), ArchiveError> {
    let file = File::open(archive).map_err(|source| io_error(format!("opening {}", archive.display()), source))?;
    let bytes = file.metadata().map_err(|source| io_error(format!("reading {}", archive.display()), source))?.len();
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(zip_error)?;
    let plan = Plan::of(&mut zip, bytes, limits)?;
    plan.carry_out(&mut zip, context, limits, stop)?;
    match fs::metadata(context.join("Dockerfile")) {
        Ok(found) if found.is_file() => Ok(()),
        _ => Err(ArchiveError::DockerfileNotFound),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Link,
}

/// One path of the archive.
#[derive(Debug, Clone, Copy)]
struct Node {
    kind: Kind,
    mode: u32,
    /// Position in the archive; none for a directory that only the paths below it imply.
    index: Option<usize>,
}

/// What unpacking will make: paths relative to the context, parents before their children.
#[derive(Debug, Default)]
struct Plan(BTreeMap<PathBuf, Node>);

impl Plan {
    fn of(zip: &mut ZipArchive<impl Read + Seek>, archive_bytes: u64, limits: ArchiveLimits) -> Result<Self, ArchiveError> {
        let mut plan = Self::default();
        let mut packed_bytes = 0u64;
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index).map_err(zip_error)?;
            if entry.encrypted() {
                return Err(ArchiveError::Invalid(format!("{} is encrypted", quoted(entry.name()))));
            }
            // Entries that share their bytes would let a small archive keep the inflater busy for days.
            packed_bytes = packed_bytes.saturating_add(entry.compressed_size());
            if packed_bytes > archive_bytes {
                return Err(ArchiveError::Invalid("entries overlap".to_owned()));
            }
            let kind = kind_of(&entry)?;
            plan.add(entry.name(), kind, mode_of(&entry, kind), index, limits.entries)?;
        }
        Ok(plan)
    }

    fn add(&mut self, name: &str, kind: Kind, mode: u32, index: usize, max_entries: u64) -> Result<(), ArchiveError> {
        let path = safe_path(name)?;
        if path.as_os_str().is_empty() {
            // The context itself, as in "./".
            return match kind {
                Kind::Directory => Ok(()),
                _ => Err(ArchiveError::Invalid("an entry has no name".to_owned())),
            };
        }
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            let implied = Node { kind: Kind::Directory, mode: 0o755, index: None };
            if self.0.entry(parent.to_owned()).or_insert(implied).kind != Kind::Directory {
                return Err(ArchiveError::Invalid(format!("{} lies below something that is not a directory", quoted(name))));
            }
        }
        let node = Node { kind, mode, index: Some(index) };
        match self.0.get(&path) {
            Some(Node { kind: Kind::Directory, .. }) if kind == Kind::Directory => {}
            Some(_) => return Err(ArchiveError::Invalid(format!("{} is there twice", quoted(name)))),
            None => {}
        }
        self.0.insert(path, node);
        if self.0.len() as u64 > max_entries {
            return Err(ArchiveError::Invalid(format!("it holds more than {max_entries} files and directories")));
        }
        Ok(())
    }

    fn of_kind(&self, kind: Kind) -> impl DoubleEndedIterator<Item = (&Path, &Node)> {
        self.0.iter().filter(move |(_, node)| node.kind == kind).map(|(path, node)| (path.as_path(), node))
    }

    fn carry_out<R: Read + Seek>(
        &self,
        zip: &mut ZipArchive<R>,
        context: &Path,
        limits: ArchiveLimits,
        stop: &Stop,
    ) -> Result<(), ArchiveError> {
        let mut left = limits.unpacked_bytes;
        make_directory(context)?;
        for (path, _) in self.of_kind(Kind::Directory) {
            stop.check()?;
            make_directory(&context.join(path))?;
        }
        for (path, node) in self.of_kind(Kind::File) {
            let Some(index) = node.index else { continue };
            let mut entry = zip.by_index(index).map_err(zip_error)?;
            let to = context.join(path);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to);
            let mut file = file.map_err(|source| io_error(format!("making {}", quoted(&path.to_string_lossy())), source))?;
            inflate(&mut entry, &mut file, path, &mut left, limits, stop)?;
            // Not through `mode` above, which the process's umask narrows.
            file.set_permissions(Permissions::from_mode(node.mode)).map_err(|source| io_error("setting a mode".to_owned(), source))?;
        }
        for (path, node) in self.of_kind(Kind::Link) {
            stop.check()?;
            let Some(index) = node.index else { continue };
            let target = link_target(&mut zip.by_index(index).map_err(zip_error)?, path)?;
            symlink(&target, context.join(path))
                .map_err(|source| io_error(format!("making {}", quoted(&path.to_string_lossy())), source))?;
        }
        self.confine_links(context)?;
        // Children first: a directory may be closed to its owner.
        for (path, node) in self.of_kind(Kind::Directory).rev() {
            fs::set_permissions(context.join(path), Permissions::from_mode(node.mode))
                .map_err(|source| io_error("setting a mode".to_owned(), source))?;
        }
        Ok(())
    }

    /// Refuses links that lead out of the context. The kernel judges, because a target's text alone does not tell: links lead through links.
    fn confine_links(&self, context: &Path) -> Result<(), ArchiveError> {
        let root = File::open(context).map_err(|source| io_error("opening the context".to_owned(), source))?;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
        for (path, _) in self.of_kind(Kind::Link) {
            match openat2(&root, path, how) {
                // Dangling links and circles lead nowhere.
                Ok(_) | Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => {}
                Err(Errno::EXDEV) => {
                    return Err(ArchiveError::Invalid(format!("the link {} leads out of the archive", quoted(&path.to_string_lossy()))));
                }
                Err(errno) => return Err(io_error("checking a link".to_owned(), errno.into())),
            }
        }
        Ok(())
    }
}

/// The path that a name stands for, relative to the context and free of `.` and `..`. Empty for the context itself.
fn safe_path(name: &str) -> Result<PathBuf, ArchiveError> {
    let refuse = |why: &str| Err(ArchiveError::Invalid(format!("the name {} {why}", quoted(name))));
    if name.starts_with('/') {
        return refuse("is absolute");
    }
    if name.contains('\\') {
        return refuse("has a backslash");
    }
    if name.contains('\0') {
        return refuse("has a zero byte");
    }
    if name.len() > MAX_PATH {
        return refuse("is too long");
    }
    let mut path = PathBuf::new();
    for component in name.split('/') {
        match component {
            "" | "." => {}
            ".." => return refuse("leads out of the archive"),
            _ if component.len() > MAX_COMPONENT => return refuse("is too long"),
            _ if path.as_os_str().is_empty() && is_drive(component) => return refuse("begins with a drive letter"),
            _ => path.push(component),
        }
    }
    Ok(path)
}

/// `C:` or `C:file`.
fn is_drive(component: &str) -> bool {
    matches!(component.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic())
}

fn kind_of(entry: &ZipFile<'_, impl Read>) -> Result<Kind, ArchiveError> {
    const S_IFMT: u32 = 0o170_000;
    let is_directory = entry.name().ends_with('/');
    match entry.unix_mode().unwrap_or(0) & S_IFMT {
        0o040_000 => Ok(Kind::Directory),
        0 | 0o100_000 if is_directory => Ok(Kind::Directory),
        0 | 0o100_000 => Ok(Kind::File),
        0o120_000 if !is_directory => Ok(Kind::Link),
        _ => Err(ArchiveError::Invalid(format!("{} is neither a file nor a directory nor a link", quoted(entry.name())))),
    }
}

/// Permissions, without set-user-id and its like; usual ones where the archive says nothing.
fn mode_of(entry: &ZipFile<'_, impl Read>, kind: Kind) -> u32 {
    let said = entry.unix_mode().unwrap_or(0) & 0o777;
    match (said, kind) {
        (0, Kind::Directory) => 0o755,
        (0, _) => 0o644,
        (mode, Kind::Directory) => mode | 0o700,
        (mode, _) => mode,
    }
}

fn make_directory(path: &Path) -> Result<(), ArchiveError> {
    DirBuilder::new().mode(0o755).create(path).map_err(|source| io_error("making a directory".to_owned(), source))
}

/// Copies one entry, counting against what is left of the limit.
fn inflate(
    entry: &mut impl Read,
    file: &mut File,
    path: &Path,
    left: &mut u64,
    limits: ArchiveLimits,
    stop: &Stop,
) -> Result<(), ArchiveError> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        stop.check()?;
        let read = match entry.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) => return Err(ArchiveError::Invalid(format!("{}: {error}", quoted(&path.to_string_lossy())))),
        };
        let rest = left.checked_sub(read as u64);
        *left = rest.ok_or_else(|| ArchiveError::Invalid(format!("it unpacks to more than {} bytes", limits.unpacked_bytes)))?;
        file.write_all(&buffer[..read]).map_err(|source| io_error("unpacking".to_owned(), source))?;
    }
}

fn link_target(entry: &mut impl Read, path: &Path) -> Result<String, ArchiveError> {
    let invalid = |why: &str| ArchiveError::Invalid(format!("the link {} {why}", quoted(&path.to_string_lossy())));
    let mut target = Vec::new();
    entry.take(MAX_TARGET + 1).read_to_end(&mut target).map_err(|error| invalid(&format!("cannot be read: {error}")))?;
    let target = String::from_utf8(target).map_err(|_| invalid("has a target that is not text"))?;
    if target.is_empty() || target.contains('\0') || target.len() as u64 > MAX_TARGET {
        return Err(invalid("has no usable target"));
    }
    Ok(target)
}

fn quoted(name: &str) -> String {
    // The text ends up in the API's answers: keep it printable and short.
    let shown: String = name.chars().take(120).flat_map(char::escape_debug).collect();
    format!("\"{shown}\"")
}

fn zip_error(error: ZipError) -> ArchiveError {
    ArchiveError::Invalid(error.to_string())
}

fn io_error(what: String, source: io::Error) -> ArchiveError {
    ArchiveError::Io { what, source }
}

#[cfg(test)]
mod tests;
