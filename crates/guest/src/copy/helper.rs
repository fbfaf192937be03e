//! Reads and writes the container's files, from within its root directory, whatever links are there. A process of its own
//! (`hearth-guest copy`) with a socket as standard input: an [`Order`], then the frames of a [`hearth_guest_protocol::StreamHeader::Copy`] stream.

use std::{
    fs,
    io::{self, BufWriter, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
};

use hearth_copy::{CopyError, pack, unpack};
use hearth_guest_protocol::{CopyInput, CopyOutput, FileCopy, FileKind, WireError, wire};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::app::container::{self, ContainerError};

/// The argument that makes the binary come here.
pub const ARGUMENT: &str = "copy";

/// Bytes of the tar stream in one frame.
const CHUNK: usize = 32 << 10;

/// What to copy, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// The application's main process, in the outermost pid namespace.
    pub main: i32,
    pub copy: FileCopy,
}

/// The copy failed. The text is for the user.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("{0} is not there")]
    Missing(String),
    #[error("{0} is no directory")]
    NotADirectory(String),
    #[error("looking at {0}: {1}")]
    Look(String, io::Error),
}

/// The helper's whole life.
pub fn main() -> ExitCode {
    let socket = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => UnixStream::from(socket),
        Err(error) => {
            eprintln!("hearth-guest: {ARGUMENT}: standard input is not usable: {error}");
            return ExitCode::FAILURE;
        }
    };
    let last = match run(&socket) {
        Ok(()) => CopyOutput::Done,
        Err(error) => CopyOutput::Failed { reason: error.to_string() },
    };
    // Nobody is left to tell if this fails.
    let _ = wire::write_blocking(&mut &socket, &last);
    ExitCode::SUCCESS
}

fn run(socket: &UnixStream) -> Result<(), HelperError> {
    let Order { main, copy } = wire::read_blocking(&mut &*socket)?;
    container::join(Pid::from_raw(main))?;
    let mut skipped = |what| {
        // A host that has gone is noticed with the next bytes.
        let _ = wire::write_blocking(&mut &*socket, &CopyOutput::Skipped { what });
    };
    match copy {
        FileCopy::Look { path } => {
            let (kind, link) = look(&path)?;
            wire::write_blocking(&mut &*socket, &CopyOutput::Found { kind, link })?;
        }
        FileCopy::Into { directory, archive } => {
            if look(&directory)?.0 != FileKind::Directory {
                return Err(HelperError::NotADirectory(directory));
            }
            unpack(Incoming { socket, left: Vec::new(), at: 0, ended: false }, &absolute(&directory), archive, &mut skipped)?;
        }
        FileCopy::OutOf { path, name } => {
            if look(&path)? == (FileKind::Missing, false) {
                return Err(HelperError::Missing(path));
            }
            let out = BufWriter::with_capacity(CHUNK, Outgoing { socket });
            pack(&absolute(&path), Path::new(&name), out, &mut skipped)?;
        }
    }
    Ok(())
}

/// Relative paths begin at the container's root.
fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

fn look(path: &str) -> Result<(FileKind, bool), HelperError> {
    let full = absolute(path);
    let failed = |error| HelperError::Look(path.to_owned(), error);
    let link = match fs::symlink_metadata(&full) {
        Ok(metadata) => metadata.is_symlink(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((FileKind::Missing, false)),
        Err(error) => return Err(failed(error)),
    };
    let kind = match fs::metadata(&full) {
        Ok(metadata) if metadata.is_dir() => FileKind::Directory,
        Ok(metadata) if metadata.is_file() => FileKind::File,
        Ok(_) => FileKind::Special,
        Err(error) if error.kind() == io::ErrorKind::NotFound => FileKind::Missing,
        Err(error) => return Err(failed(error)),
    };
    Ok((kind, link))
}

/// The tar stream from the host. Its end is an error unless the host said so.
struct Incoming<'a> {
    socket: &'a UnixStream,
    left: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Incoming<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.left.len() && !self.ended {
            match wire::read_blocking(&mut &*self.socket) {
                Ok(CopyInput::Data(bytes)) => (self.left, self.at) = (bytes, 0),
                Ok(CopyInput::End) => self.ended = true,
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let rest = &self.left[self.at..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}

/// The tar stream to the host.
struct Outgoing<'a> {
    socket: &'a UnixStream,
}

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK);
        wire::write_blocking(&mut &*self.socket, &CopyOutput::Data(bytes[..count].to_vec())).map_err(io::Error::other)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
