//! Starts a process in the container, then waits for its end. A process of its own (`hearth-guest exec`): entering namespaces and forking
//! take a process with one thread.
//!
//! Its standard input is a socket. An [`Order`] comes in as JSON; lines go back: `started PID` with the ends of the process's pipes or
//! terminal, then `exited CODE`; or `failed REASON`. It stays until PID 1 closes the socket, and keeps the process's id from being given to
//! another until then.

use std::{
    convert::Infallible,
    fs,
    io::{self, IoSlice, PipeReader, PipeWriter, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use hearth_guest_protocol::{App, TerminalSize};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    libc,
    pty::{PtyMaster, posix_openpt, ptsname_r, unlockpt},
    sys::{
        signal::{Signal, kill},
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid},
};
use serde::{Deserialize, Serialize};

use crate::app::{
    container::{self, ContainerError, kernel},
    process::become_program,
};

/// The argument that makes the binary come here.
pub const ARGUMENT: &str = "exec";
/// Begins the line with the process's id.
pub const STARTED: &str = "started ";
/// Begins the line with the exit code.
pub const EXITED: &str = "exited ";
/// Begins the line with what went wrong.
pub const FAILED: &str = "failed ";

/// Where images keep their shells, the better ones first, and the arguments that make them show our prompt.
const SHELLS: [(&str, &[&str]); 5] =
    [("/bin/bash", &["--norc"]), ("/usr/bin/bash", &["--norc"]), ("/bin/sh", &[]), ("/usr/bin/sh", &[]), ("/busybox/sh", &[])];

/// What to start, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// The application's main process, in the outermost pid namespace.
    pub main: i32,
    /// The program, completed with what is the application's. No arguments: the container's shell.
    pub program: App,
    /// The working directory was asked for, so it must be there.
    pub cwd_given: bool,
    /// A terminal of this size instead of pipes.
    pub terminal: Option<TerminalSize>,
}

/// The process could not be started.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("reading what to run: {0}")]
    Order(#[from] io::Error),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("the image has no shell (looked for bash and sh in /bin and /usr/bin): run a program of the image instead")]
    NoShell,
    #[error("the working directory {0} is not there")]
    NoDirectory(String),
    /// what the process said before it became the program
    #[error("{0}")]
    Process(String),
}

