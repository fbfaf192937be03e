//! Becomes the application: its control group, new namespaces, the image's root file system, Docker's idea of `/dev` and `/proc`, the
//! image's user, then exec. What joins the container later comes in with [`join`].
//!
//! Runs as a process of its own, which PID 1 starts with a socket as standard input. The [`App`] comes in through the socket as JSON; a
//! report of lines goes back (`pid N`, or `failed REASON`) and ends when exec closes the last copy of the socket.

use std::{
    convert::Infallible,
    ffi::NulError,
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
};

use hearth_guest_protocol::App;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
    unistd::{ForkResult, Pid, dup2_stdin, fork, sethostname, setsid},
};

use super::{process, rootfs, user::UserError};
use crate::cgroup::{self, CgroupError};

/// The argument that makes the binary come here.
pub const ARGUMENT: &str = "container";
/// Begins the report's line with the application's process id.
pub const PID: &str = "pid ";
/// Begins the report's line with what went wrong.
pub const FAILED: &str = "failed ";

const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWCGROUP);

/// A step on the way to the application's first instruction failed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("reading what to run: {0}")]
    Instructions(io::Error),
    #[error("the image names no command: ENTRYPOINT and CMD are both empty")]
    NoCommand,
    #[error("the command or the environment contains a zero byte")]
    ZeroByte(#[from] NulError),
    #[error("{doing}: {}", describe(*error))]
    Kernel { doing: String, error: Errno },
    #[error("{doing}: {}. {advice}", describe(*error))]
    Program { doing: String, error: Errno, advice: String },
    #[error("{0}: {1}")]
    File(String, io::Error),
    #[error("giving up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("the application has ended, and its container with it")]
    Ended,
    #[error("{0:?}: executable file not found in PATH")]
    NotInPath(String),
}

/// The helper's whole life. Comes back only to report a failure.
pub fn main() -> ExitCode {
    let report = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => UnixStream::from(socket),
        Err(error) => {
            eprintln!("hearth-guest: {ARGUMENT}: standard input is not usable: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Err(error) = run(&report);
    // PID 1 reads one line.
    let reason = error.to_string().replace('\n', " ");
    // Nobody is left to tell if this fails too.
    let _ = (&report).write_all(format!("{FAILED}{reason}\n").as_bytes());
    ExitCode::FAILURE
}

fn run(mut report: &UnixStream) -> Result<Infallible, ContainerError> {
    let mut instructions = Vec::new();
    report.read_to_end(&mut instructions).map_err(ContainerError::Instructions)?;
    let app: App = serde_json::from_slice(&instructions).map_err(|error| ContainerError::Instructions(error.into()))?;

    // First: where a process is when it makes a cgroup namespace is the namespace's root.
    cgroup::join()?;
    unshare(NAMESPACES).map_err(kernel("making namespaces"))?;
    if app.all_capabilities {
        cgroup::step_aside()?;
    }
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(kernel("making the container's first process"))? {
        ForkResult::Parent { child } => {
            // Without a reader there is nobody to run the application for, and its parent notices by itself.
            let _ = report.write_all(format!("{PID}{child}\n").as_bytes());
            // The child goes to PID 1, which waits for its end.
            std::process::exit(0)
        }
        ForkResult::Child => become_application(&app),
    }
}

fn become_application(app: &App) -> Result<Infallible, ContainerError> {
    setsid().map_err(kernel("starting a session"))?;
    sethostname(&app.hostname).map_err(kernel("setting the host name"))?;
    rootfs::enter(app.all_capabilities)?;
    let null = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(kernel("opening /dev/null"))?;
    dup2_stdin(&null).map_err(kernel("closing standard input"))?;
    process::become_program(app)
}

/// Takes this process into the container whose first process is `main`: its control group and its namespaces, and with them its root
/// directory. As with `unshare`, the pid namespace is that of the children: the caller forks, and the child is in the container as a whole.
///
/// For a helper process with one thread, started as [`ARGUMENT`]'s is. What follows in the child is [`process::become_program`], with an
/// [`App`] that differs from the application's in what shall be different.
pub fn join(main: Pid) -> Result<(), ContainerError> {
    let ended = |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound) || error.raw_os_error() == Some(Errno::ESRCH as i32);
    // All of them before the first is entered: the last, the mounts, hide this view of /proc.
    let mut namespaces = Vec::new();
    for name in ["cgroup", "ipc", "uts", "pid", "mnt"] {
        let path = format!("/proc/{main}/ns/{name}");
        namespaces.push(
            File::open(&path).map_err(|error| {
                if ended(&error) { ContainerError::Ended } else { ContainerError::File(format!("opening {path}"), error) }
            })?,
        );
    }
    cgroup::join_process(main)?;
    for namespace in namespaces {
        setns(namespace, CloneFlags::empty()).map_err(kernel("entering the container's namespaces"))?;
    }
    Ok(())
}

pub fn kernel(doing: &str) -> impl Fn(Errno) -> ContainerError {
    move |error| ContainerError::Kernel { doing: doing.to_owned(), error }
}

/// As shells put it: "no such file or directory".
fn describe(error: Errno) -> String {
    let text = error.desc();
    text.chars().take(1).flat_map(char::to_lowercase).chain(text.chars().skip(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_like_a_shells() {
        assert_eq!(
            ContainerError::Kernel { doing: "/app/run".into(), error: Errno::ENOENT }.to_string(),
            "/app/run: no such file or directory"
        );
    }
}
