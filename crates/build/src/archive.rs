//! Intake of the zip that holds a Dockerfile and its context. Its author is not trusted.
//!
//! The archive is judged as a whole before anything is written ([`Plan`]), without what its `.dockerignore` names. Then directories and files
//! are made, and symbolic links last, so that nothing can ever be written through one. Links are made as they are, wherever they lead: only
//! the Dockerfile and the files of patterns are read on the host, and never through a link that leads out. What the headers declare about
//! sizes is not believed: bytes are counted as they come out.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, BufReader, Read, Seek, Write},
    os::unix::{
        ffi::OsStringExt,
        fs::{DirBuilderExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};
use zip::{CompressionMethod, HasZipMetadata, System, ZipArchive, read::ZipFile, result::ZipError};

use crate::{
    ArchiveLimits,
    ignore::{self, IGNORE_FILES, Ignore, IgnoreError, Judge},
    process::{Stop, Stopped},
};

/// Longest component of a path, in bytes (NAME_MAX).
const MAX_COMPONENT: usize = 255;
/// Longest path inside the archive, in bytes. Leaves room for the work directory below PATH_MAX.
const MAX_PATH: usize = 2048;
/// Longest target of a symbolic link, in bytes (PATH_MAX without its zero).
const MAX_TARGET: usize = 4095;
/// Most links that lead to one file (MAXSYMLINKS).
const MAX_HOPS: usize = 40;

const DOCKERFILE: &str = "Dockerfile";
/// Most bytes of a Dockerfile. It is read into memory, and each of its lines takes more there.
const MAX_DOCKERFILE: u64 = 1 << 20;

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

impl From<Flaw> for ArchiveError {
    fn from(flaw: Flaw) -> Self {
        Self::Invalid(flaw.to_string())
    }
}

/// What is wrong with an archive, for its author. A name is shown as it is in the archive.
#[derive(Debug, thiserror::Error)]
enum Flaw {
    #[error("the name {} {why}", quoted(.name))]
    Name { name: String, why: &'static str },
    #[error("an entry has no name")]
    Nameless,
    #[error("{} is encrypted", quoted(.0))]
    Encrypted(String),
    #[error("{} is compressed with {method}, which is not supported: use deflate, or store it", quoted(.name))]
    Compression { name: String, method: Cow<'static, str> },
    #[error("{} is a {kind}: only files, directories and links can be in an archive", quoted(.name))]
    Special { name: String, kind: &'static str },
    #[error("{} lies below something that is not a directory", quoted(.0))]
    BelowFile(String),
    #[error("{} is there twice, as a {} and as a {}", quoted(.name), .kinds.0, .kinds.1)]
    Twice { name: String, kinds: (Kind, Kind) },
    #[error("entries overlap")]
    Overlap,
    #[error("it holds {found} files and directories; {}", Allowed(.limit, "", "build_context_entries"))]
    Entries { found: u64, limit: u64 },
    #[error("its files are {found} bytes in all; {}", Allowed(.limit, " bytes", "build_context_mib"))]
    Bytes { found: u64, limit: u64 },
    #[error("its files are more bytes than their headers declare; {}", Allowed(.limit, " bytes", "build_context_mib"))]
    MoreBytes { limit: u64 },
    #[error("{}: {source}", quoted(.name))]
    Damaged { name: String, source: io::Error },
    #[error("the link {} {why}", quoted(.name))]
    Link { name: String, why: &'static str },
    #[error("the Dockerfile is {found} bytes; this server allows {MAX_DOCKERFILE} bytes")]
    Dockerfile { found: u64 },
    #[error("{name}: {source}")]
    Ignore { name: &'static str, source: IgnoreError },
    #[error("{0}")]
    Zip(#[from] ZipError),
}

/// The half of a sentence that says which limit an archive exceeds.
struct Allowed<'a>(&'a u64, &'static str, &'static str);

impl std::fmt::Display for Allowed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(limit, unit, setting) = self;
        write!(f, "this server allows {limit}{unit} (its setting {setting}), and does not count what .dockerignore names")
    }
}

/// Unpacks `archive` into the new directory `context`. Blocks.
pub(crate) fn unpack(archive: &Path, context: &Path, limits: ArchiveLimits, stop: &Stop) -> Result<(), ArchiveError> {
    let file = File::open(archive).map_err(|source| io_error(format!("opening {}", archive.display()), source))?;
    let bytes = file.metadata().map_err(|source| io_error(format!("reading {}", archive.display()), source))?.len();
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(Flaw::from)?;
    let contents = Contents::of(&mut zip, stop)?;
    let plan = Plan::of(&mut zip, &contents, bytes, limits, stop)?;
    plan.carry_out(&mut zip, context, limits, stop)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Link,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Directory => "directory",
            Self::File => "file",
            Self::Link => "link",
        })
    }
}

/// One entry of the archive.
#[derive(Debug)]
struct Entry {
    /// Relative to the context, with slashes, free of `.` and `..`; empty for the context itself.
    path: String,
    kind: Kind,
    mode: u32,
    packed_bytes: u64,
    declared_bytes: u64,
    /// Why it cannot be unpacked. It matters only if the entry is not ignored.
    flaw: Option<Flaw>,
}

/// The entries, in the archive's order. Several may stand for one path.
#[derive(Debug)]
struct Contents(Vec<Entry>);

impl Contents {
    fn of(zip: &mut ZipArchive<impl Read + Seek>, stop: &Stop) -> Result<Self, ArchiveError> {
        let mut entries = Vec::with_capacity(zip.len());
        for index in 0..zip.len() {
            stop.check()?;
            entries.push(Entry::of(&zip.by_index_raw(index).map_err(Flaw::from)?)?);
        }
        Ok(Self(entries))
    }

    /// Where a path is: of several entries the last, as for unzip.
    fn positions(&self) -> HashMap<&str, usize> {
        self.0.iter().enumerate().map(|(index, entry)| (entry.path.as_str(), index)).collect()
    }
}

impl Entry {
    fn of(entry: &ZipFile<'_, impl Read>) -> Result<Self, Flaw> {
        let name = name_of(entry)?;
        let path = safe_path(&name, is_of_dos(entry))?;
        let too_long = || Flaw::Name { name: name.to_string(), why: "is too long" };
        if path.len() > MAX_PATH {
            // Even if it is ignored: patterns take their time over each directory of a path.
            return Err(too_long());
        }
        let flaw = path.split('/').any(|component| component.len() > MAX_COMPONENT).then(too_long);
        let (kind, special) = match kind_of(entry, name.ends_with('/')) {
            Ok(kind) => (kind, None),
            Err(kind) => (Kind::File, Some(Flaw::Special { name: name.to_string(), kind })),
        };
        if path.is_empty() && kind != Kind::Directory {
            return Err(Flaw::Nameless);
        }
        let encrypted = entry.encrypted().then(|| Flaw::Encrypted(name.to_string()));
        let compression = unsupported(entry.compression())
            .map(|method| Flaw::Compression { name: name.to_string(), method })
            .filter(|_| kind != Kind::Directory);
        Ok(Self {
            path,
            kind,
            mode: mode_of(entry, kind),
            packed_bytes: entry.compressed_size(),
            declared_bytes: entry.size(),
            flaw: flaw.or(special).or(encrypted).or(compression),
        })
    }
}

/// One path that unpacking makes.
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
    fn of(
        zip: &mut ZipArchive<impl Read + Seek>,
        contents: &Contents,
        archive_bytes: u64,
        limits: ArchiveLimits,
        stop: &Stop,
    ) -> Result<Self, ArchiveError> {
        let positions = contents.positions();
        let special = Special::find(zip, contents, &positions)?;
        let mut judge = Judge::new(&special.ignore);
        let mut kept = Vec::new();
        for (index, entry) in contents.0.iter().enumerate() {
            if special.paths.contains(&entry.path) || !judge.ignores(&entry.path, || stop.check())? {
                kept.push((index, entry));
            }
        }
        let mut plan = Self::default();
        let mut packed_bytes = 0u64;
        for (position, (index, entry)) in kept.iter().enumerate() {
            if let Some(flaw) = &entry.flaw {
                return Err(ArchiveError::Invalid(flaw.to_string()));
            }
            plan.add(entry, *index, contents, &positions)?;
            if plan.0.len() as u64 > limits.entries {
                let found = (plan.0.len() + kept.len() - position - 1) as u64;
                return Err(Flaw::Entries { found, limit: limits.entries }.into());
            }
            // Entries that share their bytes would let a small archive keep the inflater busy for days.
            packed_bytes = packed_bytes.saturating_add(entry.packed_bytes);
            if packed_bytes > archive_bytes {
                return Err(Flaw::Overlap.into());
            }
        }
        let declared = plan.of_kind(Kind::File).filter_map(|(_, node)| Some(contents.0[node.index?].declared_bytes));
        let declared_bytes = declared.fold(0, u64::saturating_add);
        if declared_bytes > limits.unpacked_bytes {
            return Err(Flaw::Bytes { found: declared_bytes, limit: limits.unpacked_bytes }.into());
        }
        Ok(plan)
    }

    fn add(&mut self, entry: &Entry, index: usize, contents: &Contents, positions: &HashMap<&str, usize>) -> Result<(), Flaw> {
        let Entry { path, kind, mode, .. } = entry;
        if path.is_empty() {
            // The context itself, as in "./".
            return Ok(());
        }
        for (slash, _) in path.match_indices('/') {
            let parent = &path[..slash];
            let implied = || {
                // A directory that is ignored is made for what an exception keeps in it, and looks as it does in the archive.
                let said = positions.get(parent).map(|index| &contents.0[*index]).filter(|entry| entry.kind == Kind::Directory);
                Node { kind: Kind::Directory, mode: said.map_or(0o755, |entry| entry.mode), index: None }
            };
            if self.0.entry(PathBuf::from(parent)).or_insert_with(implied).kind != Kind::Directory {
                return Err(Flaw::BelowFile(path.clone()));
            }
        }
        let node = Node { kind: *kind, mode: *mode, index: Some(index) };
        match self.0.insert(PathBuf::from(path), node) {
            Some(before) if before.kind != *kind => Err(Flaw::Twice { name: path.clone(), kinds: (before.kind, *kind) }),
            _ => Ok(()),
        }
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
        let root = File::open(context).map_err(|source| io_error("opening the context".to_owned(), source))?;
        for (path, _) in self.of_kind(Kind::Directory) {
            stop.check()?;
            make_directory(&context.join(path))?;
        }
        for (path, node) in self.of_kind(Kind::File) {
            let Some(index) = node.index else { continue };
            let mut entry = zip.by_index(index).map_err(Flaw::from)?;
            let mut file = make_file(&root, path)?;
            inflate(&mut entry, &mut file, path, &mut left, limits, stop)?;
            // Not when the file is made, because the process's umask narrows modes there.
            file.set_permissions(Permissions::from_mode(node.mode)).map_err(|source| io_error("setting a mode".to_owned(), source))?;
        }
        for (path, node) in self.of_kind(Kind::Link) {
            stop.check()?;
            let Some(index) = node.index else { continue };
            let target = link_target(zip, index, &path.to_string_lossy())?;
            symlink(&target, context.join(path)).map_err(|source| io_error(making(path), source))?;
        }
        // Children first: a directory may be closed to its owner.
        for (path, node) in self.of_kind(Kind::Directory).rev() {
            fs::set_permissions(context.join(path), Permissions::from_mode(node.mode))
                .map_err(|source| io_error("setting a mode".to_owned(), source))?;
        }
        find_dockerfile(&root)
    }
}

