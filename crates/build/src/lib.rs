//! From a zip with a Dockerfile to a root file system on disk.
//!
//! ```text
//! archive ─▶ context ─┐                                     ┌─▶ progress ─▶ log
//!                     ├─▶ sandbox: dockerd with BuildKit ───┤
//! dockerfile ─────────┘     store of the account's layers   └─▶ flatten ─▶ ext4
//! ```
//!
//! BuildKit runs the Dockerfile, in a `sandbox` that has nothing of the host and a network of its own: namespaces, or a virtual machine. This
//! crate guards what goes in, streams what BuildKit says, and flattens what comes out.

#![forbid(unsafe_code)]

mod archive;
mod base;
mod builder;
mod config;
mod dockerfile;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod ignore;
mod lines;
mod process;
mod progress;
mod registry;
mod reserve;
mod room;
mod root;
mod sandbox;
mod stores;
mod trees;
mod uplink;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use builder::Builder;
pub use error::{BuildError, PrepareError};
pub use registry::{Login, LoginError, Logins};
pub use room::{BuildMachine, MachineDisk, MachineError, MachineSpec, Output, Program, Room};
pub use stores::{CacheLimits, CacheUsage, cache_usage};
pub use uplink::{Connection, Uplink, UplinkError};

/// Makes root file systems out of archives. [`Builder`] is the real one.
#[async_trait]
pub trait ImageBuilder: Send + Sync + 'static {
    /// Runs one build to its end. Nothing of it is left behind but `request.rootfs`, and that only on success.
    async fn build(&self, request: BuildRequest, cancel: CancellationToken) -> Result<Built, BuildError>;
}

/// A file of the guest kit.
#[derive(Debug, Clone)]
pub struct KitFile {
    /// Where it is.
    pub path: PathBuf,
    /// SHA-256 of its contents, in hexadecimal.
    pub sha256: String,
}

/// Where a [`Builder`] keeps its things and what it may use.
#[derive(Debug, Clone)]
pub struct BuilderConfig {
    /// The layer stores, and what else is kept. May be shared by servers.
    pub cache_dir: PathBuf,
    /// Where the builder's root file system is unpacked; `builder` in the cache directory unless it is given. May be shared by servers.
    pub builder_dir: Option<PathBuf>,
    /// Root file system of the stand-in for the managed base image, as a tar archive.
    pub base: KitFile,
    /// Root file system of the builder, as a tar archive.
    pub builder: KitFile,
    /// Names of the managed base image in Dockerfiles, without tag.
    pub base_names: Vec<String>,
    /// Limits of the archive.
    pub limits: ArchiveLimits,
    /// Limits of the layer stores.
    pub cache: CacheLimits,
    /// Most memory of a build in namespaces, in bytes.
    pub memory: Option<u64>,
    /// Bytes of the host's disks that builds leave free.
    pub disk_reserve: u64,
    /// Builds may run in virtual machines: what those boot from is made ready.
    pub machines: bool,
    /// How registries are reached.
    pub registries: Registries,
    /// Longest time a build may take.
    pub deadline: Duration,
}

impl BuilderConfig {
    /// The defaults: AWS's name of the base image, 30 minutes for a build.
    pub fn new(cache_dir: PathBuf, base: KitFile, builder: KitFile) -> Self {
        Self {
            cache_dir,
            builder_dir: None,
            base,
            builder,
            base_names: vec!["public.ecr.aws/lambda/microvms".to_owned()],
            limits: ArchiveLimits::default(),
            cache: CacheLimits::default(),
            memory: None,
            disk_reserve: 0,
            machines: false,
            registries: Registries::default(),
            deadline: Duration::from_secs(30 * 60),
        }
    }
}

/// How registries are reached, beyond what every build may.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Logins of the operator, in the form of Docker's `config.json`.
    pub auth_file: Option<PathBuf>,
    /// Registries (`host` or `host:port`) that are spoken to without TLS, or without knowing their certificate.
    pub insecure: Vec<String>,
    /// Registries on this host's loopback. Builds reach nothing else of the host.
    pub local: Vec<SocketAddr>,
    /// Repository (`host:port/path`) that the managed base image is pulled from instead of its own.
    pub base_mirror: Option<String>,
}

/// What an archive may hold, without what its `.dockerignore` names. A refusal says the settings by their names in the server's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchiveLimits {
    /// Bytes after unpacking: `build_context_mib`.
    pub unpacked_bytes: u64,
    /// Files, links and directories: `build_context_entries`.
    pub entries: u64,
}

impl Default for ArchiveLimits {
    fn default() -> Self {
        Self { unpacked_bytes: 2 << 30, entries: 100_000 }
    }
}

/// One build.
#[derive(Debug)]
pub struct BuildRequest {
    /// Identifier, for names of temporary things.
    pub id: String,
    /// Whose build it is. Accounts share no layers.
    pub account: String,
    /// Uses no layer that is there already, and asks registries for the present base image.
    pub no_cache: bool,
    /// Where it runs. `None` fails it.
    pub room: Option<Room>,
    /// Who may know logins for registries, beside the operator's file.
    pub logins: Option<Arc<dyn Logins>>,
    /// The zip archive.
    pub archive: PathBuf,
    /// Scratch directory; the builder makes it, and deletes it whatever happens.
    pub work_dir: PathBuf,
    /// Where the ext4 image goes.
    pub rootfs: PathBuf,
    /// Size of the file system that the guest sees, in bytes.
    pub disk_bytes: u64,
    /// Receives each line of output as it appears. A slow reader slows the build down.
    pub log: mpsc::Sender<String>,
}

/// What the Dockerfile says about running the image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImageConfig {
    /// ENTRYPOINT followed by CMD.
    pub argv: Vec<String>,
    /// ENV, in order.
    pub env: Vec<(String, String)>,
    /// WORKDIR, `/` by default.
    pub cwd: String,
    /// USER, empty by default.
    pub user: String,
    /// STOPSIGNAL as a number, SIGTERM by default.
    pub stop_signal: i32,
    /// TCP ports of EXPOSE, ascending.
    pub exposed_ports: Vec<u16>,
}

/// A finished build.
#[derive(Debug, Clone)]
pub struct Built {
    /// How to run it.
    pub config: ImageConfig,
    /// Bytes that the root file system's contents take on the disk.
    pub content_bytes: u64,
}
