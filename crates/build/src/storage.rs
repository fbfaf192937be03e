//! buildah and the storage that it keeps for us: images, layer cache, working containers.
//!
//! Every buildah runs as the first process of its own pid namespace and in its own mount namespace. Killing it therefore kills whatever a
//! Dockerfile started, and no mount is ever left on the host, however it ends.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{process::Command, sync::mpsc};

use crate::process::{Captured, Logged, ProcessError, Stop, run_captured, run_logged};

/// Longest time that one of buildah's housekeeping commands may take.
const HOUSEKEEPING: Duration = Duration::from_secs(300);

/// Turns an image into a file system.
const FLATTEN: &str = include_str!("flatten.sh");

/// Identity of every file system, and seed of its directory hashes. With the overlay driver the same layers give the same bytes; vfs copies
/// them for every container, and the copies' change times end up in the inodes.
const FILESYSTEM_UUID: &str = "6f1c9a40-5b0e-4c53-9a5d-3c1f3c8f2b11";

/// The host's settings that matter for reaching registries.
const INHERITED_ENV: [&str; 12] = [
    "PATH",
    "LANG",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REGISTRY_AUTH_FILE",
    "CONTAINERS_REGISTRIES_CONF",
];

/// Docker's rule for names without a registry, which Dockerfiles rely on.
const REGISTRIES_CONF: &str = "unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"permissive\"\n";

