//! Why a build failed: for whom (`Display`, the log) and in whose words (`state_reason`, the API).

use std::time::Duration;

/// Why a build failed. `Display` is for the daemon's log; [`BuildError::state_reason`] is for the caller.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// the archive's root holds no Dockerfile
    #[error("the archive holds no Dockerfile at its root")]
    DockerfileNotFound,
    /// the archive cannot be unpacked safely
    #[error("the archive cannot be used: {0}")]
    ArchiveInvalid(String),
    /// a step of the Dockerfile failed; the log holds its output
    #[error("the container image build failed: {0}")]
    ContainerBuildFailed(String),
    /// a step failed; the log holds its output
    #[error("{instruction}: {error}")]
    StepFailed {
        /// The instruction, on one line.
        instruction: String,
        /// What the builder says of it.
        error: String,
    },
    /// the build took too long
    #[error("the container image build did not finish within {} seconds", .0.as_secs())]
    TimedOut(Duration),
    /// the image says nothing about what to run
    #[error("the image has neither ENTRYPOINT nor CMD")]
    NothingToRun,
    /// the image says something that cannot be followed
    #[error("the image's configuration cannot be used: {0}")]
    ConfigInvalid(String),
    /// the contents do not fit, or the host's disk is full
    #[error("no space left: {0}")]
    DiskFull(String),
    /// the caller gave up
    #[error("the build was cancelled")]
    Cancelled,
    /// a file or a program of the host failed
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// the host's disk has too little left
    #[error("{0}")]
    HostDiskLow(String),
    /// the host has no memory for it now
    #[error("{0}")]
    Capacity(String),
    /// the host's fault
    #[error("{0}")]
    Platform(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BuildError {
    /// What the build's `stateReason` says (SPEC 2.1): the service's own sentence for a failed Dockerfile, `CODE: sentence` otherwise.
    /// Never tells paths or other details of the host.
    pub fn state_reason(&self) -> String {
        match self {
            Self::DockerfileNotFound => {
                "ARCHIVE_DOCKERFILE_NOT_FOUND: The archive must hold a file named Dockerfile at its root.".to_owned()
            }
            Self::ArchiveInvalid(reason) => format!("ARCHIVE_INVALID: The archive cannot be unpacked: {reason}."),
            Self::ContainerBuildFailed(reason) => format!("The container image build failed. {}", brief(reason)),
            Self::StepFailed { instruction, error } => {
                format!("The container image build failed. {}: {}", brief(instruction), brief(error))
            }
            Self::TimedOut(limit) => {
                format!("CONTAINER_BUILD_FAILED: The container image build did not finish within {} seconds.", limit.as_secs())
            }
            Self::NothingToRun => {
                "CONTAINER_BUILD_FAILED: The image has neither ENTRYPOINT nor CMD, so there is nothing to run.".to_owned()
            }
            Self::ConfigInvalid(reason) => format!("CONTAINER_BUILD_FAILED: The image's configuration cannot be used: {reason}."),
            Self::DiskFull(_) => "DISK_STORAGE_FULL: The image's contents do not fit on the disk.".to_owned(),
            Self::HostDiskLow(reason) => format!("DISK_STORAGE_FULL: The build was ended: {reason}."),
            Self::Capacity(reason) => format!("INTERNAL_PLATFORM_ERROR: {reason}"),
            Self::Cancelled => "INTERNAL_PLATFORM_ERROR: The build was cancelled.".to_owned(),
            Self::Io { .. } | Self::Platform(_) => {
                "INTERNAL_PLATFORM_ERROR: The build failed because of this host; its log says why.".to_owned()
            }
        }
    }
}

/// A reason is one line that can be read at a glance.
fn brief(text: &str) -> String {
    const LONGEST: usize = 200;
    if text.chars().count() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST).chain("…".chars()).collect() }
}

/// The builder cannot work on this host.
#[derive(Debug, thiserror::Error)]
#[error("preparing the image builder: {0}")]
pub struct PrepareError(pub(crate) String);

impl PrepareError {
    pub(crate) fn from_display(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}
