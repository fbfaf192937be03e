//! Child processes with an end: what they print is passed on as it appears, and a cancelled or late one is killed with everything it started.

use std::{
    io,
    os::fd::OwnedFd,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    process::{Child, Command},
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{MachineError, lines::LineSplitter};

/// How long a killed process may take to disappear.
const REAP: Duration = Duration::from_secs(10);

/// Most bytes kept of a captured stream; the rest is read and dropped.
pub(crate) const CAPTURE_LIMIT: usize = 16 << 20;

/// Longest line that a process may print for `run_translated`. Longer ones are cut.
pub(crate) const MAX_TRANSLATED: usize = 4 << 20;

/// When to stop waiting.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    pub(crate) cancel: CancellationToken,
    pub(crate) deadline: Instant,
}

impl Stop {
    pub(crate) fn after(limit: Duration) -> Self {
        Self { cancel: CancellationToken::new(), deadline: Instant::now() + limit }
    }

    /// For work that cannot be interrupted from outside and has to ask.
    pub(crate) fn check(&self) -> Result<(), Stopped> {
        match self {
            _ if self.cancel.is_cancelled() => Err(Stopped::Cancelled),
            _ if Instant::now() >= self.deadline => Err(Stopped::TimedOut),
            _ => Ok(()),
        }
    }

    /// Waits until it is time.
    pub(crate) async fn reached(&self) -> Stopped {
        tokio::select! {
            () = self.cancel.cancelled() => Stopped::Cancelled,
            () = tokio::time::sleep_until(self.deadline) => Stopped::TimedOut,
        }
    }
}

/// Why work ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stopped {
    #[error("cancelled")]
    Cancelled,
    #[error("the time was up")]
    TimedOut,
}

/// A process could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("starting {program}: {source}")]
    Spawn { program: String, source: io::Error },
    #[error("talking to a child process: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A finished process and what it printed.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

/// Runs a command. Each line of both of its streams, in the order it wrote them, becomes the lines of `log` that `translate` makes of it.
pub(crate) async fn run_translated(
    mut command: Command,
    stop: &Stop,
    log: &mpsc::Sender<String>,
    translate: impl FnMut(&str) -> Vec<String>,
) -> Result<ExitStatus, ProcessError> {
    let (reader, writer) = io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let child = spawn(&mut command)?;
    // The command holds the pipe's write end, and the pipe ends only when every write end is closed.
    drop(command);
    let mut output = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
    match finish(child, forward(&mut output, log, translate), stop).await {
        Err(ProcessError::Stopped(stopped)) => {
            await_end_of(&mut output).await;
            Err(stopped.into())
        }
        other => other,
    }
}

/// Runs a command and keeps what it prints.
pub(crate) async fn run_captured(mut command: Command, stop: &Stop) -> Result<Captured, ProcessError> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(&mut command)?;
    drop(command);
    let mut out = child.stdout.take().expect("stdout was set to a pipe");
    let mut err = child.stderr.take().expect("stderr was set to a pipe");
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let collect = async { tokio::try_join!(collect(&mut out, &mut stdout), collect(&mut err, &mut stderr)).map(|_| ()) };
    match finish(child, collect, stop).await {
        Ok(status) => Ok(Captured { status, stdout, stderr: String::from_utf8_lossy(&stderr).trim().to_owned() }),
        Err(ProcessError::Stopped(stopped)) => {
            await_end_of(&mut out).await;
            Err(stopped.into())
        }
        Err(error) => Err(error),
    }
}

fn spawn(command: &mut Command) -> Result<Child, ProcessError> {
    // A group of its own keeps a terminal's Ctrl-C from reaching a build before the daemon has decided what to do with it.
    command.process_group(0).kill_on_drop(true).spawn().map_err(|source| {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        ProcessError::Spawn { program, source }
    })
}

/// Waits for the output to end and the child to exit, or kills it.
async fn finish(mut child: Child, output: impl Future<Output = io::Result<()>>, stop: &Stop) -> Result<ExitStatus, ProcessError> {
    let work = async {
        output.await?;
        child.wait().await
    };
    let stopped = tokio::select! {
        result = work => return Ok(result?),
        stopped = stop.reached() => stopped,
    };
    if let Some(leader) = child.id().and_then(|id| i32::try_from(id).ok()) {
        // Fails only when the whole group is gone already.
        let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
    }
    timeout(REAP, child.wait()).await.map_err(|_| io::Error::other("a killed process did not exit"))??;
    Err(stopped.into())
}

