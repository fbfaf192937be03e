//! The task that owns an image: the only code that changes its state.

use std::{sync::Arc, time::SystemTime};

use hearth_store::DeleteImage;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    records::{build_bytes, millis, word},
    types::{BuildSizes, ImageState},
};

use super::{
    Deleted, Identity, Job, Shared,
    build::{Failure, HOST_FAILED, Pipeline},
    finish_delete,
};

/// A task of its own: it may hold the store's one writer, and must get on while the driver waits for that.
type Building = AbortOnDropHandle<Result<BuildSizes, Failure>>;

pub struct Driver {
    shared: Arc<Shared>,
    image: Identity,
    deletes: mpsc::UnboundedReceiver<oneshot::Sender<Deleted>>,
    building: Option<(Job, Building)>,
}

impl Driver {
    pub fn new(shared: Arc<Shared>, image: Identity, deletes: mpsc::UnboundedReceiver<oneshot::Sender<Deleted>>, job: Option<Job>) -> Self {
        let building = job.map(|job| {
            let pipeline = Pipeline::new(Arc::clone(&shared), image.clone(), job.clone());
            let building = AbortOnDropHandle::new(tokio::spawn(pipeline.run()));
            (job, building)
        });
        Self { shared, image, deletes, building }
    }

    pub async fn run(mut self) {
        loop {
            let building = self.building.is_some();
            tokio::select! {
                built = finished(&mut self.building) => self.built(built).await,
                delete = self.deletes.recv() => match delete {
                    Some(answer) => if self.delete(answer).await { return },
                    None => return,
                },
                // A build notices by itself.
                () = self.shared.stop.cancelled(), if !building => return,
            }
        }
    }

    async fn built(&mut self, (job, result): (Job, Result<BuildSizes, Failure>)) {
        let (store, id) = (&self.shared.store, &self.image.id);
        let now = millis(SystemTime::now());
        let recorded = match result {
            Ok(sizes) => {
                let state = word(ImageState::Created);
                store.build_succeeded(id, job.number, &job.build_id, build_bytes(sizes), &state, now).await
            }
            Err(failure) => {
                tracing::info!(image = self.image.name, build = job.build_id, reason = failure.reason, "an image could not be built");
                let state = word(ImageState::CreateFailed);
                let bytes = build_bytes(failure.sizes);
                store.build_failed(id, job.number, &job.build_id, &failure.reason, bytes, &state, now).await
            }
        };
        if let Err(error) = recorded {
            // The next start finds the build unfinished and calls it failed.
            tracing::error!(image = self.image.name, build = job.build_id, %error, "the end of a build could not be recorded");
        }
        self.shared.changed();
    }

    /// Deletes the image if that is possible; tells whether it is gone.
    async fn delete(&mut self, answer: oneshot::Sender<Deleted>) -> bool {
        let begun = self.shared.store.begin_image_delete(&self.image.id, millis(SystemTime::now())).await;
        let started = matches!(begun, Ok(DeleteImage::Started));
        if started {
            self.shared.changed();
        }
        // Fails when the caller has gone away, which changes nothing.
        let _ = answer.send(begun);
        if started && let Err(error) = finish_delete(&self.shared, &self.image).await {
            tracing::error!(image = self.image.name, %error, "the end of an image's deletion could not be recorded; the next start repeats it");
        }
        started
    }
}

/// The build's result; never, if there is none. Cancel safe.
async fn finished(building: &mut Option<(Job, Building)>) -> (Job, Result<BuildSizes, Failure>) {
    match building {
        Some((job, running)) => {
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
