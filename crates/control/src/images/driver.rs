//! The task that owns an image: the only code that changes its state.

use std::{sync::Arc, time::SystemTime};

use hearth_store::{ChangeVersion, ClientToken, CreateVersion, DeleteImage, NewVersion, Scope};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    records::{build_bytes, json, millis, word},
    types::{BuildSizes, ImageState, VersionStatus},
};

use super::{
    Answer, Identity, Job, Recorded, Request, Shared, Update,
    build::{Failure, HOST_FAILED, Pipeline},
    finish_delete, finish_version_delete,
};

/// Number of the version that makes an image; all others update it.
pub(crate) const FIRST: i64 = 1;

/// The build that runs.
struct Building {
    job: Job,
    /// Gives it up.
    stop: CancellationToken,
    /// A task of its own: it may hold the store's one writer, and must get on while the driver waits for that.
    running: AbortOnDropHandle<Result<BuildSizes, Failure>>,
}

pub struct Driver {
    shared: Arc<Shared>,
    image: Identity,
    mailbox: mpsc::UnboundedReceiver<Request>,
    building: Option<Building>,
}

impl Driver {
    pub fn new(shared: Arc<Shared>, image: Identity, mailbox: mpsc::UnboundedReceiver<Request>, job: Option<Job>) -> Self {
        let mut driver = Self { shared, image, mailbox, building: None };
        driver.building = job.map(|job| driver.build(job));
        driver
    }

    pub async fn run(mut self) {
        loop {
            let building = self.building.is_some();
            tokio::select! {
                built = finished(&mut self.building) => self.built(built).await,
                request = self.mailbox.recv() => match request {
                    Some(Request::Update(update, answer)) => self.update(*update, answer).await,
                    Some(Request::SetStatus(number, status, answer)) => self.set_status(number, status, answer).await,
                    Some(Request::DeleteVersion(number, answer)) => self.delete_version(number, answer).await,
                    Some(Request::Delete(answer)) => if self.delete(answer).await { return },
                    None => return,
                },
                // A build notices by itself.
                () = self.shared.stop.cancelled(), if !building => return,
            }
        }
    }

    fn build(&self, job: Job) -> Building {
        let stop = self.shared.stop.child_token();
        let pipeline = Pipeline::new(Arc::clone(&self.shared), self.image.clone(), job.clone(), stop.clone());
        Building { job, stop, running: AbortOnDropHandle::new(tokio::spawn(pipeline.run())) }
    }

    async fn built(&mut self, (job, result): (Job, Result<BuildSizes, Failure>)) {
        let (store, id) = (&self.shared.store, &self.image.id);
        let now = millis(SystemTime::now());
        let recorded = match result {
            Ok(sizes) => {
                let state = word(if job.number == FIRST { ImageState::Created } else { ImageState::Updated });
                store.build_succeeded(id, job.number, &job.build_id, build_bytes(sizes), &state, now).await
            }
            Err(failure) => {
                tracing::info!(image = self.image.name, build = job.build_id, reason = failure.reason, "an image could not be built");
                let (state, bytes) = (word(failed_state(job.number)), build_bytes(failure.sizes));
                store.build_failed(id, job.number, &job.build_id, &failure.reason, bytes, &state, now).await
            }
        };
        if let Err(error) = recorded {
            // The next start finds the build unfinished and calls it failed.
            tracing::error!(image = self.image.name, build = job.build_id, %error, "the end of a build could not be recorded");
        }
        self.shared.changed();
    }

    /// Records the next version and starts its build.
    async fn update(&mut self, update: Update, answer: Answer<CreateVersion>) {
        let Update { spec, build_id, token } = update;
        let created_ms = millis(SystemTime::now());
        let version = NewVersion {
            scope: Scope { account: &self.image.account, region: &self.image.region },
            image_id: &self.image.id,
            spec: &json(&spec),
            build_id: &build_id,
            limit: self.shared.settings.quotas.versions_per_image,
            now_ms: created_ms,
        };
        let token = token.as_ref().map(|(token, fingerprint)| ClientToken { operation: "UpdateMicrovmImage", token, fingerprint });
        let created = self.shared.store.create_version(&version, token).await;
        if let Ok(CreateVersion::Created { number }) = created {
            self.building = Some(self.build(Job { build_id, number, spec, created_ms }));
            self.shared.changed();
        }
        self.answer(answer, created);
    }

