//! The real builder: unpack, run the Dockerfile in a sandbox, read the image's configuration, flatten.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
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
    BuildError, BuildRequest, BuilderConfig, Built, ImageBuilder, MachineError, PrepareError, Room,
    archive::{self, ArchiveError},
    base::{Base, Unreachable},
    config::{self, Description},
    dockerfile,
    process::{ProcessError, Stop, Stopped, run_captured},
    progress::Progress,
    registry::{self, Login},
    reserve::{self, Guard, Low},
    root::Root,
    sandbox::{self, Call, DISK, FIRST_ID, Host, INHERITED_ENV, Sandbox, SandboxError, WorkDir, inside},
    stores::{Store, Stores},
    trees,
};

/// Programs that a build runs, how to ask each for its version, and the Debian package it is in.
const TOOLS: [(&str, &str, &str); 3] = [("runc", "--version", "runc"), ("unshare", "--version", "util-linux"), ("tar", "--version", "tar")];
/// What makes the disk that machines boot from.
const MACHINE_TOOL: (&str, &str, &str) = ("mke2fs", "-V", "e2fsprogs");

/// Identity of every file system, and seed of its directory hashes: the same layers give the same bytes.
const FILESYSTEM_UUID: &str = "6f1c9a40-5b0e-4c53-9a5d-3c1f3c8f2b11";

/// Where the builder writes the image's id, in the sandbox.
const IMAGE_ID: &str = "/run/image";

/// Where layers are, below the daemon's data.
const LAYERS: &str = "/var/lib/docker/overlay2";

/// Builds images with BuildKit, each build in a sandbox of its own. Needs root.
#[derive(Debug)]
pub struct Builder {
    config: BuilderConfig,
    workshop: OnceCell<Arc<Workshop>>,
}

/// What all builds share.
#[derive(Debug)]
struct Workshop {
    config: BuilderConfig,
    root: Root,
    stores: Stores,
    unreachable: Unreachable,
}

impl Builder {
    /// A builder that keeps its things as `config` says. Call [`Builder::prepare`] before the first build.
    pub fn new(config: BuilderConfig) -> Self {
        Self { config, workshop: OnceCell::new() }
    }

    /// Makes the cache directory ready: unpacks the builder's root file system if it is new or has changed. May be called again, and by
    /// several processes at once.
    pub async fn prepare(&self) -> Result<(), PrepareError> {
        for tool in TOOLS.into_iter().chain(self.config.machines.then_some(MACHINE_TOOL)) {
            check_tool(tool).await?;
        }
        let dir = &self.config.cache_dir;
        make_private_directory(dir).map_err(|error| PrepareError(format!("making {}: {error}", dir.display())))?;
        // The sandbox has another working directory than we do.
        let dir = std::path::absolute(dir).map_err(|error| PrepareError(format!("finding {}: {error}", dir.display())))?;
        sandbox::sweep(&runtime_dir(&dir)).await.map_err(PrepareError::from_display)?;
        let open = async {
            let roots = self.config.builder_dir.clone().unwrap_or_else(|| dir.join("builder"));
            let root = Root::ensure(&roots, &self.config.builder.path, &self.config.builder.sha256, self.config.machines).await;
            let root = root.map_err(PrepareError::from_display)?;
            let stores = Stores::new(&dir, self.config.cache);
            stores.trim().await.map_err(PrepareError::from_display)?;
            let config = BuilderConfig { cache_dir: dir.clone(), ..self.config.clone() };
            Ok(Arc::new(Workshop { config, root, stores, unreachable: Unreachable::default() }))
        };
        self.workshop.get_or_try_init(|| open).await.map(drop)
    }
}

#[async_trait]
impl ImageBuilder for Builder {
    async fn build(&self, mut request: BuildRequest, cancel: CancellationToken) -> Result<Built, BuildError> {
        let workshop = self.workshop.get().ok_or_else(|| BuildError::Platform("the builder is not prepared".into()))?;
        for path in [&mut request.work_dir, &mut request.rootfs] {
            *path = std::path::absolute(&path).map_err(|error| io_error("finding the build's directories", error))?;
        }
        let build = Build { workshop: Arc::clone(workshop), request };
        // In a task of its own, so that a caller who stops waiting cancels the build instead of leaving it half cleaned up.
        let cancel = cancel.child_token();
        let abandoned = cancel.clone().drop_guard();
        let result = tokio::spawn(build.run(cancel)).await;
        abandoned.disarm();
        result.unwrap_or_else(|error| Err(BuildError::Platform(Box::new(error))))
    }
}