/// What the build itself reads of its context. It is unpacked even if it is ignored.
struct Special {
    /// The Dockerfile, the files of patterns, and the links and directories on the way to them.
    paths: HashSet<String>,
    ignore: Ignore,
}

impl Special {
    fn find(zip: &mut ZipArchive<impl Read + Seek>, contents: &Contents, positions: &HashMap<&str, usize>) -> Result<Self, ArchiveError> {
        let mut special = Self { paths: HashSet::new(), ignore: Ignore::default() };
        if special.follow(zip, contents, positions, DOCKERFILE)?.is_none() {
            return Err(ArchiveError::DockerfileNotFound);
        }
        let mut patterns = None;
        for name in IGNORE_FILES {
            let found = special.follow(zip, contents, positions, name)?;
            if positions.contains_key(name) && patterns.is_none() {
                patterns = Some((name, found));
            }
        }
        if let Some((name, Some(index))) = patterns {
            let bytes = read_entry(zip, index, name, ignore::MAX_BYTES)?;
            special.ignore = Ignore::parse(&bytes).map_err(|source| Flaw::Ignore { name, source })?;
        }
        Ok(special)
    }

    /// The file that a name stands for, through links. Notes all that is on the way.
    fn follow(
        &mut self,
        zip: &mut ZipArchive<impl Read + Seek>,
        contents: &Contents,
        positions: &HashMap<&str, usize>,
        name: &'static str,
    ) -> Result<Option<usize>, ArchiveError> {
        let outside = || Flaw::Link { name: name.to_owned(), why: "leads out of the archive, and the build has to read it" };
        let mut directory: Vec<String> = Vec::new();
        let mut ahead = vec![name.to_owned()];
        let mut hops = 0;
        while let Some(component) = ahead.pop() {
            match component.as_str() {
                "" | "." => continue,
                ".." => {
                    directory.pop().ok_or_else(outside)?;
                    continue;
                }
                _ => directory.push(component),
            }
            let path = directory.join("/");
            let Some((index, entry)) = positions.get(path.as_str()).map(|index| (*index, &contents.0[*index])) else { continue };
            if let Some(flaw) = &entry.flaw {
                return Err(ArchiveError::Invalid(flaw.to_string()));
            }
            self.paths.insert(path.clone());
            match entry.kind {
                Kind::Directory => continue,
                Kind::File => return Ok(ahead.is_empty().then_some(index)),
                Kind::Link => {}
            }
            hops += 1;
            let Ok(target) = link_target(zip, index, &path)?.into_string() else { return Ok(None) };
            if target.starts_with('/') {
                return Err(outside().into());
            }
            if hops > MAX_HOPS {
                return Ok(None);
            }
            directory.pop();
            ahead.extend(target.split('/').rev().map(str::to_owned));
        }
        Ok(None)
    }
}

