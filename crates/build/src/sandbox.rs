//! What a build runs in: a root file system of its own with the image builder's daemon in it, for one build. Either in namespaces of this host
//! or in a virtual machine; what runs inside is the same.

mod bundle;
mod machine;
mod namespaces;
mod seccomp;

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{PermissionsExt, lchown},
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use serde_json::json;
use tokio::{sync::mpsc, task::spawn_blocking};

pub(crate) use self::bundle::{BASE_ARCHIVE, DISK, FIRST_ID};
pub(crate) use self::namespaces::sweep;
use self::{
    bundle::{BUILD_DIR, STORE_DIR},
    machine::Machine,
    namespaces::Container,
};
use crate::{
    MachineError, Room, UplinkError,
    process::{Captured, ProcessError, Stop, Stopped, run_captured, run_translated},
    stores::{Store, StoreError},
    uplink::Connection,
};

/// How long each step of the start may take. A virtual machine whose processor is emulated needs most of it.
const START: Duration = Duration::from_secs(120);
/// How long a sandbox may take to end after it was killed.
const KILL: Duration = Duration::from_secs(10);

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
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Store(#[from] StoreError),
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
    /// The builder's root file system, and the same as a disk if builds run in machines.
    pub(crate) root: PathBuf,
    pub(crate) root_disk: Option<PathBuf>,
    /// The managed base image's archive.
    pub(crate) base_archive: PathBuf,
    /// Most memory of a build, in bytes.
    pub(crate) memory: Option<u64>,
    /// Registries that are spoken to without TLS, or without knowing their certificate.
    pub(crate) insecure_registries: Vec<String>,
    /// Registries on this host.
    pub(crate) local_registries: Vec<SocketAddr>,
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

    /// Writes the files that a sandbox starts from. Blocks.
    fn furnish(&self, host: &Host, connection: Option<&Connection>, auths: &str) -> io::Result<()> {
        let scripts = [
            ("init.sh", include_str!("sandbox/init.sh")),
            ("machine.sh", include_str!("sandbox/machine.sh")),
            ("daemon.sh", include_str!("sandbox/daemon.sh")),
            ("runtime.sh", include_str!("runtime.sh")),
            ("flatten.sh", include_str!("flatten.sh")),
        ];
        for (name, text) in scripts {
            let path = self.0.join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        fs::write(self.0.join("daemon.json"), daemon_configuration(host, connection).to_string())?;
        let resolvers = connection.into_iter().flat_map(|connection| &connection.nameservers);
        let resolvers: String = resolvers.map(|server| format!("nameserver {server}\n")).collect();
        fs::write(self.0.join("resolv.conf"), resolvers)?;
        fs::create_dir_all(self.0.join("docker"))?;
        fs::write(self.0.join("docker/config.json"), auths)?;
        // The disk takes its place.
        fs::write(self.0.join("disk"), "")
    }
}

/// Whether the host has certificate authorities to share.
fn has_certificates() -> bool {
    Path::new(CERTIFICATES).exists()
}

/// Variables of the host for the daemon and for what runs beside it.
fn environment() -> Vec<(String, String)> {
    INHERITED_ENV.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect()
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

/// A daemon whose connection is not said finds it out.
fn daemon_configuration(host: &Host, connection: Option<&Connection>) -> serde_json::Value {
    let mut document = json!({
        "data-root": STORE_DIR, "exec-root": "/run/docker", "pidfile": "/run/docker.pid", "hosts": ["unix:///run/docker.sock"],
        "log-level": "warn", "iptables": false, "ip6tables": false, "userland-proxy": false, "bip": BRIDGE,
        "storage-driver": "overlay2",
        "features": { "buildkit": true, "containerd-snapshotter": false },
        // The cache is kept within its limits from outside.
        "builder": { "gc": { "enabled": false }, "entitlements": { "network-host": false, "security-insecure": false } },
        "insecure-registries": host.insecure_registries,
    });
    if let Some(Connection { nameservers, mtu }) = connection {
        document["mtu"] = json!(mtu);
        if !nameservers.is_empty() {
            document["dns"] = json!(nameservers.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>());
        }
    }
    document
}

/// A program to run in a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Where it starts.
    dir: &'static str,
    argv: Vec<String>,
}

impl Call {
    pub(crate) fn new(program: &str) -> Self {
        Self { dir: "/", argv: vec![program.to_owned()] }
    }

    pub(crate) fn within(mut self, dir: &'static str) -> Self {
        self.dir = dir;
        self
    }

    pub(crate) fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.argv.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }
}

