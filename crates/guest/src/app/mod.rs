//! The application: started once, its output collected, its end remembered. Also the reaper of everything that ends up with PID 1.

mod advice;
pub mod container;
pub mod helper;
pub mod process;
mod rootfs;
mod stop;
mod user;

use std::{
    io::{self, PipeReader},
    os::fd::OwnedFd,
    time::Duration,
};

use hearth_guest_protocol::{App, ExitStatus, LogSource};
use nix::{
    errno::Errno,
    libc,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    signal::unix::{SignalKind, signal},
    sync::{Mutex, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{cgroup, logs::Logs};

/// From the order to start until the application's own code runs.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// The last output of an application that ended; its pipes close with the last of its processes.
const OUTPUT_DEADLINE: Duration = Duration::from_secs(2);

/// The application could not be started. The text is for the build's log.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// it is there already
    #[error("the application has already been started")]
    AlreadyStarted,
    /// the helper process could not be started or talked to
    #[error("starting the container's first process: {0}")]
    Helper(#[from] io::Error),
    /// a step inside the container failed
    #[error("{0}")]
    Container(String),
    /// the deadline passed
    #[error("the container was not ready within {} s", START_DEADLINE.as_secs())]
    Deadline,
}

/// The machine's one application.
#[derive(Debug)]
pub struct Application {
    logs: Logs,
    /// Held while the application starts, so that its end cannot be seen before its process id is known.
    state: Mutex<State>,
    exit: watch::Sender<Option<ExitStatus>>,
}

#[derive(Debug)]
enum State {
    NotStarted,
    Running { main: Pid, app: App, output: JoinSet<io::Result<()>> },
    Ended,
}

impl Application {
    /// Nothing runs yet.
    pub fn new(logs: Logs) -> Self {
        Self { logs, state: Mutex::new(State::NotStarted), exit: watch::Sender::new(None) }
    }

    /// How the main process ended, once it has and its output has been read.
    pub fn exit(&self) -> watch::Receiver<Option<ExitStatus>> {
        self.exit.subscribe()
    }

    /// Whether the application runs or has run.
    pub async fn has_started(&self) -> bool {
        !matches!(*self.state.lock().await, State::NotStarted)
    }

    /// The main process, and what it was started from; nothing before and after its life.
    pub async fn container(&self) -> Option<(Pid, App)> {
        match &*self.state.lock().await {
            State::Running { main, app, .. } => Some((*main, app.clone())),
            State::NotStarted | State::Ended => None,
        }
    }

    /// Starts the application and returns its process id once its own code runs.
    pub async fn start(&self, app: &App) -> Result<Pid, StartError> {
        let mut state = self.state.lock().await;
        if !matches!(*state, State::NotStarted) {
            return Err(StartError::AlreadyStarted);
        }
        let (control, stdout, stderr) = start_container()?;
        let main = timeout(START_DEADLINE, instruct(control, app)).await.map_err(|_| StartError::Deadline)??;
        let mut output = JoinSet::new();
        for (source, pipe) in [(LogSource::Stdout, stdout), (LogSource::Stderr, stderr)] {
            let pipe = pipe::Receiver::from_owned_fd(OwnedFd::from(pipe))?;
            output.spawn(self.logs.clone().collect(source, pipe));
        }
        *state = State::Running { main, app: app.clone(), output };
        Ok(main)
    }

    /// Asks the application to end.
    pub async fn stop(&self) -> io::Result<()> {
        // The reaper takes the lock first, so that the process id is still the application's.
        match &*self.state.lock().await {
            State::Running { main, app, .. } => stop::stop(*main, app.stop_signal),
            State::NotStarted | State::Ended => Ok(()),
        }
    }

    /// Collects every process that ends, for ever.
    pub async fn reap(&self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            children.recv().await;
            let mut state = self.state.lock().await;
            while let Some((pid, status)) = next_ended() {
                if matches!(&*state, State::Running { main, .. } if *main == pid)
                    && let State::Running { output, .. } = std::mem::replace(&mut *state, State::Ended)
                {
                    let exit = self.exit.clone();
                    tokio::spawn(async move {
                        // What the application said last goes before the news of its end.
                        let _ = timeout(OUTPUT_DEADLINE, output.join_all()).await;
                        exit.send_replace(Some(ExitStatus { out_of_memory: lacked_memory(status), ..status }));
                    });
                }
            }
        }
    }
}

/// One process that has ended, if there is any.
fn next_ended() -> Option<(Pid, ExitStatus)> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => return Some((pid, ExitStatus { code, out_of_memory: false })),
            Ok(WaitStatus::Signaled(pid, signal, _)) => return Some((pid, ExitStatus { code: 128 + signal as i32, out_of_memory: false })),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
            Ok(_) | Err(_) => {}
        }
    }
}

/// Whether a main process that ended so was ended by the kernel, with its whole container, for want of memory.
fn lacked_memory(status: ExitStatus) -> bool {
    const KILLED: i32 = 128 + libc::SIGKILL;
    let kills = || cgroup::out_of_memory_kills().inspect_err(|error| eprintln!("hearth-guest: {error}")).unwrap_or(0);
    status.code == KILLED && kills() > 0
}

/// Starts the container's first process, which has the application's outputs.
fn start_container() -> io::Result<(UnixStream, PipeReader, PipeReader)> {
    let (stdout, their_stdout) = io::pipe()?;
    let (stderr, their_stderr) = io::pipe()?;
    Ok((helper::start(container::ARGUMENT, their_stdout.into(), their_stderr.into())?, stdout, stderr))
}

/// Tells the helper what to run and reads its report, which ends when the application's own code takes over.
async fn instruct(mut control: UnixStream, app: &App) -> Result<Pid, StartError> {
    control.write_all(&serde_json::to_vec(app).map_err(io::Error::from)?).await?;
    control.shutdown().await?;
    let mut report = String::new();
    control.read_to_string(&mut report).await?;
    read_report(&report)
}

fn read_report(report: &str) -> Result<Pid, StartError> {
    if let Some(reason) = report.lines().find_map(|line| line.strip_prefix(container::FAILED)) {
        return Err(StartError::Container(reason.to_owned()));
    }
    let pid = report.lines().find_map(|line| line.strip_prefix(container::PID)?.parse().ok());
    pid.map(Pid::from_raw).ok_or_else(|| StartError::Container("the container's first process ended without a word".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_process_id_or_a_reason() {
        assert_eq!(read_report("pid 12\n").unwrap(), Pid::from_raw(12));
        assert_eq!(read_report("failed /x: no such file\npid 12\n").unwrap_err().to_string(), "/x: no such file");
        assert!(read_report("").is_err());
        assert!(read_report("pid x\n").is_err());
    }
}