/// The helper's whole life.
pub fn main() -> ExitCode {
    let report = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => UnixStream::from(socket),
        Err(error) => {
            eprintln!("hearth-guest: {ARGUMENT}: standard input is not usable: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Err(error) = run(&report) else { return ExitCode::SUCCESS };
    let reason = error.to_string().replace('\n', " ");
    // Nobody is left to tell if this fails too.
    let _ = (&report).write_all(format!("{FAILED}{reason}\n").as_bytes());
    ExitCode::FAILURE
}

fn run(mut report: &UnixStream) -> Result<(), ExecError> {
    let mut order = Vec::new();
    report.read_to_end(&mut order)?;
    let order: Order = serde_json::from_slice(&order).map_err(io::Error::from)?;
    container::join(Pid::from_raw(order.main))?;
    let (ours, theirs) = match order.terminal {
        Some(size) => terminal(size)?,
        None => pipes().map_err(|error| ContainerError::File("making pipes".to_owned(), error))?,
    };
    let (mut complaint, complain) = io::pipe()?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(kernel("making a process"))? {
        ForkResult::Child => {
            drop((complaint, ours));
            let Err(error) = become_process(&order, theirs);
            exit_complaining(complain, &error)
        }
        ForkResult::Parent { child } => {
            drop((complain, theirs));
            // Ends without a word when the program takes over.
            let mut reason = String::new();
            complaint.read_to_string(&mut reason)?;
            if !reason.is_empty() {
                return Err(ExecError::Process(reason));
            }
            if let Err(error) = send(report, &format!("{STARTED}{child}\n"), &ours) {
                // Whoever asked for the process is gone, and would never hear of it.
                let _ = kill(child, Signal::SIGKILL);
                return Err(io::Error::from(error).into());
            }
            drop(ours);
            let code = wait(child).map_err(io::Error::from)?;
            report.write_all(format!("{EXITED}{code}\n").as_bytes())?;
            // PID 1 waits for the process once this one has gone.
            let _ = report.read(&mut [0]);
            Ok(())
        }
    }
}

/// The process's standard input, output and error.
struct Standard {
    input: OwnedFd,
    output: OwnedFd,
    error: OwnedFd,
}

fn pipes() -> io::Result<(Vec<OwnedFd>, Standard)> {
    let ((input, our_input), (our_output, output), (our_error, error)): (_, (PipeReader, PipeWriter), _) =
        (io::pipe()?, io::pipe()?, io::pipe()?);
    let theirs = Standard { input: input.into(), output: output.into(), error: error.into() };
    Ok((vec![our_input.into(), our_output.into(), our_error.into()], theirs))
}

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_write_int_bad!(set_controlling, libc::TIOCSCTTY);

/// A terminal of the container's own devpts, so that the process finds its name.
fn terminal(size: TerminalSize) -> Result<(Vec<OwnedFd>, Standard), ContainerError> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master: PtyMaster = posix_openpt(flags).map_err(kernel("opening /dev/ptmx"))?;
    unlockpt(&master).map_err(kernel("unlocking the terminal"))?;
    let name = ptsname_r(&master).map_err(kernel("naming the terminal"))?;
    let slave = open(name.as_str(), flags, Mode::empty()).map_err(kernel("opening the terminal"))?;
    resize(slave.as_fd(), size).map_err(kernel("setting the terminal's size"))?;
    let copy = || slave.try_clone().map_err(|error| ContainerError::File("opening the terminal".to_owned(), error));
    let theirs = Standard { input: copy()?, output: copy()?, error: copy()? };
    // SAFETY: the descriptor is taken out of the value that owned it.
    let master = unsafe { OwnedFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(master)) };
    Ok((vec![master], theirs))
}

/// Gives a terminal another size; its foreground processes are told.
pub fn resize(terminal: BorrowedFd<'_>, size: TerminalSize) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads one `winsize`.
    unsafe { set_size(terminal.as_raw_fd(), &raw const size) }.map(drop)
}

fn become_process(order: &Order, standard: Standard) -> Result<Infallible, ExecError> {
    setsid().map_err(kernel("starting a session"))?;
    dup2_stdin(&standard.input).map_err(kernel("setting standard input"))?;
    dup2_stdout(&standard.output).map_err(kernel("setting standard output"))?;
    dup2_stderr(&standard.error).map_err(kernel("setting standard error"))?;
    if order.terminal.is_some() {
        // SAFETY: the request takes an integer.
        unsafe { set_controlling(0, 0) }.map_err(kernel("taking the terminal"))?;
    }
    let mut program = order.program.clone();
    if program.argv.is_empty() {
        let (shell, arguments) = SHELLS.iter().find(|(path, _)| fs::metadata(path).is_ok()).ok_or(ExecError::NoShell)?;
        program.argv = [*shell].into_iter().chain(arguments.iter().copied()).map(str::to_owned).collect();
    }
    if order.cwd_given && !fs::metadata(&program.cwd).is_ok_and(|found| found.is_dir()) {
        return Err(ExecError::NoDirectory(program.cwd));
    }
    Ok(become_program(&program)?)
}

fn exit_complaining(mut complain: PipeWriter, error: &ExecError) -> ! {
    // The helper reads it, and PID 1 waits for both.
    let _ = complain.write_all(error.to_string().as_bytes());
    std::process::exit(1)
}

fn send(report: &UnixStream, line: &str, descriptors: &[OwnedFd]) -> Result<(), Errno> {
    let descriptors: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    // Far shorter than the socket's buffer, so that it goes as a whole.
    sendmsg::<()>(report.as_raw_fd(), &[IoSlice::new(line.as_bytes())], &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// Waits for the end of the process and leaves it unburied.
fn wait(child: Pid) -> Result<i32, Errno> {
    loop {
        match waitid(Id::Pid(child), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}