/// The kernel's word on the Dockerfile, which the builder will open by its path.
fn find_dockerfile(root: &File) -> Result<(), ArchiveError> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
    match openat2(root, DOCKERFILE, how) {
        Ok(file) => match File::from(file).metadata() {
            Ok(found) if found.is_file() && found.len() > MAX_DOCKERFILE => Err(Flaw::Dockerfile { found: found.len() }.into()),
            Ok(found) if found.is_file() => Ok(()),
            _ => Err(ArchiveError::DockerfileNotFound),
        },
        Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV) => Err(ArchiveError::DockerfileNotFound),
        Err(errno) => Err(io_error("looking for the Dockerfile".to_owned(), errno.into())),
    }
}

/// An entry's name as text. Names are UTF-8 or, from old tools, of code page 437.
fn name_of<'a>(entry: &'a ZipFile<'_, impl Read>) -> Result<Cow<'a, str>, Flaw> {
    let data = entry.get_metadata();
    match std::str::from_utf8(&data.file_name_raw) {
        Ok(name) => Ok(Cow::Borrowed(name)),
        Err(_) if data.is_utf8 => Err(Flaw::Name { name: entry.name().to_owned(), why: "is not UTF-8, although its entry says so" }),
        Err(_) => Ok(Cow::Borrowed(entry.name())),
    }
    .map(|name: Cow<'a, str>| if is_of_dos(entry) && !name.contains('/') { Cow::Owned(name.replace('\\', "/")) } else { name })
}

/// Whether the entry was made by a tool of DOS or Windows. Some of them separate directories by backslashes: unzip takes them so if the
/// name has no slash. In other names a backslash is a character as any.
fn is_of_dos(entry: &ZipFile<'_, impl Read>) -> bool {
    matches!(entry.get_metadata().system, System::Dos)
}

/// The path that a name stands for, relative to the context and free of `.` and `..`. Empty for the context itself.
fn safe_path(name: &str, of_dos: bool) -> Result<String, Flaw> {
    let refuse = |why| Err(Flaw::Name { name: name.to_owned(), why });
    if name.starts_with('/') {
        return refuse("is absolute");
    }
    if name.contains('\0') {
        return refuse("has a zero byte");
    }
    let mut path: Vec<&str> = Vec::new();
    for component in name.split('/') {
        match component {
            "" | "." => {}
            ".." => return refuse("leads out of the archive"),
            _ if path.is_empty() && of_dos && is_drive(component) => return refuse("begins with a drive letter"),
            _ => path.push(component),
        }
    }
    Ok(path.join("/"))
}

/// `C:` or `C:file`.
fn is_drive(component: &str) -> bool {
    matches!(component.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic())
}

/// What an entry is; the word for it if it is nothing that can be unpacked.
fn kind_of(entry: &ZipFile<'_, impl Read>, is_directory: bool) -> Result<Kind, &'static str> {
    const S_IFMT: u32 = 0o170_000;
    match entry.unix_mode().unwrap_or(0) & S_IFMT {
        0o040_000 => Ok(Kind::Directory),
        0 | 0o100_000 if is_directory => Ok(Kind::Directory),
        0 | 0o100_000 => Ok(Kind::File),
        0o120_000 if !is_directory => Ok(Kind::Link),
        0o010_000 => Err("named pipe"),
        0o020_000 | 0o060_000 => Err("device"),
        0o140_000 => Err("socket"),
        _ => Err("thing of no known kind"),
    }
}

/// Permissions, without set-user-id and its like; usual ones where the archive has none of Unix.
fn mode_of(entry: &ZipFile<'_, impl Read>, kind: Kind) -> u32 {
    let said = (entry.get_metadata().external_attributes >> 16) & 0o777;
    match (said, kind) {
        (0, Kind::Directory) => 0o755,
        (0, _) => 0o644,
        (mode, Kind::Directory) => mode | 0o700,
        (mode, _) => mode,
    }
}

/// The name of a way of compression that entries may not use.
fn unsupported(method: CompressionMethod) -> Option<Cow<'static, str>> {
    #[allow(deprecated, reason = "the number of a method that the library does not know")]
    let number = match method {
        CompressionMethod::Stored | CompressionMethod::Deflated => return None,
        CompressionMethod::Unsupported(number) => number,
        other => return Some(Cow::Owned(other.to_string())),
    };
    Some(match number {
        1 => "shrink".into(),
        6 => "implode".into(),
        9 => "deflate64".into(),
        12 => "bzip2".into(),
        14 => "LZMA".into(),
        93 => "zstd".into(),
        95 => "xz".into(),
        98 => "PPMd".into(),
        number => format!("method {number}").into(),
    })
}

fn make_directory(path: &Path) -> Result<(), ArchiveError> {
    DirBuilder::new().mode(0o755).create(path).map_err(|source| io_error("making a directory".to_owned(), source))
}

/// A new file for writing. Nothing that is there already, and no link on the way, is opened.
fn make_file(root: &File, path: &Path) -> Result<File, ArchiveError> {
    let how = OpenHow::new()
        .flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC)
        .mode(Mode::S_IRUSR | Mode::S_IWUSR)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(root, path, how).map(File::from).map_err(|errno| io_error(making(path), errno.into()))
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
            Err(source) => return Err(Flaw::Damaged { name: path.to_string_lossy().into_owned(), source }.into()),
        };
        *left = left.checked_sub(read as u64).ok_or(Flaw::MoreBytes { limit: limits.unpacked_bytes })?;
        file.write_all(&buffer[..read]).map_err(|source| io_error("unpacking".to_owned(), source))?;
    }
}