/// Reads to the end of a pipe: the moment the last process that could still write into it is gone.
async fn await_end_of(output: &mut (impl AsyncRead + Unpin)) {
    let end = timeout(REAP, tokio::io::copy(output, &mut tokio::io::sink())).await;
    if end.is_err() {
        tracing::warn!("processes of a killed build still hold its output after {} seconds", REAP.as_secs());
    }
}

async fn forward(
    output: &mut pipe::Receiver,
    log: &mpsc::Sender<String>,
    mut translate: impl FnMut(&str) -> Vec<String>,
) -> io::Result<()> {
    let mut splitter = LineSplitter::with_longest(MAX_TRANSLATED);
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = output.read(&mut buffer).await?;
        let lines = if read == 0 { splitter.finish().into_iter().collect() } else { splitter.push(&buffer[..read]) };
        for line in lines.iter().flat_map(|line| translate(line)) {
            // A log without a reader is no reason to fail a build.
            let _ = log.send(line).await;
        }
        if read == 0 {
            return Ok(());
        }
    }
}

async fn collect(output: &mut (impl AsyncRead + Unpin), into: &mut Vec<u8>) -> io::Result<()> {
    output.take(CAPTURE_LIMIT as u64).read_to_end(into).await?;
    tokio::io::copy(output, &mut tokio::io::sink()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    fn same(line: &str) -> Vec<String> {
        vec![line.to_owned()]
    }

    async fn logged(script: &str, stop: &Stop) -> (Result<ExitStatus, ProcessError>, Vec<String>) {
        let (sender, mut receiver) = mpsc::channel(1);
        let collect = async {
            let mut lines = Vec::new();
            while let Some(line) = receiver.recv().await {
                lines.push(line);
            }
            lines
        };
        let run = async {
            let result = run_translated(shell(script), stop, &sender, same).await;
            drop(sender);
            result
        };
        tokio::join!(run, collect)
    }

    #[tokio::test]
    async fn both_streams_arrive_in_order() {
        let (result, lines) = logged("echo one; echo two >&2; printf three; exit 3", &Stop::after(REAP)).await;
        assert_eq!(result.unwrap().code(), Some(3));
        assert_eq!(lines, ["one", "two", "three"]);
    }

    #[tokio::test]
    async fn a_listener_that_left_does_not_stop_the_process() {
        let (sender, receiver) = mpsc::channel(1);
        drop(receiver);
        let result = run_translated(shell("for i in 1 2 3; do echo $i; done; exit 7"), &Stop::after(REAP), &sender, same).await;
        assert_eq!(result.unwrap().code(), Some(7));
    }

    #[tokio::test]
    async fn a_late_process_is_killed() {
        let stop = Stop::after(Duration::from_millis(50));
        let started = Instant::now();
        let (result, lines) = logged("echo begun; exec sleep 60", &stop).await;
        assert!(matches!(result, Err(ProcessError::Stopped(Stopped::TimedOut))), "{result:?}");
        assert_eq!(lines, ["begun"]);
        assert!(started.elapsed() < REAP);
    }

    #[tokio::test]
    async fn a_reader_that_stopped_reading_does_not_delay_a_cancellation() {
        let stop = Stop::after(REAP * 6);
        let (sender, mut receiver) = mpsc::channel(1);
        let run = run_translated(shell("yes"), &stop, &sender, same);
        let cancel = async {
            receiver.recv().await.expect("yes says y");
            stop.cancel.cancel();
        };
        let (result, ()) = tokio::join!(run, cancel);
        assert!(matches!(result, Err(ProcessError::Stopped(Stopped::Cancelled))), "{result:?}");
    }

    #[tokio::test]
    async fn output_and_errors_are_captured_apart() {
        let captured = run_captured(shell("echo out; echo err >&2; exit 1"), &Stop::after(REAP)).await.unwrap();
        assert_eq!((captured.stdout.as_slice(), captured.stderr.as_str()), (b"out\n".as_slice(), "err"));
        assert_eq!(captured.status.code(), Some(1));
    }
}
