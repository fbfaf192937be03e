//! Starts this binary again for what only a fresh, single-threaded process may safely do: enter a container, fork in it.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    process::{Command, Stdio},
};

use tokio::net::UnixStream;

/// Starts it as the helper that `argument` names, with nothing of our environment. It talks over its standard input, whose other end is
/// returned. The reaper, not `Child`, waits for it.
pub fn start(argument: &str, stdout: Stdio, stderr: Stdio) -> io::Result<UnixStream> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Command::new("/proc/self/exe")
        .arg(argument)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(stdout)
        .stderr(stderr)
        .spawn()?;
    UnixStream::from_std(ours)
}