/// A sandbox in which the daemon answers.
#[derive(Debug)]
pub(crate) enum Sandbox {
    Container(Box<Container>),
    Machine(Machine),
}

impl Sandbox {
    /// Starts the daemon on a store. `auths` is Docker's `config.json` for the registries.
    pub(crate) async fn start(
        host: &Host,
        id: &str,
        store: &Store,
        work: &WorkDir,
        room: &mut Room,
        auths: String,
        stop: &Stop,
    ) -> Result<Self, SandboxError> {
        let connection = match room {
            Room::Namespaces(uplink) => Some(uplink.connection()),
            Room::Machine(_) => None,
        };
        let furnished = {
            let (host, work) = (host.clone(), WorkDir(work.0.clone()));
            spawn_blocking(move || {
                work.furnish(&host, connection.as_ref(), &auths)?;
                // A machine gets a copy.
                if connection.is_some() { give_away(&work.0) } else { Ok(()) }
            })
        };
        furnished.await.expect("writing files does not panic").map_err(io_error("preparing the sandbox"))?;
        Ok(match room {
            Room::Namespaces(uplink) => Self::Container(Box::new(Container::start(host, id, store, work, uplink.as_mut(), stop).await?)),
            Room::Machine(machine) => Self::Machine(Machine::start(host, id, store, work, machine, stop).await?),
        })
    }

    /// Runs a program and keeps what it prints. The sandbox is killed when it is time to stop, because what it runs has no other way to hear of
    /// that: the caller must end it then.
    pub(crate) async fn capture(&self, call: Call, stop: &Stop) -> Result<Captured, ProcessError> {
        match self {
            Self::Container(container) => self.with_end(stop, run_captured(container.command(&call), stop)).await,
            Self::Machine(machine) => self.with_end(stop, machine.capture(call, stop)).await,
        }
    }

    /// Runs a program. Each line that it prints becomes the lines of `log` that `translate` makes of it.
    pub(crate) async fn translate(
        &self,
        call: Call,
        stop: &Stop,
        log: &mpsc::Sender<String>,
        translate: impl FnMut(&str) -> Vec<String>,
    ) -> Result<ExitStatus, ProcessError> {
        match self {
            Self::Container(container) => self.with_end(stop, run_translated(container.command(&call), stop, log, translate)).await,
            Self::Machine(machine) => self.with_end(stop, machine.translate(call, stop, log, translate)).await,
        }
    }

    /// Runs `docker` and keeps what it prints.
    pub(crate) async fn docker(&self, arguments: &[&str], stop: &Stop) -> Result<Captured, ProcessError> {
        self.capture(Call::new("docker").args(arguments), stop).await
    }

    async fn with_end<T>(&self, stop: &Stop, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            _ = stop.reached() => {}
        }
        match self {
            Self::Container(container) => container.kill_now(),
            Self::Machine(machine) => machine.kill().await,
        }
        work.await
    }

    /// Ends the sandbox: the daemon writes what it must, then every process is gone.
    pub(crate) async fn end(self) {
        match self {
            Self::Container(container) => container.end().await,
            Self::Machine(machine) => machine.end().await,
        }
    }
}

/// Path of a build's file in the sandbox.
pub(crate) fn inside(name: &str) -> String {
    format!("{BUILD_DIR}/{name}")
}
