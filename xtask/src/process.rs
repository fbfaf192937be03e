//! Runs other programs. Every wait has a deadline, and what a program prints arrives as events, so nothing here polls.

use std::{
    io::{self, BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{SigHandler, Signal, kill, signal},
    unistd::Pid,
};

/// How long a program that was asked to stop may take to tidy up before it is killed.
const GRACE: Duration = Duration::from_secs(60);

/// What a program may do with its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// It goes where ours goes.
    Inherit,
    /// Both streams come to us, line by line.
    Lines,
}

enum Event {
    Line(String),
    Exited(io::Result<ExitStatus>),
}

/// A program that was started. Killed when dropped before it ended.
pub struct Process {
    what: String,
    pid: Pid,
    events: Receiver<Event>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts a program; `what` names it in errors.
    pub fn start(what: &str, command: &mut Command, output: Output) -> Result<Self> {
        let (sender, events) = mpsc::channel();
        command.stdin(Stdio::null());
        if output == Output::Lines {
            let (reader, writer) = io::pipe().context("making a pipe")?;
            command.stdout(writer.try_clone().context("making a pipe")?).stderr(writer);
            forward_lines(reader, sender.clone());
        }
        listen_to_interrupts(command);
        let mut child = command.spawn().with_context(|| format!("starting {what} ({})", command.get_program().display()))?;
        // The command keeps our ends of the pipe; the reader sees the end of the stream only when they are closed.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let pid = Pid::from_raw(i32::try_from(child.id()).context("the process id does not fit")?);
        thread::spawn(move || {
            let status = child.wait();
            // The receiver is gone when nobody waits any more.
            let _ = sender.send(Event::Exited(status));
        });
        Ok(Self { what: what.to_owned(), pid, events, status: None })
    }

    /// The next line the program prints. `None` when it has ended, or when the deadline passed.
    pub fn line(&mut self, deadline: Instant) -> Result<Option<String>> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Line(line)) => return Ok(Some(line)),
            Ok(Event::Exited(status)) => self.status = Some(status.with_context(|| format!("waiting for {}", self.what))?),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        Ok(None)
    }

    /// How the program ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Waits until the program ends, handing each line it prints to `on_line`. Past the limit it is interrupted, then killed.
    pub fn finish(mut self, limit: Duration, mut on_line: impl FnMut(&str)) -> Result<ExitStatus> {
        if let Some(status) = self.drain(Instant::now() + limit, &mut on_line)? {
            return Ok(status);
        }
        self.signal(Signal::SIGINT);
        if self.drain(Instant::now() + GRACE, &mut on_line)?.is_none() {
            self.signal(Signal::SIGKILL);
        }
        bail!("{} did not end within {} s", self.what, limit.as_secs())
    }

    /// Asks the program to stop and waits until it has, or kills it past the limit.
    pub fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        match self.drain(Instant::now() + limit, &mut |_| ())? {
            Some(status) => Ok(status),
            None => {
                self.signal(Signal::SIGKILL);
                bail!("{} did not stop within {} s of SIGTERM and was killed", self.what, limit.as_secs())
            }
        }
    }

    /// The program's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// After the program itself has ended, its output may be held open by something it left behind: that is waited for only briefly.
    fn drain(&mut self, deadline: Instant, on_line: &mut dyn FnMut(&str)) -> Result<Option<ExitStatus>> {
        while self.status.is_none() && Instant::now() < deadline {
            if let Some(line) = self.line(deadline)? {
                on_line(&line);
            }
        }
        if self.status.is_some() {
            let rest = Instant::now() + Duration::from_secs(2);
            while let Some(line) = self.line(rest)? {
                on_line(&line);
            }
        }
        Ok(self.status)
    }

    fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            // It may have ended by itself a moment ago: that is what was wanted.
            let _ = kill(self.pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// A shell that starts us in the background lets us, and all that we start, ignore SIGINT, which is how programs are ended past their limit.
#[expect(unsafe_code, reason = "the signal's action can only be set between fork and exec")]
fn listen_to_interrupts(command: &mut Command) {
    // SAFETY: signal(2) is async-signal-safe, and the default action runs no code of ours.
    unsafe {
        command.pre_exec(|| {
            signal(Signal::SIGINT, SigHandler::SigDfl)?;
            Ok(())
        });
    }
}

fn forward_lines(reader: impl Read + Send + 'static, sender: Sender<Event>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned();
            if sender.send(Event::Line(line)).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}

/// Runs a program whose output goes where ours goes; fails unless it succeeds.
pub fn run(what: &str, command: &mut Command, limit: Duration) -> Result<()> {
    let status = Process::start(what, command, Output::Inherit)?.finish(limit, |_| ())?;
    if status.success() { Ok(()) } else { bail!("{what} failed: {status}") }
}

/// Runs a program and returns how it ended and all that it printed.
pub fn capture(what: &str, command: &mut Command, limit: Duration) -> Result<(ExitStatus, String)> {
    let mut text = String::new();
    let status = Process::start(what, command, Output::Lines)?.finish(limit, |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok((status, text))
}

/// Runs a program and returns what it printed; fails, with that, unless it succeeds.
pub fn output(what: &str, command: &mut Command, limit: Duration) -> Result<String> {
    let (status, text) = capture(what, command, limit)?;
    if status.success() { Ok(text) } else { bail!("{what} failed: {status}\n{}", text.trim_end()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn both_streams_come_in_order_with_the_status() {
        let (status, text) = capture("a shell", &mut shell("echo one; echo two >&2; echo three; exit 3"), Duration::from_secs(20)).unwrap();
        assert_eq!(text, "one\ntwo\nthree\n");
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn a_program_past_its_limit_is_ended() {
        let started = Instant::now();
        let error = run("a sleeper", &mut shell("exec sleep 300"), Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("did not end within"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30), "SIGINT ends it at once");
    }

    #[test]
    fn output_held_open_by_a_child_does_not_hang() {
        let started = Instant::now();
        let (status, text) = capture("a parent", &mut shell("sleep 20 & echo done"), Duration::from_secs(15)).unwrap();
        assert!(status.success());
        assert_eq!(text, "done\n");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_line_that_does_not_come_is_waited_for_only_so_long() {
        let mut process = Process::start("a sleeper", &mut shell("exec sleep 300"), Output::Lines).unwrap();
        assert_eq!(process.line(Instant::now() + Duration::from_millis(50)).unwrap(), None);
        assert!(process.ended().is_none());
        assert!(process.stop(Duration::from_secs(20)).is_ok());
    }
}
