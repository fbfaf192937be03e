//! `hearth exec` and `hearth shell`: a process in a MicroVM, as if it ran here.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{
    terminal::{self, Raw},
    tunnel::{Endpoint, Received, Socket},
};
use crate::client::Client;

const PROTOCOL: &str = "hearth.exec.v1";
/// How much input may be under way, by the protocol.
const WINDOW: usize = 256 << 10;
const CHUNK: usize = 16 << 10;

/// First byte of binary messages.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;

/// Exit codes of what is no process's own, as other tools have them.
const LOST: u8 = 255;
const NOT_STARTED: u8 = 126;
const NOT_FOUND: u8 = 127;
/// 128 and the signal's number.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

/// A process's end comes with its last output; a user who interrupts twice within this wants out.
const IMPATIENCE: Duration = Duration::from_secs(3);

/// `hearth exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Id, or the beginning of one that fits one MicroVM only.
    id: String,
    /// On a terminal, instead of pipes.
    #[arg(short, long)]
    tty: bool,
    /// Variable beside those of the app; without a value, the one of this environment.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory [default: the app's].
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User as a Dockerfile's USER has it [default: the app's].
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Give it an empty standard input.
    #[arg(short = 'n', long)]
    no_stdin: bool,
    /// The program and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `hearth shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// Id, or the beginning of one that fits one MicroVM only.
    id: String,
    /// User as a Dockerfile's USER has it.
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]", default_value = "0")]
    user: String,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Say {
    Start { argv: Vec<String>, env: BTreeMap<String, String>, cwd: Option<String>, user: Option<String>, terminal: Option<Size> },
    StdinEnd,
    Resize { cols: u16, rows: u16 },
    Signal { signal: i32 },
}

#[derive(Debug, Serialize)]
struct Size {
    cols: u16,
    rows: u16,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Told {
    Started,
    Window { bytes: usize },
    Exited { code: i32 },
    Failed { reason: String },
}

/// `hearth exec`: its exit code is the process's.
pub async fn exec(client: Client, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let env = args.env.iter().filter_map(|variable| variable_of(variable, |name| std::env::var(name).ok())).collect();
    let start = Say::Start { argv: args.command, env, cwd: args.workdir, user: args.user, terminal: args.tty.then(size) };
    run(client, &args.id, start, args.tty, !args.no_stdin).await
}

/// `hearth shell`: its exit code is the shell's.
pub async fn shell(client: Client, args: ShellArgs) -> anyhow::Result<ExitCode> {
    let env = std::env::var("TERM").map(|term| ("TERM".to_owned(), term)).into_iter().collect();
    let start = Say::Start { argv: Vec::new(), env, cwd: None, user: Some(args.user), terminal: Some(size()) };
    run(client, &args.id, start, true, true).await
}

/// `NAME=VALUE`, or a `NAME` that has a value here.
fn variable_of(text: &str, here: impl Fn(&str) -> Option<String>) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.to_owned(), value.to_owned())),
        None => here(text).map(|value| (text.to_owned(), value)),
    }
}

fn size() -> Size {
    let (cols, rows) = terminal::size();
    Size { cols, rows }
}

async fn run(client: Client, id: &str, start: Say, tty: bool, stdin: bool) -> anyhow::Result<ExitCode> {
    let endpoint = Endpoint::find(client, id).await?;
    let mut socket = endpoint.websocket(PROTOCOL).await?;
    socket.text(&start).await?;
    let raw = if tty { Some(Raw::enter().context("making the terminal raw")?) } else { None };
    let ended = Session::new(socket, tty)?.run(stdin).await;
    // Before anything is said on it.
    drop(raw);
    Ok(ExitCode::from(match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hearth: {error:#}");
            LOST
        }
    }))
}