/// One build.
struct Build {
    workshop: Arc<Workshop>,
    request: BuildRequest,
}

impl Build {
    async fn run(mut self, cancel: CancellationToken) -> Result<Built, BuildError> {
        let stop = Stop { cancel, deadline: Instant::now() + self.workshop.config.deadline };
        let scratch = Scratch::make(&self.request.work_dir)?;
        let result = self.guarded(&stop).await;
        if let Err(error) = &result {
            tracing::info!(build = self.request.id, error = error as &dyn std::error::Error, "the image build failed");
            let _ = tokio::fs::remove_file(&self.request.rootfs).await;
        }
        if let Err(error) = self.workshop.stores.trim().await {
            tracing::warn!(%error, "the layer cache could not be kept within its limit");
        }
        // Large trees take a while to delete.
        let removed = spawn_blocking(move || drop(scratch)).await;
        removed.map_err(|error| BuildError::Platform(Box::new(error)))?;
        if matches!(result, Err(BuildError::HostDiskLow(_))) {
            // With what the build has left in its store.
            self.make_room(&[self.workshop.config.cache_dir.clone()]).await;
        }
        result
    }

    /// The build, for as long as the host has disk for it.
    async fn guarded(&mut self, stop: &Stop) -> Result<Built, BuildError> {
        let config = &self.workshop.config;
        let stop = Stop { cancel: stop.cancel.child_token(), deadline: stop.deadline };
        let places = vec![config.cache_dir.clone(), self.request.work_dir.clone()];
        let low = |low: Low| BuildError::HostDiskLow(low.to_string());
        self.make_room(&places).await;
        let guard = Guard::start(places, config.disk_reserve, stop.cancel.clone()).await.map_err(low)?;
        let result = self.steps(&stop).await;
        match guard.low() {
            Some(found) if result.is_err() => Err(low(found)),
            _ => result,
        }
    }

    /// Gives layers up for the disk's reserve.
    async fn make_room(&self, places: &[PathBuf]) {
        let (places, reserve) = (places.to_vec(), self.workshop.config.disk_reserve);
        if let Err(error) = self.workshop.stores.make_room(move || reserve::is_free(&places, reserve)).await {
            tracing::warn!(build = self.request.id, %error, "no room was made for a build");
        }
    }

    async fn steps(&mut self, stop: &Stop) -> Result<Built, BuildError> {
        let work = WorkDir(self.request.work_dir.join("build"));
        make_private_directory(&work.0).map_err(|error| io_error("making the work directory", error))?;
        self.unpack(work.context(), stop).await?;
        let recipe = self.read_dockerfile(&work).await?;
        for note in recipe.notes {
            self.say(note).await;
        }
        let store = self.workshop.stores.take(&self.request.account).await?;
        if store.renewed {
            let days = self.workshop.config.cache.age.as_secs() / (24 * 60 * 60);
            self.say(format!(
                "The layer cache is older than {days} days and begins anew: packages are installed in their present versions."
            ))
            .await;
        }
        let mut room = self.request.room.take().ok_or_else(|| BuildError::Platform("the build has no place to run".into()))?;
        let logins = self.logins(&recipe.images).await;
        let disk = self.make_disk(work.disk()).await?;
        let sandbox = self.start(&store, &work, &mut room, &logins, stop).await?;
        let built = self.in_sandbox(&sandbox, &recipe.images, &mut room, stop).await;
        sandbox.end().await;
        // The network is needed until every process is gone.
        drop(room);
        let built = built?;
        // Now no process of the sandbox can write to it any more.
        self.take_disk(&disk, work.disk()).await?;
        Ok(built)
    }

    async fn unpack(&self, context: PathBuf, stop: &Stop) -> Result<(), BuildError> {
        let (archive, limits, stop) = (self.request.archive.clone(), self.workshop.config.limits, stop.clone());
        let unpacked = spawn_blocking(move || archive::unpack(&archive, &context, limits, &stop)).await;
        let unpacked = unpacked.map_err(|error| BuildError::Platform(Box::new(error)))?;
        unpacked.map_err(|error| match error {
            ArchiveError::DockerfileNotFound => BuildError::DockerfileNotFound,
            ArchiveError::Invalid(reason) => BuildError::ArchiveInvalid(reason),
            ArchiveError::Io { what, source } => io_error(&what, source),
            ArchiveError::Stopped(stopped) => self.stopped(stopped),
        })
    }

