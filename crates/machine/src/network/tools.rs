//! Work in other network namespaces, and the programs that do it: ip(8) and nft(8).

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, setns};
use tokio::{io::AsyncWriteExt, sync::oneshot};

use super::{NetworkError, io_error};

/// Does something on a thread of its own, which may change its namespaces: a thread cannot leave one without keeping a way back.
pub async fn on_thread<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let (reply, answer) = oneshot::channel();
    let work = move || {
        let _ = reply.send(work());
    };
    thread::Builder::new().name("slot".into()).spawn(work).map_err(io_error("starting a thread"))?;
    answer.await.map_err(|_| NetworkError::Io { what, source: io::ErrorKind::BrokenPipe.into() })?
}

/// Does something inside a network namespace.
pub async fn in_namespace<T: Send + 'static>(
    namespace: &OwnedFd,
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NetworkError> {
    let namespace = namespace.try_clone().map_err(io_error(what))?;
    let inside = move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    };
    on_thread(what, move || inside().map_err(io_error(what))).await
}

/// Makes a command run inside a network namespace.
pub fn inside<'a>(namespace: &OwnedFd, command: &'a mut Command) -> &'a mut Command {
    let namespace = namespace.as_raw_fd();
    // SAFETY: setns is async-signal-safe, and the descriptor is open: the caller holds it until the command has ended.
    unsafe {
        command.pre_exec(move || {
            let namespace = BorrowedFd::borrow_raw(namespace);
            Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
        })
    }
}

/// One nftables transaction inside a network namespace.
pub async fn nft(namespace: &OwnedFd, rules: &str) -> Result<(), NetworkError> {
    run(inside(namespace, Command::new("nft").args(["-f", "-"])), "nft", rules).await
}

/// Runs a program that reads its orders from standard input.
pub async fn run(command: &mut Command, program: &'static str, input: &str) -> Result<(), NetworkError> {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(std::mem::replace(command, Command::new(program)));
    let mut child = command.kill_on_drop(true).spawn().map_err(io_error("starting a network tool (ip, nft)"))?;
    let mut stdin = child.stdin.take().expect("standard input was requested as a pipe");
    // A program that ends early closes its input; what it has to say is on its standard error.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(io_error("waiting for a network tool"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetworkError::Program { program, message })
}
