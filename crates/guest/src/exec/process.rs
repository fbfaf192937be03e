//! A process that runs in the container, as PID 1 holds it. Dropped before its end, it is hung up on: its session gets SIGHUP, as from a
//! terminal that has gone, and SIGKILL if it will not go.

use std::{
    fs,
    io::{self, ErrorKind, IoSliceMut},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::Stdio,
    time::Duration,
};

use hearth_guest_protocol::{ExitStatus, TerminalSize};
use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, kill, killpg},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixStream, unix::pipe},
    time::timeout,
};

use super::helper::{self, EXITED, FAILED, Order, STARTED};
use crate::app;

/// From the order to the process's own code.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// What a process that was hung up on may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// The process could not be started. The text is for the user.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// the helper could not be started or talked to
    #[error("starting a process in the container: {0}")]
    Helper(#[from] io::Error),
    /// a step failed
    #[error("{0}")]
    Failed(String),
    /// the deadline passed
    #[error("the process was not started within {} s", START_DEADLINE.as_secs())]
    Deadline,
}

/// Ends of the process's pipes, or three times its terminal's.
pub struct Ends {
    pub input: pipe::Sender,
    pub output: pipe::Receiver,
    /// None with a terminal.
    pub error: Option<pipe::Receiver>,
}

/// A process that was started.
pub struct Process {
    pub ends: Option<Ends>,
    pub control: Control,
    pub end: End,
}

/// Reaches a running process.
pub struct Control {
    /// Process, group and session have the same id.
    leader: Pid,
    terminal: Option<OwnedFd>,
}

/// Waits for the end of a process; hangs up on it when dropped before.
pub struct End {
    leader: Pid,
    report: Option<Report>,
}

impl Process {
    /// Starts a process; returns once its own code runs.
    pub async fn start(order: &Order) -> Result<Self, StartError> {
        let socket = app::helper::start(helper::ARGUMENT, Stdio::null(), Stdio::inherit())?;
        timeout(START_DEADLINE, Self::instruct(socket, order)).await.map_err(|_| StartError::Deadline)?
    }

    async fn instruct(mut socket: UnixStream, order: &Order) -> Result<Self, StartError> {
        socket.write_all(&serde_json::to_vec(order).map_err(io::Error::from)?).await?;
        socket.shutdown().await?;
        let mut report = Report { socket, text: Vec::new(), descriptors: Vec::new() };
        let line = report.line().await?;
        if let Some(reason) = line.strip_prefix(FAILED) {
            return Err(StartError::Failed(reason.to_owned()));
        }
        let leader = line.strip_prefix(STARTED).and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
        let leader = leader.ok_or_else(|| StartError::Failed("the process's starter ended without a word".to_owned()))?;
        let descriptors = std::mem::take(&mut report.descriptors);
        let end = End { leader, report: Some(report) };
        let (ends, terminal) = ends(descriptors)?;
        Ok(Self { ends: Some(ends), control: Control { leader, terminal }, end })
    }
}

fn ends(descriptors: Vec<OwnedFd>) -> io::Result<(Ends, Option<OwnedFd>)> {
    for descriptor in &descriptors {
        let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
        fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    let sender = |end: OwnedFd| pipe::Sender::from_owned_fd_unchecked(end);
    let receiver = |end: OwnedFd| pipe::Receiver::from_owned_fd_unchecked(end);
    match <[OwnedFd; 3]>::try_from(descriptors) {
        Ok([input, output, error]) => Ok((Ends { input: sender(input)?, output: receiver(output)?, error: Some(receiver(error)?) }, None)),
        Err(descriptors) => {
            let terminal = descriptors.into_iter().next().ok_or_else(|| io::Error::other("the starter passed no terminal"))?;
            let ends = Ends { input: sender(terminal.try_clone()?)?, output: receiver(terminal.try_clone()?)?, error: None };
            Ok((ends, Some(terminal)))
        }
    }
}

impl Control {
    /// Sends a signal to the process's group, as a terminal would.
    pub fn signal(&self, signal: i32) {
        if let Ok(signal) = Signal::try_from(signal) {
            // It may have ended in the meantime.
            let _ = killpg(self.leader, signal);
        }
    }

    /// Gives its terminal another size, if it has one.
    pub fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            // The terminal is gone once the process is.
            let _ = helper::resize(terminal.as_fd(), size);
        }
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }
}

impl End {
    /// How the process ended. Cancel safe.
    pub async fn wait(&mut self) -> ExitStatus {
        let Some(report) = &mut self.report else { return killed() };
        let status = report.exited().await;
        // The helper goes, and with it the claim on the process's id.
        self.report = None;
        status
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let Some(mut report) = self.report.take() else { return };
        let leader = self.leader;
        signal_session(leader, &[Signal::SIGHUP, Signal::SIGCONT]);
        tokio::spawn(async move {
            if timeout(GRACE, report.exited()).await.is_err() {
                signal_session(leader, &[Signal::SIGKILL]);
            }
        });
    }
}

/// Signals every process of a session: a shell's jobs are groups of their own.
fn signal_session(leader: Pid, signals: &[Signal]) {
    let Ok(entries) = fs::read_dir("/proc") else { return };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| session_of(*pid) == Some(leader.as_raw())) {
        for signal in signals {
            // Whoever has gone needs no signal.
            let _ = kill(Pid::from_raw(pid), *signal);
        }
    }
}

/// The sixth field of proc_pid_stat(5). The second, a name in parentheses, may hold anything.
fn session_of(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after = stat.iter().rposition(|&byte| byte == b')')? + 1;
    std::str::from_utf8(&stat[after..]).ok()?.split_whitespace().nth(3)?.parse().ok()
}

/// What the helper says, line by line.
struct Report {
    socket: UnixStream,
    text: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Report {
    async fn exited(&mut self) -> ExitStatus {
        let line = self.line().await.unwrap_or_default();
        let code = line.strip_prefix(EXITED).and_then(|code| code.parse().ok());
        code.map_or_else(killed, |code| ExitStatus { code, out_of_memory: false })
    }

    /// The next line without its end; what is there at the end of the stream. Cancel safe.
    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.text.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let (socket, descriptors) = (&self.socket, &mut self.descriptors);
            let mut chunk = [0; 4096];
            let count = socket.async_io(Interest::READABLE, || receive(socket, &mut chunk, descriptors)).await?;
            if count == 0 {
                return Ok(String::from_utf8_lossy(&std::mem::take(&mut self.text)).into_owned());
            }
            self.text.extend_from_slice(&chunk[..count]);
        }
    }
}

fn receive(socket: &UnixStream, into: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = cmsg_space!([i32; 3]);
    let mut into = [IoSliceMut::new(into)];
    let message = match recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
        Err(Errno::EAGAIN) => return Err(ErrorKind::WouldBlock.into()),
        other => other?,
    };
    for rights in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = rights {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.extend(received.into_iter().map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) }));
        }
    }
    Ok(message.bytes)
}

/// What is said of a process whose helper died with it.
fn killed() -> ExitStatus {
    ExitStatus { code: 128 + Signal::SIGKILL as i32, out_of_memory: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_of_a_process_is_read_whatever_its_name() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(session_of(own), Some(nix::unistd::getsid(None).unwrap().as_raw()));
        assert_eq!(session_of(0), None);
    }
}