    /// Reads the context's Dockerfile, and writes beside the context what BuildKit is to read instead.
    async fn read_dockerfile(&self, work: &WorkDir) -> Result<dockerfile::Recipe, BuildError> {
        let context = work.context();
        let text = tokio::fs::read(context.join("Dockerfile")).await.map_err(|error| io_error("reading the Dockerfile", error))?;
        let text = String::from_utf8_lossy(&text);
        let recipe =
            dockerfile::read(&text, architecture(), &context).map_err(|error| BuildError::ContainerBuildFailed(error.to_string()))?;
        let beside = work.recipe();
        make_private_directory(&beside).map_err(|error| io_error("making the Dockerfile's directory", error))?;
        tokio::fs::write(beside.join("Dockerfile"), &recipe.text).await.map_err(|error| io_error("writing the Dockerfile", error))?;
        // It takes precedence over `.dockerignore`, and is looked for beside the Dockerfile.
        let ignore = "Dockerfile.dockerignore";
        match tokio::fs::copy(context.join(ignore), beside.join(ignore)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("copying Dockerfile.dockerignore", error)),
            _ => Ok(recipe),
        }
    }

    /// Asks for the logins of the registries that the Dockerfile names. A build can do without: a registry may not want one.
    async fn logins(&self, images: &[String]) -> Vec<Login> {
        let mut logins = Vec::new();
        let Some(source) = &self.request.logins else { return logins };
        for registry in registry::registries(images) {
            match source.login(registry).await {
                Ok(login) => logins.extend(login),
                Err(error) => self.say(format!("No login for the registry {registry}: {error}")).await,
            }
        }
        logins
    }

    /// Starts the sandbox; once more on an empty store if the daemon does not start on this one.
    async fn start(&self, store: &Store, work: &WorkDir, room: &mut Room, logins: &[Login], stop: &Stop) -> Result<Sandbox, BuildError> {
        let config = &self.workshop.config;
        let host = Host {
            runtime_dir: runtime_dir(&config.cache_dir),
            root: self.workshop.root.dir.clone(),
            root_disk: self.workshop.root.disk.clone(),
            base_archive: config.base.path.clone(),
            memory: config.memory,
            insecure_registries: config.registries.insecure.clone(),
            local_registries: config.registries.local.clone(),
        };
        let auths = registry::auths(config.registries.auth_file.as_deref(), logins).await?;
        let id = format!("hearth-build-{}", self.request.id);
        match Sandbox::start(&host, &id, store, work, room, auths.clone(), stop).await {
            Err(error @ (SandboxError::Start(_) | SandboxError::Slow)) => {
                tracing::warn!(build = self.request.id, %error, "the image builder did not start; trying once more with an empty layer store");
                store.renew().await?;
                Sandbox::start(&host, &id, store, work, room, auths, stop).await
            }
            started => started,
        }
        .map_err(|error| self.sandbox_error(error))
    }

    async fn in_sandbox(&self, sandbox: &Sandbox, images: &[String], room: &mut Room, stop: &Stop) -> Result<Built, BuildError> {
        let config = &self.workshop.config;
        let base = Base {
            repositories: &config.base_names,
            checksum: &config.base.sha256,
            unreachable: &self.workshop.unreachable,
            mirror: config.registries.base_mirror.as_deref(),
        };
        for image in images.iter().filter(|image| base.is_managed(image)) {
            let provided = base.provide(sandbox, image, self.request.no_cache, stop).await;
            self.say(self.unless_stopped(provided, stop)?).await;
        }
        room.restrict().await.map_err(|error| BuildError::Platform(Box::new(error)))?;
        let image = self.run_dockerfile(sandbox, stop).await?;
        let Description { config, layers } = self.inspect(sandbox, &image, stop).await?;
        let content_bytes = self.flatten(sandbox, &layers, stop).await?;
        // The layers stay in the cache; the image has no use any more.
        let removed = sandbox.docker(&["image", "rm", "--force", &image], stop).await.map_err(|error| self.process_error(error))?;
        if !removed.status.success() {
            tracing::warn!(build = self.request.id, error = removed.stderr, "an image stays in the layer store");
        }
        self.prune(sandbox, stop).await;
        Ok(Built { config, content_bytes })
    }

    /// Returns the image's id.
    async fn run_dockerfile(&self, sandbox: &Sandbox, stop: &Stop) -> Result<String, BuildError> {
        let mut call = Call::new("docker").args(["buildx", "build", "--progress=rawjson", "--pull=false", "--load"]);
        call = call.args(["--file", &inside("recipe/Dockerfile"), "--iidfile", IMAGE_ID]);
        if self.request.no_cache {
            call = call.args(["--no-cache"]);
        }
        for name in INHERITED_ENV.into_iter().filter(|name| std::env::var_os(name).is_some()) {
            call = call.args(["--build-arg", name]);
        }
        call = call.args([inside("context")]);
        let mut progress = Progress::default();
        let run = sandbox.translate(call, stop, &self.request.log, |line| progress.take(line));
        let status = run.await.map_err(|error| self.process_error(error))?;
        let (lines, failed) = progress.finish();
        for line in &lines {
            self.say(line.clone()).await;
        }
        if !status.success() {
            if failed.as_ref().is_some_and(|step| step.error.ends_with("exit code 137")) {
                self.say(KILLED.to_owned()).await;
            }
            return Err(match failed {
                Some(step) if is_about_space(&step.error) => BuildError::DiskFull(step.error),
                Some(step) => BuildError::StepFailed { instruction: step.instruction, error: step.error },
                None => BuildError::ContainerBuildFailed(last_error(&lines).unwrap_or_else(|| status.to_string())),
            });
        }
        self.image_id(sandbox, stop).await
    }

    async fn image_id(&self, sandbox: &Sandbox, stop: &Stop) -> Result<String, BuildError> {
        let read = sandbox.capture(Call::new("cat").args([IMAGE_ID]), stop).await.map_err(|error| self.process_error(error))?;
        let text = String::from_utf8_lossy(&read.stdout);
        let digits = text.trim().strip_prefix("sha256:").filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let digits = digits.filter(|digits| !digits.is_empty());
        digits
            .map(|digits| format!("sha256:{digits}"))
            .ok_or_else(|| BuildError::Platform(format!("no image's id: {}", read.stderr).into()))
    }

    async fn inspect(&self, sandbox: &Sandbox, image: &str, stop: &Stop) -> Result<Description, BuildError> {
        let inspected = sandbox.docker(&["image", "inspect", image], stop).await.map_err(|error| self.process_error(error))?;
        if !inspected.status.success() {
            return Err(BuildError::Platform(format!("docker image inspect: {}", inspected.stderr).into()));
        }
        Ok(config::parse(&inspected.stdout)?)
    }

    /// Makes the image's disk, which the sandbox fills.
    async fn make_disk(&self, path: PathBuf) -> Result<tokio::fs::File, BuildError> {
        let file = tokio::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).await;
        let file = file.map_err(|error| io_error("making the disk image", error))?;
        file.set_len(self.request.disk_bytes).await.map_err(|error| io_error("sizing the disk image", error))?;
        let given = std::os::unix::fs::fchown(&file, Some(FIRST_ID), Some(FIRST_ID));
        given.map_err(|error| io_error("giving the disk image to the sandbox", error))?;
        Ok(file)
    }

    /// Takes the disk back, and puts it where it was asked for. Whatever the sandbox has done to the file, its owner, mode and size are ours.
    async fn take_disk(&self, disk: &tokio::fs::File, path: PathBuf) -> Result<(), BuildError> {
        let BuildRequest { rootfs, disk_bytes, .. } = &self.request;
        std::os::unix::fs::fchown(disk, Some(0), Some(0)).map_err(|error| io_error("taking the disk image back", error))?;
        let mode = disk.set_permissions(std::fs::Permissions::from_mode(0o644)).await;
        mode.map_err(|error| io_error("setting the disk image's mode", error))?;
        let found = disk.metadata().await.map_err(|error| io_error("looking at the disk image", error))?.len();
        if found != *disk_bytes {
            return Err(BuildError::Platform(format!("the disk image has {found} bytes instead of {disk_bytes}").into()));
        }
        disk.sync_all().await.map_err(|error| io_error("writing the disk image", error))?;
        tokio::fs::rename(path, rootfs).await.map_err(|error| io_error("moving the disk image", error))
    }

    /// Fills the image's disk. Returns the size of the contents.
    async fn flatten(&self, sandbox: &Sandbox, layers: &[String], stop: &Stop) -> Result<u64, BuildError> {
        let call =
            Call::new("sh").within(LAYERS).args([&inside("flatten.sh"), DISK, &self.request.disk_bytes.to_string(), FILESYSTEM_UUID]);
        let flat = sandbox.capture(call.args(layers), stop).await.map_err(|error| self.process_error(error))?;
        if !flat.status.success() {
            let full = ["Could not allocate", "No space left"].iter().any(|sign| flat.stderr.contains(sign));
            return Err(if full {
                BuildError::DiskFull(flat.stderr)
            } else {
                BuildError::Platform(format!("flattening: {}", flat.stderr).into())
            });
        }
        let output = String::from_utf8_lossy(&flat.stdout);
        output.trim().parse().map_err(|_| BuildError::Platform(format!("flattening answered {output:?} instead of a size").into()))
    }

    /// Keeps one store from growing over what all stores may have.
    async fn prune(&self, sandbox: &Sandbox, stop: &Stop) {
        let most = format!("{}B", self.workshop.config.cache.bytes);
        match sandbox.docker(&["buildx", "prune", "--force", "--max-used-space", &most], stop).await {
            Ok(pruned) if pruned.status.success() => {}
            Ok(pruned) => tracing::warn!(build = self.request.id, error = pruned.stderr, "the layer store was not pruned"),
            Err(error) => tracing::warn!(build = self.request.id, %error, "the layer store was not pruned"),
        }
    }

    async fn say(&self, line: String) {
        // A log without a reader is no reason to fail a build.
        let _ = self.request.log.send(line).await;
    }

    fn stopped(&self, stopped: Stopped) -> BuildError {
        match stopped {
            Stopped::Cancelled => BuildError::Cancelled,
            Stopped::TimedOut => BuildError::TimedOut(self.workshop.config.deadline),
        }
    }

    /// What a build was doing when it was stopped failed because of that.
    fn unless_stopped<T>(&self, result: Result<T, impl Into<BuildError>>, stop: &Stop) -> Result<T, BuildError> {
        result.map_err(|error| stop.check().map_or_else(|stopped| self.stopped(stopped), |()| error.into()))
    }

    fn process_error(&self, error: ProcessError) -> BuildError {
        match error {
            ProcessError::Stopped(stopped) => self.stopped(stopped),
            ProcessError::Io(source) => io_error("running the image builder", source),
            ProcessError::Machine(error) => machine_error(error),
            error @ ProcessError::Spawn { .. } => BuildError::Platform(Box::new(error)),
        }
    }

    fn sandbox_error(&self, error: SandboxError) -> BuildError {
        match error {
            SandboxError::Stopped(stopped) => self.stopped(stopped),
            SandboxError::Process(error) => self.process_error(error),
            SandboxError::Io { what, source } => io_error(what, source),
            SandboxError::Machine(error) => machine_error(error),
            error => BuildError::Platform(Box::new(error)),
        }
    }
}