fn link_target(zip: &mut ZipArchive<impl Read + Seek>, index: usize, name: &str) -> Result<OsString, ArchiveError> {
    let refuse = |why| Err(Flaw::Link { name: name.to_owned(), why }.into());
    let target = read_entry(zip, index, name, MAX_TARGET)?;
    if target.len() > MAX_TARGET {
        return refuse("has a target of more than 4095 bytes");
    }
    if target.is_empty() {
        return refuse("has no target");
    }
    if target.contains(&0) {
        return refuse("has a zero byte in its target");
    }
    Ok(OsString::from_vec(target))
}

/// The bytes of a small entry, and one more if it has more than `most`.
fn read_entry(zip: &mut ZipArchive<impl Read + Seek>, index: usize, name: &str, most: usize) -> Result<Vec<u8>, Flaw> {
    let mut bytes = Vec::new();
    let mut entry = zip.by_index(index)?.take(most as u64 + 1);
    entry.read_to_end(&mut bytes).map_err(|source| Flaw::Damaged { name: name.to_owned(), source })?;
    Ok(bytes)
}

fn making(path: &Path) -> String {
    format!("making {}", quoted(&path.to_string_lossy()))
}

fn quoted(name: &str) -> String {
    // The text ends up in the API's answers: keep it printable and short.
    let shown: String = name.chars().take(120).flat_map(char::escape_debug).collect();
    format!("\"{shown}\"")
}

fn io_error(what: String, source: io::Error) -> ArchiveError {
    ArchiveError::Io { what, source }
}

#[cfg(test)]
mod tests;
