//! The sandbox that a build runs in: an OCI container with the image builder's daemon in it, for one build.
//!
//! Its first process reads from a pipe that only the server holds. When that closes, because the build has ended or the server has died, the
//! process ends, and with it every process of the sandbox.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, lchown},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::{
    UplinkError,
    bundle::{BUILD_DIR, Bundle, FIRST_ID, STORE_DIR},
    process::{Captured, ProcessError, Stop, Stopped, run_captured},
    stores::Store,
    uplink::{Connection, Uplink},
};

/// How long a sandbox may take to end when it is asked to, and after it was killed.
const END: Duration = Duration::from_secs(20);
const KILL: Duration = Duration::from_secs(10);
/// How long each step of the start may take.
const START: Duration = Duration::from_secs(60);
/// Most bytes that are kept of what a sandbox says of its failure.
const WORDS: u64 = 16 << 10;

/// Addresses of the steps of a build, behind the sandbox's own. The first is the bridge's.
const BRIDGE: &str = "10.0.3.1/24";

const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The host's settings that matter for reaching registries.
pub(crate) const INHERITED_ENV: [&str; 6] = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

/// A sandbox could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("connecting the sandbox to the network: {0}")]
    Network(#[from] UplinkError),
    #[error("the image builder did not start: {0}")]
    Start(String),
    #[error("the image builder did not start within {} seconds", START.as_secs())]
    Slow,
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error(transparent)]
    Process(#[from] ProcessError),
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> SandboxError {
    move |source| SandboxError::Io { what, source }
}

/// What all sandboxes of a builder have in common.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// The OCI runtime's directory.
    pub(crate) runtime_dir: PathBuf,
    /// The builder's root file system.
    pub(crate) root: PathBuf,
    /// The managed base image's archive.
    pub(crate) base_archive: PathBuf,
    /// Most memory of a build, in bytes.
    pub(crate) memory: Option<u64>,
    /// Registries that are spoken to without TLS, or without knowing their certificate.
    pub(crate) insecure_registries: Vec<String>,
    /// Registries on this host.
    pub(crate) local_registries: Vec<std::net::SocketAddr>,
}

/// A build's directory: what the sandbox sees of the host beside its store. It cannot write there, so that the server's root never meets a
/// link that the sandbox's root has made.
#[derive(Debug)]
pub(crate) struct WorkDir(pub(crate) PathBuf);

impl WorkDir {
    /// The build's context.
    pub(crate) fn context(&self) -> PathBuf {
        self.0.join("context")
    }

    /// Where the Dockerfile is that BuildKit gets, with its file of patterns. Alone, because a frontend may ask for all that is there.
    pub(crate) fn recipe(&self) -> PathBuf {
        self.0.join("recipe")
    }

    /// The image's disk. Beside the build's directory: the sandbox gets the file, and not the directory that its name is in.
    pub(crate) fn disk(&self) -> PathBuf {
        self.0.with_extension("disk")
    }

