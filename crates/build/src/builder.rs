//! The real builder: unpack, run the Dockerfile, read its configuration, flatten.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
};

use async_trait::async_trait;
use tokio::{
    process::Command,
    sync::OnceCell,
    task::spawn_blocking,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::{
    BuildError, BuildRequest, BuilderConfig, Built, ImageBuilder, ImageConfig, PrepareError,
    archive::{self, ArchiveError},
    base,
    config::{self, ConfigError},
    process::{ProcessError, Stop, Stopped, run_captured},
    storage::{StorageError, Surroundings},
    workshop::Workshop,
};

/// Programs that a build runs, how to ask each for its version, and the Debian package it is in.
const TOOLS: [(&str, &str, &str); 3] =
    [("buildah", "--version", "buildah"), ("mke2fs", "-V", "e2fsprogs"), ("unshare", "--version", "util-linux")];

/// Builds images with buildah. Needs root.
#[derive(Debug)]
pub struct Builder {
    config: BuilderConfig,
    workshop: OnceCell<Arc<Workshop>>,
}

impl Builder {
    /// A builder that keeps its things as `config` says. Call [`Builder::prepare`] before the first build.
    pub fn new(config: BuilderConfig) -> Self {
        Self { config, workshop: OnceCell::new() }
    }

    /// Makes the cache ready: removes what a killed predecessor left, and imports the managed base image if it is new or has changed.
    /// May be called again, and by several processes at once.
    pub async fn prepare(&self) -> Result<(), PrepareError> {
        for tool in TOOLS {
            check_tool(tool).await?;
        }
        let dir = &self.config.cache_dir;
        make_private_directory(dir).map_err(|error| PrepareError(format!("making {}: {error}", dir.display())))?;
        // buildah and its children have other working directories than we do.
        let dir = std::path::absolute(dir).map_err(|error| PrepareError(format!("finding {}: {error}", dir.display())))?;
        let _turn = Workshop::turn(&dir).await.map_err(PrepareError::from_display)?;
        let workshop = self.workshop.get_or_try_init(|| async { Workshop::open(&dir).await.map(Arc::new) }).await;
        let workshop = workshop.map_err(PrepareError::from_display)?;
        let _building = workshop.begin().await.map_err(PrepareError::from_display)?;
        let BuilderConfig { base_image, base_names, .. } = &self.config;
        base::ensure(&workshop.storage, &dir, base_image, base_names).await.map_err(PrepareError::from_display)
    }
}

#[async_trait]
impl ImageBuilder for Builder {
    async fn build(&self, mut request: BuildRequest, cancel: CancellationToken) -> Result<Built, BuildError> {
        let workshop = self.workshop.get().ok_or_else(|| BuildError::Platform("the builder is not prepared".to_owned()))?;
        for path in [&mut request.work_dir, &mut request.rootfs] {
            *path = std::path::absolute(&path).map_err(|error| io_error("finding the build's directories", &error))?;
        }
        let build = Build { workshop: Arc::clone(workshop), config: self.config.clone(), request };
        // In a task of its own, so that a caller who stops waiting cancels the build instead of leaving it half cleaned up.
        let cancel = cancel.child_token();
        let abandoned = cancel.clone().drop_guard();
        let result = tokio::spawn(build.run(cancel)).await;
        abandoned.disarm();
        result.unwrap_or_else(|error| Err(BuildError::Platform(format!("the build ended in a panic: {error}"))))
    }
}

/// One build.
struct Build {
    workshop: Arc<Workshop>,
    config: BuilderConfig,
    request: BuildRequest,
}

impl Build {
    async fn run(self, cancel: CancellationToken) -> Result<Built, BuildError> {
        let stop = Stop { cancel, deadline: Instant::now() + self.config.deadline };
        let id = &self.request.id;
        let lock = self.workshop.begin().await.map_err(|error| BuildError::Platform(error.to_string()))?;
        let scratch = Scratch::make(&self.request.work_dir)?;
        let surroundings = Surroundings { scratch: scratch.0.join("tmp"), lock };
        let result = self.steps(&surroundings, &stop).await;
        if let Err(error) = &result {
            tracing::info!(build = %id, %error, "the image build failed");
            let _ = tokio::fs::remove_file(&self.request.rootfs).await;
            self.workshop.mark_untidy();
        }
        drop(surroundings);
        if let Err(error) = self.workshop.tidy().await {
            tracing::warn!(build = %id, %error, "removing what killed builds left");
        }
        // Large trees take a while to delete.
        let removed = spawn_blocking(move || drop(scratch)).await;
        removed.map_err(|error| BuildError::Platform(format!("removing the work directory: {error}")))?;
        result
    }

    async fn steps(&self, surroundings: &Surroundings, stop: &Stop) -> Result<Built, BuildError> {
        let context = self.request.work_dir.join("context");
        self.unpack(context.clone(), stop).await?;
        let image = self.run_dockerfile(&context, surroundings, stop).await?;
        let description = self.workshop.storage.inspect(&image).await.map_err(|error| self.storage_error(error))?;
        let config: ImageConfig = config::parse(&description)?;
        let content_bytes = self.flatten(&image, surroundings, stop).await?;
        Ok(Built { config, content_bytes })
    }

    async fn unpack(&self, context: PathBuf, stop: &Stop) -> Result<(), BuildError> {
        let (archive, limits, stop) = (self.request.archive.clone(), self.config.limits, stop.clone());
        let unpacked = spawn_blocking(move || archive::unpack(&archive, &context, limits, &stop)).await;
        let unpacked = unpacked.map_err(|error| BuildError::Platform(format!("unpacking ended in a panic: {error}")))?;
        unpacked.map_err(|error| match error {
            ArchiveError::DockerfileNotFound => BuildError::DockerfileNotFound,
            ArchiveError::Invalid(reason) => BuildError::ArchiveInvalid(reason),
            ArchiveError::Io { what, source } => io_error(&what, &source),
            ArchiveError::Stopped(stopped) => self.stopped(stopped),
        })
    }

    /// Returns the image's id.
    async fn run_dockerfile(&self, context: &Path, surroundings: &Surroundings, stop: &Stop) -> Result<String, BuildError> {
        let id_file = self.request.work_dir.join("image-id");
        let log = &self.request.log;
        let run = self.workshop.storage.run_dockerfile(context, &id_file, surroundings, stop, log).await;
        let run = run.map_err(|error| self.process_error(error))?;
        if !run.status.success() {
            let full = run.tail.iter().find(|line| line.to_ascii_lowercase().contains("no space left on device"));
            return Err(match full {
                Some(line) => BuildError::DiskFull(line.clone()),
                None => BuildError::ContainerBuildFailed(run.status.to_string()),
            });
        }
        let id = tokio::fs::read_to_string(&id_file).await.map_err(|error| io_error("reading the image's id", &error))?;
        Ok(id.trim().trim_start_matches("sha256:").to_owned())
    }

    /// Returns the size of the contents.
    async fn flatten(&self, image: &str, surroundings: &Surroundings, stop: &Stop) -> Result<u64, BuildError> {
        let BuildRequest { rootfs, disk_bytes, .. } = &self.request;
        let file = tokio::fs::File::create(rootfs).await.map_err(|error| io_error("making the disk image", &error))?;
        file.set_len(*disk_bytes).await.map_err(|error| io_error("sizing the disk image", &error))?;
        let flat = self.workshop.storage.flatten(image, rootfs, *disk_bytes, surroundings, stop).await;
        let flat = flat.map_err(|error| self.process_error(error))?;
        if !flat.status.success() {
            let full = ["Could not allocate", "No space left"].iter().any(|sign| flat.stderr.contains(sign));
            return Err(if full {
                BuildError::DiskFull(flat.stderr)
            } else {
                BuildError::Platform(format!("flattening: {}", flat.stderr))
            });
        }
        file.sync_all().await.map_err(|error| io_error("writing the disk image", &error))?;
        let output = String::from_utf8_lossy(&flat.stdout);
        output.trim().parse().map_err(|_| BuildError::Platform(format!("flattening answered {output:?} instead of a size")))
    }

    fn stopped(&self, stopped: Stopped) -> BuildError {
        match stopped {
            Stopped::Cancelled => BuildError::Cancelled,
            Stopped::TimedOut => BuildError::TimedOut(self.config.deadline),
        }
    }

    fn process_error(&self, error: ProcessError) -> BuildError {
        match error {
            ProcessError::Stopped(stopped) => self.stopped(stopped),
            ProcessError::Io(source) => io_error("running buildah", &source),
            error @ ProcessError::Spawn { .. } => BuildError::Platform(error.to_string()),
        }
    }

    fn storage_error(&self, error: StorageError) -> BuildError {
        match error {
            StorageError::Process(error) => self.process_error(error),
            error => BuildError::Platform(error.to_string()),
        }
    }
}

impl From<ConfigError> for BuildError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::NothingToRun => Self::NothingToRun,
            ConfigError::Malformed(error) => Self::Platform(format!("reading the image's configuration: {error}")),
            error => Self::ConfigInvalid(error.to_string()),
        }
    }
}

fn io_error(what: &str, source: &io::Error) -> BuildError {
    let text = format!("{what}: {source}");
    if source.kind() == io::ErrorKind::StorageFull { BuildError::DiskFull(text) } else { BuildError::Platform(text) }
}

/// The build's scratch directory. Deleted with everything in it when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn make(dir: &Path) -> Result<Self, BuildError> {
        let scratch = Self(dir.to_owned());
        for dir in [dir, &dir.join("tmp")] {
            make_private_directory(dir).map_err(|error| io_error("making the work directory", &error))?;
        }
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), %error, "the work directory of a build stays behind");
        }
    }
}

/// Nobody else may look into builds: files keep the modes that their archives give them.
fn make_private_directory(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

async fn check_tool((program, argument, package): (&str, &str, &str)) -> Result<(), PrepareError> {
    let mut command = Command::new(program);
    command.arg(argument).stdin(Stdio::null());
    match run_captured(command, &Stop::after(Duration::from_secs(30))).await {
        Ok(_) => Ok(()),
        Err(error) => Err(PrepareError(format!("{error}; install the package {package}"))),
    }
}

#[cfg(test)]
mod tests;