fn machine_error(error: MachineError) -> BuildError {
    match error {
        MachineError::OutOfMemory(_) => BuildError::ContainerBuildFailed(error.to_string()),
        MachineError::Capacity(reason) => BuildError::Capacity(reason),
        error => BuildError::Platform(Box::new(error)),
    }
}

/// Where the OCI runtime keeps its records.
fn runtime_dir(cache_dir: &Path) -> PathBuf {
    cache_dir.join("runtime")
}

/// What the log says of a step that was killed.
const KILLED: &str = "Exit code 137: something of the step was killed, most likely because the build took more memory than it may have (`build_memory_mib`).";

/// Whether BuildKit found the disk full itself. What a step says does not count: the error of a process quotes its instruction.
fn is_about_space(error: &str) -> bool {
    error.to_ascii_lowercase().contains("no space left on device") && !error.starts_with("process ")
}

/// The error among BuildKit's last lines.
fn last_error(lines: &[String]) -> Option<String> {
    lines.iter().rev().find_map(|line| line.strip_prefix("ERROR: ")).map(str::to_owned)
}

/// The host's architecture as images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn io_error(what: &str, source: io::Error) -> BuildError {
    if source.kind() == io::ErrorKind::StorageFull {
        BuildError::DiskFull(format!("{what}: {source}"))
    } else {
        BuildError::Io { what: what.to_owned(), source }
    }
}

/// The build's scratch directory. Deleted with everything in it when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn make(dir: &Path) -> Result<Self, BuildError> {
        let scratch = Self(dir.to_owned());
        make_private_directory(dir).map_err(|error| io_error("making the work directory", error))?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = trees::remove(&self.0) {
            tracing::warn!(dir = %self.0.display(), %error, "the work directory of a build stays behind");
        }
    }
}

/// Only root may look into builds: files keep the modes that their archives give them.
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