    /// Writes the files that a sandbox starts from, and gives everything to the sandbox's root. Blocks.
    fn furnish(&self, host: &Host, connection: &Connection, auths: &str) -> io::Result<()> {
        let scripts =
            [("init.sh", include_str!("init.sh")), ("runtime.sh", include_str!("runtime.sh")), ("flatten.sh", include_str!("flatten.sh"))];
        for (name, text) in scripts {
            let path = self.0.join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        fs::write(self.0.join("daemon.json"), daemon_configuration(host, connection).to_string())?;
        let mut resolvers = String::new();
        for server in &connection.nameservers {
            resolvers.push_str(&format!("nameserver {server}\n"));
        }
        fs::write(self.0.join("resolv.conf"), resolvers)?;
        fs::create_dir_all(self.0.join("docker"))?;
        fs::write(self.0.join("docker/config.json"), auths)?;
        // The disk is mounted over it.
        fs::write(self.0.join("disk"), "")?;
        give_away(&self.0)
    }
}

/// Makes the sandbox's root the owner of a directory and all below it. Links are not followed.
fn give_away(dir: &Path) -> io::Result<()> {
    lchown(dir, Some(FIRST_ID), Some(FIRST_ID))?;
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            lchown(entry.path(), Some(FIRST_ID), Some(FIRST_ID))?;
            if entry.file_type()?.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    Ok(())
}

fn daemon_configuration(host: &Host, connection: &Connection) -> serde_json::Value {
    let dns: Vec<String> = connection.nameservers.iter().map(Ipv4Addr::to_string).collect();
    let mut document = json!({
        "data-root": STORE_DIR, "exec-root": "/run/docker", "pidfile": "/run/docker.pid", "hosts": ["unix:///run/docker.sock"],
        "log-level": "warn", "iptables": false, "ip6tables": false, "userland-proxy": false, "bip": BRIDGE, "mtu": connection.mtu,
        "storage-driver": "overlay2",
        "features": { "buildkit": true, "containerd-snapshotter": false },
        // The cache is kept within its limits from outside.
        "builder": { "gc": { "enabled": false }, "entitlements": { "network-host": false, "security-insecure": false } },
        "insecure-registries": host.insecure_registries,
    });
    if !dns.is_empty() {
        document["dns"] = json!(dns);
    }
    document
}

/// What the runtime knows of a container.
#[derive(serde::Deserialize)]
struct State {
    /// Of its first process, as the host counts.
    pid: i32,
}

/// A sandbox in which the daemon answers.
#[derive(Debug)]
pub(crate) struct Sandbox {
    runtime_dir: PathBuf,
    id: String,
    runtime: Child,
    /// Closing it ends the sandbox.
    input: Option<ChildStdin>,
    init: OwnedFd,
}

impl Sandbox {
    /// Starts the daemon on a store. `auths` is Docker's `config.json` for the registries.
    pub(crate) async fn start(
        host: &Host,
        id: &str,
        store: &Store,
        work: &WorkDir,
        uplink: &mut dyn Uplink,
        auths: String,
        stop: &Stop,
    ) -> Result<Self, SandboxError> {
        let connection = uplink.connection();
        let furnished = {
            let (host, work) = (host.clone(), WorkDir(work.0.clone()));
            tokio::task::spawn_blocking(move || work.furnish(&host, &connection, &auths)).await
        };
        furnished.expect("writing files does not panic").map_err(io_error("preparing the sandbox"))?;
        let has_certificates = Path::new(CERTIFICATES).exists();
        let environment: Vec<(String, String)> =
            INHERITED_ENV.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect();
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

    /// A program in the sandbox, in one of its directories.
    pub(crate) fn command(&self, dir: &str, program: &str) -> Command {
        // The runtime looks for the sandbox's files where they were when it started.
        let runtime = self.runtime.id().map_or_else(|| "0".to_owned(), |id| id.to_string());
        let mut command = Command::new("nsenter");
        command.args(["--target", &runtime, "--mount", "--", "runc", "--root"]).arg(&self.runtime_dir);
        command.args(["exec", "--cwd", dir, &self.id, program]).stdin(Stdio::null());
        command
    }

    /// Runs `docker` and keeps what it prints. The sandbox is killed if it is stopped: the caller must end it then.
    pub(crate) async fn docker(&self, arguments: &[&str], stop: &Stop) -> Result<Captured, ProcessError> {
        let mut command = self.command("/", "docker");
        command.args(arguments);
        self.with_end(stop, run_captured(command, stop)).await
    }

    /// Does something with the sandbox, which is killed when it is time to stop: what the sandbox runs has no other way to hear of that.
    pub(crate) async fn with_end<T>(&self, stop: &Stop, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            _ = stop.reached() => {}
        }
        self.kill_now();
        work.await
    }

    fn kill_now(&self) {
        // Fails only when it is gone already.
        let _ = pidfd_send_signal(&self.init, Signal::KILL);
    }

    /// Ends the sandbox: the daemon writes what it must, then every process is gone.
    pub(crate) async fn end(mut self) {
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

/// Path of a build's file in the sandbox.
pub(crate) fn inside(name: &str) -> String {
    format!("{BUILD_DIR}/{name}")
}