/// buildah said no, or could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("{0}")]
    Process(#[from] ProcessError),
    #[error("buildah {verb} failed ({status}): {stderr}")]
    Failed { verb: String, status: std::process::ExitStatus, stderr: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

/// buildah's storage below the cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    root: PathBuf,
    run_root: PathBuf,
    registries: PathBuf,
    scratch: PathBuf,
    driver: &'static str,
}

impl Storage {
    /// The storage in `cache_dir`, which must exist. Finds out which driver works on its file system.
    pub(crate) async fn open(cache_dir: &Path) -> Result<Self, StorageError> {
        let registries = cache_dir.join("registries.conf");
        tokio::fs::write(&registries, REGISTRIES_CONF)
            .await
            .map_err(|source| StorageError::Io { what: format!("writing {}", registries.display()), source })?;
        let scratch = cache_dir.join("tmp");
        let made = tokio::fs::create_dir_all(&scratch).await;
        made.map_err(|source| StorageError::Io { what: format!("making {}", scratch.display()), source })?;
        let (root, run_root) = (cache_dir.join("storage"), cache_dir.join("run"));
        let mut storage = Self { root, run_root, registries, scratch, driver: "overlay" };
        if let Err(error) = storage.query(&["images", "--quiet"]).await {
            // For example because the cache lies on an overlay itself. Copies whole trees, but works everywhere.
            tracing::warn!(%error, "the overlay storage driver does not work here, using vfs");
            storage.driver = "vfs";
            storage.query(&["images", "--quiet"]).await?;
        }
        Ok(storage)
    }

    /// The id of the image that `name` stands for.
    pub(crate) async fn image_id(&self, name: &str) -> Result<Option<String>, StorageError> {
        let output = self.query(&["images", "--quiet", "--no-trunc", "--filter", &format!("reference={name}")]).await?;
        let id = output.lines().next().map(|line| line.trim_start_matches("sha256:").to_owned());
        Ok(id.filter(|id| !id.is_empty()))
    }

    /// Imports the OCI layout in the directory `name` of `parent`, and returns the image's id.
    pub(crate) async fn import(&self, parent: &Path, name: &str) -> Result<String, StorageError> {
        // buildah makes the image's name out of the path, so the path has to be short and lower case.
        let mut command = self.buildah(&["pull", "--quiet", &format!("oci:{name}")]);
        command.current_dir(parent);
        Ok(Self::text("pull", command).await?.trim().to_owned())
    }

    /// Gives an image another name.
    pub(crate) async fn tag(&self, id: &str, name: &str) -> Result<(), StorageError> {
        self.query(&["tag", id, name]).await.map(drop)
    }

    /// Takes a name from an image that has others.
    pub(crate) async fn untag(&self, name: &str) -> Result<(), StorageError> {
        self.query(&["rmi", name]).await.map(drop)
    }

    /// Directory for temporary things of this storage; emptied by [`Storage::tidy`].
    pub(crate) fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Removes all working containers and temporary things. Only while nothing else runs in this storage, in this process or another.
    pub(crate) async fn tidy(&self) -> Result<(), StorageError> {
        // The run root says what is mounted, and nothing is: mounts died with their namespaces.
        for dir in [&self.run_root, &self.scratch] {
            let emptied = match tokio::fs::remove_dir_all(dir).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => tokio::fs::create_dir(dir).await,
            };
            emptied.map_err(|source| StorageError::Io { what: format!("emptying {}", dir.display()), source })?;
        }
        self.query(&["rm", "--all"]).await.map(drop)
    }

    /// Whether the same image gives the same disk, byte for byte.
    #[cfg(test)]
    pub(crate) fn is_reproducible(&self) -> bool {
        self.driver == "overlay"
    }

    /// Ids of the working containers.
    #[cfg(test)]
    pub(crate) async fn containers(&self) -> Vec<String> {
        self.query(&["containers", "--quiet"]).await.unwrap().lines().map(str::to_owned).collect()
    }

    /// Runs a Dockerfile. The image keeps no name, so that its layers stay in the cache; its id is written to `image_id`.
    pub(crate) async fn run_dockerfile(
        &self,
        context: &Path,
        image_id: &Path,
        surroundings: &Surroundings,
        stop: &Stop,
        log: &mpsc::Sender<String>,
    ) -> Result<Logged, ProcessError> {
        let mut command = self.buildah(&["bud", "--isolation=chroot", "--network=host", "--format=docker", "--layers", "--force-rm"]);
        // "false" pulls what is absent and leaves alone what is there, such as the managed base image.
        command.arg("--pull=false").arg("--iidfile").arg(image_id);
        command.arg("--file").arg(context.join("Dockerfile")).arg(context);
        surroundings.apply(&mut command)?;
        run_logged(command, stop, log).await
    }

    /// `buildah inspect` of an image.
    pub(crate) async fn inspect(&self, image: &str) -> Result<Vec<u8>, StorageError> {
        self.query(&["inspect", "--type", "image", image]).await.map(String::into_bytes)
    }

    /// Writes an image's tree into `rootfs`, an empty file, as a file system of `bytes` bytes. Its standard output is the size of the contents.
    pub(crate) async fn flatten(
        &self,
        image: &str,
        rootfs: &Path,
        bytes: u64,
        surroundings: &Surroundings,
        stop: &Stop,
    ) -> Result<Captured, ProcessError> {
        let mut command = self.isolated("sh");
        command.args(["-c", FLATTEN, "flatten.sh"]).arg(rootfs).args([&bytes.to_string(), FILESYSTEM_UUID, image, "buildah"]);
        self.add_options(&mut command);
        surroundings.apply(&mut command)?;
        run_captured(command, stop).await
    }

    /// Kills what still runs in this storage although the server that started it is gone. Blocks.
    pub(crate) fn kill_orphans(&self) -> io::Result<()> {
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let Some(pid) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<i32>().ok()) else { continue };
            // Processes come and go while we read.
            let Ok(arguments) = fs::read(path.join("cmdline")) else { continue };
            if self.is_ours(&arguments) {
                tracing::info!(pid, "killing a build of a server that is gone");
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Ok(())
    }

    /// Whether these NUL-separated arguments are of a buildah in this storage.
    fn is_ours(&self, arguments: &[u8]) -> bool {
        use std::os::unix::ffi::OsStrExt;
        let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
        arguments.windows(2).any(|pair| pair[0] == b"--root" && pair[1] == self.root.as_os_str().as_bytes())
    }

    async fn query(&self, arguments: &[&str]) -> Result<String, StorageError> {
        Self::text(arguments[0], self.buildah(arguments)).await
    }

    async fn text(verb: &str, command: Command) -> Result<String, StorageError> {
        let Captured { status, stdout, stderr } = run_captured(command, &Stop::after(HOUSEKEEPING)).await?;
        if !status.success() {
            return Err(StorageError::Failed { verb: verb.to_owned(), status, stderr });
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    fn buildah(&self, arguments: &[&str]) -> Command {
        let mut command = self.isolated("buildah");
        self.add_options(&mut command);
        command.args(arguments);
        command
    }

    fn add_options(&self, command: &mut Command) {
        command.arg("--root").arg(&self.root).arg("--runroot").arg(&self.run_root);
        command.args(["--storage-driver", self.driver]);
    }

    /// A program in namespaces of its own, with little of our environment.
    fn isolated(&self, program: &str) -> Command {
        // A killed daemon takes its builds with it: they would go on writing, and hold the lock on the storage.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare"]);
        command.args(["--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "--", program]);
        command.stdin(Stdio::null()).env_clear().env("HOME", &self.scratch).env("TMPDIR", &self.scratch);
        command.env("CONTAINERS_REGISTRIES_CONF", &self.registries);
        command.envs(INHERITED_ENV.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command
    }
}

/// What a build lends to its processes.
#[derive(Debug)]
pub(crate) struct Surroundings {
    /// For buildah's large temporary files.
    pub(crate) scratch: PathBuf,
    /// The lock that says a build is running. The processes inherit it as their standard input (it is empty), so it lasts as long as they do.
    pub(crate) lock: File,
}

impl Surroundings {
    fn apply(&self, command: &mut Command) -> io::Result<()> {
        command.env("TMPDIR", &self.scratch).stdin(self.lock.try_clone()?);
        Ok(())
    }
}
