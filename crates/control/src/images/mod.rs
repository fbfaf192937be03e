//! One image: its states, and the one task that changes them.
//!
//! ```text
//!   create ─▶ CREATING ──built──▶ CREATED ────────┐
//!                 │                               ├──delete──▶ DELETING ─▶ (gone)
//!                 └──failed──▶ CREATE_FAILED ─────┘
//!
//!   its version    PENDING ─▶ IN_PROGRESS ─▶ SUCCESSFUL and ACTIVE | FAILED and INACTIVE
//!   its build      PENDING ─▶ IN_PROGRESS ─▶ SUCCESSFUL            | FAILED, with the reason
//! ```
//!
//! - **CREATING**: the build waits for its turn (`PENDING`), then runs ([`build`]). It cannot be deleted. A server that stops gives the build
//!   up; one that dies leaves that to the next start.
//! - **CREATED**, **CREATE_FAILED**: at rest. A failed build leaves its record and its log, nothing else.
//! - **DELETING**: only without MicroVMs that are not terminated; the store checks that and forbids new ones in one step. The name is
//!   reserved until the files are gone.

mod build;
mod driver;
mod shape;
mod snapshots;

use std::sync::Arc;

use hearth_build::ImageBuilder;
use hearth_machine::Engine;
use hearth_objects::Objects;
use hearth_store::{DeleteImage, Store, StoreError};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    logs::{LogGroup, LogStore, Route, build_streams},
    records::{time, version_name},
    settings::Settings,
    types::ImageSpec,
};

pub(crate) use build::HOST_STOPPED;
pub(crate) use shape::Shape;
pub(crate) use snapshots::{Snapshots, image_dir, version_dir};

/// What every image's driver works with.
pub(crate) struct Shared {
    pub store: Store,
    pub engine: Arc<dyn Engine>,
    pub builder: Arc<dyn ImageBuilder>,
    pub objects: Arc<dyn Objects>,
    pub logs: Arc<LogStore>,
    pub snapshots: Arc<Snapshots>,
    pub settings: Settings,
    /// One for each build that may run.
    pub turns: Semaphore,
    /// Gives builds up.
    pub stop: CancellationToken,
    /// Counts what observers could see change.
    pub changes: watch::Sender<u64>,
    pub tasks: TaskTracker,
}

impl Shared {
    /// Where the output of a build's phases goes: of the Dockerfile, then of the console of the MicroVM that is captured.
    pub fn build_routes(&self, image: &Identity, job: &Job) -> [Route; 2] {
        let logging = job.spec.echoed.get("logging");
        build_streams(time(job.created_ms), &version_name(job.number), &job.build_id)
            .map(|stream| Route::new(image.log_group(), stream, logging))
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

/// Which image.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// UUID.
    pub id: String,
    pub account: String,
    pub region: String,
    pub name: String,
}

impl Identity {
    fn log_group(&self) -> LogGroup {
        LogGroup::of_image(&self.account, &self.region, &self.name)
    }
}

/// What is to be built.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// UUID.
    pub build_id: String,
    /// Number of the version.
    pub number: i64,
    pub spec: ImageSpec,
    pub created_ms: i64,
}

type Deleted = Result<DeleteImage, StoreError>;

/// How the rest of the domain reaches an image.
pub(crate) struct Handle {
    deletes: mpsc::UnboundedSender<oneshot::Sender<Deleted>>,
}

impl Handle {
    /// Starts an image's driver, with something to build or without.
    pub fn start(shared: &Arc<Shared>, image: Identity, job: Option<Job>) -> Self {
        let (deletes, mailbox) = mpsc::unbounded_channel();
        shared.tasks.spawn(driver::Driver::new(Arc::clone(shared), image, mailbox, job).run());
        Self { deletes }
    }

    /// Asks to delete the image; answered when that is recorded. Nothing if the driver has ended.
    pub async fn delete(&self) -> Option<Deleted> {
        let (answer, answered) = oneshot::channel();
        self.deletes.send(answer).ok()?;
        answered.await.ok()
    }
}

/// Deletes what an image in state `DELETING` has, then the image.
pub(crate) async fn finish_delete(shared: &Shared, image: &Identity) -> Result<(), StoreError> {
    let all = hearth_store::Keyset { before: None, limit: u32::MAX };
    for version in shared.store.list_versions(&image.id, all).await? {
        if let Some(snapshot) = shared.snapshots.forget(&image.id, version.number).await {
            shared.engine.forget(&snapshot).await;
        }
        for build in shared.store.list_builds(&image.id, version.number, all).await? {
            // What the API shows stays until its time has come, as on AWS.
            for stream in build_streams(time(build.created_ms), &version_name(version.number), &build.id) {
                if let Err(error) = shared.logs.delete_stream(&image.log_group().private(), &stream).await {
                    tracing::warn!(image = image.name, stream, %error, "the log of a deleted image is left");
                }
            }
        }
    }
    let dir = image_dir(&shared.settings.data_dir, &image.id);
    match tokio::fs::remove_dir_all(&dir).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "files of a deleted image are left until the next start");
        }
        _ => {}
    }
    shared.store.finish_image_delete(&image.id).await?;
    shared.changed();
    Ok(())
}

#[cfg(test)]
mod tests;