    async fn set_status(&mut self, number: i64, status: VersionStatus, answer: Answer<ChangeVersion>) {
        let (store, id) = (&self.shared.store, &self.image.id);
        let begun = store.begin_status_change(id, number, &word(status), millis(SystemTime::now())).await;
        let started = matches!(begun, Ok(ChangeVersion::Started));
        self.answer(answer, begun);
        if started {
            self.shared.changed();
            if let Err(error) = store.image_updated(id, millis(SystemTime::now())).await {
                tracing::error!(image = self.image.name, %error, "the end of an image's update could not be recorded; the next start repeats it");
            }
            self.shared.changed();
        }
    }

    async fn delete_version(&mut self, number: i64, answer: Answer<ChangeVersion>) {
        let begun = self.shared.store.begin_version_delete(&self.image.id, number, millis(SystemTime::now())).await;
        let started = matches!(begun, Ok(ChangeVersion::Started));
        self.answer(answer, begun);
        if started {
            self.shared.changed();
            if let Err(error) = finish_version_delete(&self.shared, &self.image, number).await {
                tracing::error!(image = self.image.name, %error, "the end of a version's deletion could not be recorded; the next start repeats it");
            }
        }
    }

    /// Gives up the build that runs, if one does, and waits until it has ended: its machine, its processes and its files are gone then, or it
    /// has left a snapshot like any other.
    async fn give_up_build(&mut self) {
        let Some(building) = &self.building else { return };
        building.stop.cancel();
        let (job, result) = finished(&mut self.building).await;
        let outcome = result.map_or_else(|failure| failure.reason, |_sizes| "it had just succeeded".to_owned());
        tracing::info!(image = self.image.name, build = job.build_id, outcome, "a build ended because its image is deleted");
    }

    /// Deletes the image if that is possible; tells whether it is gone. A build that runs is given up, but only once the deletion is recorded.
    async fn delete(&mut self, answer: Answer<DeleteImage>) -> bool {
        let begun = self.shared.store.begin_image_delete(&self.image.id, millis(SystemTime::now())).await;
        let started = matches!(begun, Ok(DeleteImage::Started));
        if started {
            self.shared.changed();
        }
        self.answer(answer, begun);
        if !started {
            return false;
        }
        self.give_up_build().await;
        if let Err(error) = finish_delete(&self.shared, &self.image).await {
            tracing::error!(image = self.image.name, %error, "the end of an image's deletion could not be recorded; the next start repeats it");
        }
        true
    }

    fn answer<T>(&self, answer: Answer<T>, recorded: Recorded<T>) {
        if answer.send(recorded).is_err() {
            tracing::debug!(image = self.image.name, "whoever asked has gone away, which changes nothing");
        }
    }
}

/// An image's state after a build that failed.
pub(crate) fn failed_state(number: i64) -> ImageState {
    if number == FIRST { ImageState::CreateFailed } else { ImageState::UpdateFailed }
}

/// The build's result; never, if there is none. Cancel safe.
async fn finished(building: &mut Option<Building>) -> (Job, Result<BuildSizes, Failure>) {
    match building {
        Some(Building { job, running, .. }) => {
            let result = running.await;
            let job = job.clone();
            *building = None;
            let result = result.unwrap_or_else(|error| {
                tracing::error!(build = job.build_id, %error, "a build broke off");
                Err(Failure { reason: HOST_FAILED.to_owned(), sizes: BuildSizes::default() })
            });
            (job, result)
        }
        None => std::future::pending().await,
    }
}