struct Session {
    socket: Socket,
    tty: bool,
    /// Sent, but not yet taken by the process.
    under_way: usize,
    interrupted: Option<tokio::time::Instant>,
    window_change: Signal,
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Session {
    fn new(socket: Socket, tty: bool) -> std::io::Result<Self> {
        Ok(Self {
            socket,
            tty,
            under_way: 0,
            interrupted: None,
            window_change: signal(SignalKind::window_change())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Until the process's end, whose code it returns, or a signal that ends this side.
    async fn run(mut self, stdin: bool) -> anyhow::Result<u8> {
        let mut input = None;
        loop {
            let may_send = self.under_way + CHUNK <= WINDOW;
            tokio::select! {
                received = self.socket.next() => match received? {
                    Received::Text(Told::Started) => input = Some(if stdin { read_input() } else { no_input() }),
                    Received::Text(Told::Window { bytes }) => self.under_way = self.under_way.saturating_sub(bytes),
                    Received::Text(Told::Exited { code }) => return Ok(u8::try_from(code).unwrap_or(LOST)),
                    Received::Text(Told::Failed { reason }) => {
                        eprint!("hearth: {reason}{}", if self.tty { "\r\n" } else { "\n" });
                        return Ok(if reason.contains("not found") || reason.contains("no such file") { NOT_FOUND } else { NOT_STARTED });
                    }
                    Received::Binary(bytes) => write_out(&bytes).await?,
                },
                chunk = next_input(&mut input), if may_send => match chunk {
                    Some(chunk) => {
                        self.under_way += chunk.len();
                        let mut message = Vec::with_capacity(1 + chunk.len());
                        message.push(STDIN);
                        message.extend_from_slice(&chunk);
                        self.socket.binary(message).await?;
                    }
                    None => {
                        input = None;
                        self.socket.text(&Say::StdinEnd).await?;
                    }
                },
                _ = self.window_change.recv(), if self.tty => {
                    let Size { cols, rows } = size();
                    self.socket.text(&Say::Resize { cols, rows }).await?;
                }
                _ = self.interrupt.recv() => {
                    let now = tokio::time::Instant::now();
                    if self.interrupted.replace(now).is_some_and(|before| now - before < IMPATIENCE) {
                        return Ok(INTERRUPTED);
                    }
                    self.socket.text(&Say::Signal { signal: SignalKind::interrupt().as_raw_value() }).await?;
                }
                _ = self.terminate.recv() => return Ok(TERMINATED),
                _ = self.hang_up.recv() => return Ok(TERMINATED),
            }
        }
    }
}

async fn write_out(message: &[u8]) -> std::io::Result<()> {
    let Some((&channel, bytes)) = message.split_first() else { return Ok(()) };
    if channel == STDOUT {
        let mut out = tokio::io::stdout();
        out.write_all(bytes).await?;
        out.flush().await
    } else {
        let mut out = tokio::io::stderr();
        out.write_all(bytes).await?;
        out.flush().await
    }
}

/// Reads standard input on a thread of its own, which ends with the program: a read of a terminal cannot be given up.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(2);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut chunk = vec![0; CHUNK];
        loop {
            match stdin.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(count) if sender.blocking_send(chunk[..count].to_vec()).is_err() => return,
                Ok(_) => {}
            }
        }
    });
    receiver
}

fn no_input() -> mpsc::Receiver<Vec<u8>> {
    mpsc::channel(1).1
}

/// The next piece; `None` at the end; waits for ever before the start and after the end.
async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_have_their_value_or_the_one_of_here() {
        let here = |name: &str| (name == "HERE").then(|| "value".to_owned());
        let pair = |name: &str, value: &str| Some((name.to_owned(), value.to_owned()));
        assert_eq!(variable_of("A=b=c", here), pair("A", "b=c"));
        assert_eq!(variable_of("A=", here), pair("A", ""));
        assert_eq!(variable_of("HERE", here), pair("HERE", "value"));
        assert_eq!(variable_of("NOT_HERE", here), None);
    }
}
