//! From a zip with a Dockerfile to a root file system on disk.
//!
//! buildah runs the Dockerfile; this crate guards what goes in (archive), streams what it says (log), and flattens what comes out (ext4).

#![forbid(unsafe_code)]

mod archive;
mod base;
mod builder;
mod config;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod lines;
mod process;
mod storage;
mod workshop;

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use builder::Builder;
pub use error::{BuildError, PrepareError};

/// Makes root file systems out of archives. [`Builder`] is the real one.
#[async_trait]
pub trait ImageBuilder: Send + Sync + 'static {
    /// Runs one build to its end. Nothing of it is left behind but `request.rootfs`, and that only on success.
    async fn build(&self, request: BuildRequest, cancel: CancellationToken) -> Result<Built, BuildError>;
}

/// Where a [`Builder`] keeps its things and what it may use.
#[derive(Debug, Clone)]
pub struct BuilderConfig {
    /// buildah's storage and layer cache. May be shared by servers that run one after the other.
    pub cache_dir: PathBuf,
    /// Root file system of the managed base image, as a tar archive from the guest kit.
    pub base_image: PathBuf,
    /// Names under which Dockerfiles find the managed base image when its registry cannot be reached.
    pub base_names: Vec<String>,
    /// Limits of the archive.
    pub limits: ArchiveLimits,
    /// Longest time a build may take.
    pub deadline: Duration,
}

impl BuilderConfig {
    /// The defaults: AWS's name of the base image, 30 minutes for a build.
    pub fn new(cache_dir: PathBuf, base_image: PathBuf) -> Self {
        Self {
            cache_dir,
            base_image,
            base_names: vec!["public.ecr.aws/lambda/microvms:al2023-minimal".to_owned()],
            limits: ArchiveLimits::default(),
            deadline: Duration::from_secs(30 * 60),
        }
    }
}

/// What an archive may hold.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveLimits {
    /// Bytes after unpacking.
    pub unpacked_bytes: u64,
    /// Files and directories.
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
