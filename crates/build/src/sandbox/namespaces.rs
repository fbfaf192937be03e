//! A sandbox in namespaces of this host: an OCI container.
//!
//! Its first process reads from a pipe that only the server holds. When that closes, because the build has ended or the server has died, the
//! process ends, and with it every process of the sandbox.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use super::{CERTIFICATES, Call, Host, KILL, START, SandboxError, WorkDir, bundle::Bundle, environment, has_certificates, io_error};
use crate::{
    process::{Stop, run_captured},
    stores::Store,
    uplink::Uplink,
};

/// How long a sandbox may take to end when it is asked to.
const END: Duration = Duration::from_secs(20);
/// Most bytes that are kept of what a sandbox says of its failure.
const WORDS: u64 = 16 << 10;

/// What the runtime knows of a container.
#[derive(serde::Deserialize)]
struct State {
    /// Of its first process, as the host counts.
    pid: i32,
}

/// A container in which the daemon answers.
#[derive(Debug)]
pub(crate) struct Container {
    runtime_dir: PathBuf,
    id: String,
    runtime: Child,
    /// Closing it ends the sandbox.
    input: Option<ChildStdin>,
    init: OwnedFd,
}

impl Container {
    /// Starts the daemon on a store.
    pub(super) async fn start(
        host: &Host,
        id: &str,
        store: &Store,
        work: &WorkDir,
        uplink: &mut dyn Uplink,
        stop: &Stop,
    ) -> Result<Self, SandboxError> {
        let has_certificates = has_certificates();
        let environment = environment();
        let control_group = format!("/{id}");
        let bundle =
            Bundle { certificates: has_certificates, control_group: &control_group, memory: host.memory, environment: &environment };
        // Beside the build's directory, which the sandbox may read.
        let bundle_dir = work.0.with_extension("bundle");
        let written =
            fs::create_dir_all(&bundle_dir).and_then(|()| fs::write(bundle_dir.join("config.json"), bundle.document().to_string()));
        written.map_err(io_error("writing the sandbox's description"))?;

        // What a runtime that was killed has left.
        run_captured(runc(&host.runtime_dir, &["delete", "--force", id]), stop).await?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--", "sh", "-c", include_str!("enter.sh"), "enter.sh"]);
        command.args([&host.root, &store.data(), &work.0, &work.disk(), &host.base_archive]).arg(if has_certificates {
            CERTIFICATES
        } else {
            ""
        });
        command.arg("runc").arg("--root").arg(&host.runtime_dir).args(["run", "--bundle"]).arg(&bundle_dir);
        command.arg(id);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        // As long as the runtime lives, the store is in use.
        let lock = store.lock.try_clone().map_err(io_error("sharing the store's lock"))?.into();
        let mapped = command.fd_mappings(vec![FdMapping { parent_fd: lock, child_fd: 3 }]);
        mapped.map_err(|error| io_error("sharing the store's lock")(io::Error::other(error)))?;
        let mut runtime = command.spawn().map_err(io_error("starting the OCI runtime (runc)"))?;
        drop(command);
        let mut input = runtime.stdin.take().expect("standard input was requested as a pipe");
        let mut output = BufReader::new(runtime.stdout.take().expect("standard output was requested as a pipe"));

        let begin = async {
            expect(&mut output, "ready").await?;
            let state = run_captured(runc(&host.runtime_dir, &["state", id]), stop).await?;
            let State { pid: number } = serde_json::from_slice(&state.stdout)
                .map_err(|_| SandboxError::Start(format!("the OCI runtime lost it: {}", state.stderr)))?;
            let pid = Pid::from_raw(number).ok_or_else(|| SandboxError::Start("its process id is 0".to_owned()))?;
            let init = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| io_error("watching the sandbox")(error.into()))?;
            uplink.connect(number.unsigned_abs()).await?;
            for address in &host.local_registries {
                uplink.share(*address).await?;
            }
            input.write_all(b"go\n").await.map_err(io_error("talking to the sandbox"))?;
            expect(&mut output, "up").await?;
            Ok(init)
        };
        let begun = tokio::select! {
            begun = timeout(START, begin) => begun.unwrap_or(Err(SandboxError::Slow)),
            stopped = stop.reached() => Err(stopped.into()),
        };
        match begun {
            Ok(init) => Ok(Self { runtime_dir: host.runtime_dir.clone(), id: id.to_owned(), runtime, input: Some(input), init }),
            Err(error) => {
                drop(input);
                let words = last_words(&mut runtime).await;
                let _ = run_captured(runc(&host.runtime_dir, &["delete", "--force", id]), &Stop::after(KILL)).await;
                let _ = timeout(KILL, runtime.wait()).await;
                Err(match error {
                    SandboxError::Start(reason) => SandboxError::Start(if words.is_empty() { reason } else { words }),
                    other => other,
                })
            }
        }
    }

    /// The command that runs a program in the container.
    pub(super) fn command(&self, call: &Call) -> Command {
        // The runtime looks for the container's files where they were when it started.
        let runtime = self.runtime.id().map_or_else(|| "0".to_owned(), |id| id.to_string());
        let mut command = Command::new("nsenter");
        command.args(["--target", &runtime, "--mount", "--", "runc", "--root"]).arg(&self.runtime_dir);
        command.args(["exec", "--cwd", call.dir, &self.id]).args(&call.argv).stdin(Stdio::null());
        command
    }

    pub(super) fn kill_now(&self) {
        // Fails only when it is gone already.
        let _ = pidfd_send_signal(&self.init, Signal::KILL);
    }

    /// Kills the runtime before it can tidy up, then the container.
    #[cfg(test)]
    pub(crate) fn kill_runtime(&self) {
        let runtime = self.runtime.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).expect("it runs");
        rustix::process::kill_process(runtime, Signal::KILL).unwrap();
        self.kill_now();
    }

    /// Ends the sandbox: the daemon writes what it must, then every process is gone.
    pub(super) async fn end(mut self) {
        drop(self.input.take());
        if timeout(END, self.runtime.wait()).await.is_ok() {
            return;
        }
        tracing::warn!(sandbox = self.id, "a build's sandbox did not end within {} seconds and is killed", END.as_secs());
        self.kill_now();
        if timeout(KILL, self.runtime.wait()).await.is_err() {
            tracing::error!(sandbox = self.id, "a build's sandbox was killed and did not end");
        }
    }
}

