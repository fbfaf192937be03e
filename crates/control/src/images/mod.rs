//! One image: its states, and the one task that changes them.
//!
//! ```text
//!   create ─▶ CREATING ──built──▶ CREATED ─────────┐
//!                 └─────failed──▶ CREATE_FAILED ───┤
//!                                                  ├──update──▶ UPDATING ──built──▶ UPDATED ──────┐
//!                                                  │                └──────failed─▶ UPDATE_FAILED─┤
//!                                                  ├──a version's status, a version deleted───────┤
//!                                                  │           ─▶ UPDATING ─▶ UPDATED             │
//!                                                  └──delete──▶ DELETING ─▶ (gone)   ◀────────────┘
//!   CREATING, UPDATING ──delete──▶ DELETING, the build is given up ─▶ (gone)
//!
//!   a version      PENDING ─▶ IN_PROGRESS ─▶ SUCCESSFUL and ACTIVE | FAILED and INACTIVE ─▶ DELETING ─▶ (gone)
//!   its build      PENDING ─▶ IN_PROGRESS ─▶ SUCCESSFUL            | FAILED, with the reason
//! ```
//!
//! - **CREATING**, **UPDATING** with a build: it waits for its turn (`PENDING`), then runs ([`build`]). Earlier versions can be launched
//!   meanwhile; the image takes no other change but to be deleted. A server that stops gives the build up; one that dies leaves that to the
//!   next start.
//! - **CREATED**, **CREATE_FAILED**, **UPDATED**, **UPDATE_FAILED**: at rest. A failed build leaves its record and its log, nothing else.
//! - **UPDATING** without a build: a version's status was changed, or a version is being deleted. Its snapshot stays as long as a MicroVM that
//!   was launched from it is not terminated.
//! - **DELETING**: only without MicroVMs that are not terminated; the store checks that and forbids new ones in one step. A build that runs is
//!   given up once the deletion is recorded; its end does not change the image's state any more. The name is reserved until the files are gone.

mod advice;
mod build;
mod checks;
mod driver;
mod endpoints;
mod machine;
mod readiness;
mod shape;
mod snapshots;
mod turns;
mod uplink;

use std::sync::Arc;

use hearth_build::ImageBuilder;
use hearth_machine::Engine;
use hearth_objects::Objects;
use hearth_store::{ChangeVersion, CreateVersion, DeleteImage, Store, StoreError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    capacity::Capacity,
    connectors::Policies,
    logs::{LogGroup, LogStore, Route, build_streams},
    records::{millis, time, version_name},
    roles::Roles,
    settings::Settings,
    types::{ImageSpec, VersionStatus},
};

pub(crate) use build::HOST_STOPPED;
pub(crate) use driver::{FIRST, failed_state};
pub(crate) use shape::{ShapeError, Sizes};
pub(crate) use snapshots::{Snapshots, image_dir, version_dir};
pub(crate) use turns::Turns;

/// What every image's driver works with.
pub(crate) struct Shared {
    pub store: Store,
    pub engine: Arc<dyn Engine>,
    pub builder: Arc<dyn ImageBuilder>,
    pub objects: Arc<dyn Objects>,
    pub logs: Arc<LogStore>,
    pub snapshots: Arc<Snapshots>,
    pub policies: Arc<Policies>,
    pub roles: Arc<dyn Roles>,
    pub capacity: Arc<Capacity>,
    pub sizes: Sizes,
    pub settings: Settings,
    /// One for each build that may run.
    pub turns: Turns,
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

/// A version that is to be made.
#[derive(Debug)]
pub(crate) struct Update {
    pub spec: ImageSpec,
    /// UUID.
    pub build_id: String,
    /// Idempotency token and the digest of what it stands for.
    pub token: Option<(String, String)>,
}

/// What became of a wish, as far as the store knows.
type Recorded<T> = Result<T, StoreError>;
type Answer<T> = oneshot::Sender<Recorded<T>>;

/// A message with someone who waits for the answer.
enum Request {
    Update(Box<Update>, Answer<CreateVersion>),
    SetStatus(i64, VersionStatus, Answer<ChangeVersion>),
    DeleteVersion(i64, Answer<ChangeVersion>),
    Delete(Answer<DeleteImage>),
}

/// How the rest of the domain reaches an image. Each call is answered when what it asks for is recorded, and with nothing if the driver has
/// ended.
pub(crate) struct Handle {
    requests: mpsc::UnboundedSender<Request>,
}

impl Handle {
    /// Starts an image's driver, with something to build or without.
    pub fn start(shared: &Arc<Shared>, image: Identity, job: Option<Job>) -> Self {
        let (requests, mailbox) = mpsc::unbounded_channel();
        shared.tasks.spawn(driver::Driver::new(Arc::clone(shared), image, mailbox, job).run());
        Self { requests }
    }

    /// Asks for a new version.
    pub async fn update(&self, update: Update) -> Option<Recorded<CreateVersion>> {
        self.ask(|answer| Request::Update(Box::new(update), answer)).await
    }

    /// Asks to let a version be launched, or not.
    pub async fn set_status(&self, number: i64, status: VersionStatus) -> Option<Recorded<ChangeVersion>> {
        self.ask(|answer| Request::SetStatus(number, status, answer)).await
    }

    /// Asks to delete a version.
    pub async fn delete_version(&self, number: i64) -> Option<Recorded<ChangeVersion>> {
        self.ask(|answer| Request::DeleteVersion(number, answer)).await
    }

    /// Asks to delete the image.
    pub async fn delete(&self) -> Option<Recorded<DeleteImage>> {
        self.ask(Request::Delete).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Option<Recorded<T>> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(request(answer)).ok()?;
        answered.await.ok()
    }
}

/// Deletes what a version in state `DELETING` has, then the version. Its snapshot stays while MicroVMs need it.
pub(crate) async fn finish_version_delete(shared: &Shared, image: &Identity, number: i64) -> Result<(), StoreError> {
    delete_build_logs(shared, image, number).await?;
    shared.store.finish_version_delete(&image.id, number, millis(std::time::SystemTime::now())).await?;
    shared.changed();
    shared.snapshots.release(&shared.store, shared.engine.as_ref(), &image.id, number).await;
    Ok(())
}

async fn delete_build_logs(shared: &Shared, image: &Identity, number: i64) -> Result<(), StoreError> {
    let all = hearth_store::Keyset { before: None, limit: u32::MAX };
    for build in shared.store.list_builds(&image.id, number, all).await? {
        // The operator's copies; what the API shows stays until its time has come, as on AWS.
        for stream in build_streams(time(build.created_ms), &version_name(number), &build.id) {
            if let Err(error) = shared.logs.delete_stream(&image.log_group().private(), &stream).await {
                tracing::warn!(image = image.name, stream, %error, "the log of a deleted version is left");
            }
        }
    }
    Ok(())
}

/// Deletes what an image in state `DELETING` has, then the image.
pub(crate) async fn finish_delete(shared: &Shared, image: &Identity) -> Result<(), StoreError> {
    let all = hearth_store::Keyset { before: None, limit: u32::MAX };
    for version in shared.store.list_versions(&image.id, all).await? {
        if let Some(snapshot) = shared.snapshots.forget(&image.id, version.number).await {
            shared.engine.forget(&snapshot).await;
        }
        delete_build_logs(shared, image, version.number).await?;
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
mod hook_tests;
#[cfg(test)]
mod tests;