/// A container in the runtime's list.
#[derive(serde::Deserialize)]
struct Listed {
    id: String,
    status: String,
}

/// Deletes what is left of containers whose runtime was killed: their records and control groups. Those that run stay, whosever they are.
pub(crate) async fn sweep(runtime_dir: &Path) -> Result<(), SandboxError> {
    let limit = Stop::after(START);
    let listed = run_captured(runc(runtime_dir, &["list", "--format", "json"]), &limit).await?;
    // There is no list without the directory.
    let containers: Option<Vec<Listed>> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
    for Listed { id, .. } in containers.unwrap_or_default().into_iter().filter(|container| container.status == "stopped") {
        tracing::info!(sandbox = id, "deleting what is left of a build's sandbox");
        run_captured(runc(runtime_dir, &["delete", "--force", &id]), &limit).await?;
    }
    Ok(())
}

async fn expect(output: &mut BufReader<ChildStdout>, word: &str) -> Result<(), SandboxError> {
    let mut line = String::new();
    let mut limited = output.take(WORDS);
    limited.read_line(&mut line).await.map_err(io_error("reading from the sandbox"))?;
    if line.trim() == word { Ok(()) } else { Err(SandboxError::Start(format!("it said {line:?} instead of {word:?}"))) }
}

/// What the runtime and the sandbox's first process have written to their standard error.
async fn last_words(runtime: &mut Child) -> String {
    let Some(stderr) = runtime.stderr.take() else { return String::new() };
    let mut text = Vec::new();
    let _ = timeout(KILL, stderr.take(WORDS).read_to_end(&mut text)).await;
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn runc(runtime_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(runtime_dir).args(arguments).stdin(Stdio::null());
    command
}
