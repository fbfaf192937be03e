//! What a start makes of what an earlier server left: interrupted builds have failed, MicroVMs sleep if their state is on disk and are over
//! otherwise, and files that belong to nothing are deleted.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use hearth_store::ImageRow;

use crate::{
    control::StartError,
    images::{self, Identity},
    microvm::{self, HOST_STOPPED, Record, SuspendedBy},
    records::{self, build_bytes, millis, version_name, word},
    registry::Registry,
    types::{BuildSizes, ImageState, MicrovmState, VersionState},
};

type ImageHandles = HashMap<String, Arc<images::Handle>>;

/// Brings records and files into agreement and starts the drivers.
pub(crate) async fn recover(
    images: &Arc<images::Shared>,
    microvms: &Arc<microvm::Shared>,
    registry: &Registry,
) -> Result<ImageHandles, StartError> {
    fail_interrupted_builds(images).await?;
    let handles = take_up_images(images).await?;
    let records = settle_microvms(microvms).await?;
    remove_orphans(images, &records).await?;
    for record in records {
        let over = record.vm.state == MicrovmState::Terminated;
        registry.insert(if over { microvm::Handle::terminated(record) } else { microvm::Handle::start(microvms, record, None) });
    }
    Ok(handles)
}

async fn fail_interrupted_builds(shared: &images::Shared) -> Result<(), StartError> {
    for build in shared.store.unfinished_builds().await? {
        let (bytes, state) = (build_bytes(BuildSizes::default()), word(images::failed_state(build.number)));
        let now = millis(SystemTime::now());
        shared.store.build_failed(&build.image_id, build.number, &build.id, images::HOST_STOPPED, bytes, &state, now).await?;
    }
    Ok(())
}

async fn take_up_images(shared: &Arc<images::Shared>) -> Result<ImageHandles, StartError> {
    let mut handles = ImageHandles::new();
    for row in shared.store.all_images().await? {
        let image = identity(&row);
        if row.state == word(ImageState::Deleting) {
            images::finish_delete(shared, &image).await?;
        } else {
            if row.state == word(ImageState::Updating) {
                finish_update(shared, &image).await?;
            }
            handles.insert(row.id, Arc::new(images::Handle::start(shared, image, None)));
        }
    }
    Ok(handles)
}

/// Ends what was done to an image's versions; its builds have ended already.
async fn finish_update(shared: &Arc<images::Shared>, image: &Identity) -> Result<(), StartError> {
    let all = hearth_store::Keyset { before: None, limit: u32::MAX };
    for version in shared.store.list_versions(&image.id, all).await? {
        if version.state == word(VersionState::Deleting) {
            images::finish_version_delete(shared, image, version.number).await?;
        }
    }
    shared.store.image_updated(&image.id, millis(SystemTime::now())).await?;
    Ok(())
}

fn identity(row: &ImageRow) -> Identity {
    Identity { id: row.id.clone(), account: row.account.clone(), region: row.region.clone(), name: row.name.clone() }
}

/// Whether a MicroVM's directory holds what its last suspend left. The engine gives that its name last, and takes it away before the
/// machine runs on.
pub(crate) async fn holds_suspended_state(dir: &Path) -> bool {
    tokio::fs::try_exists(dir.join("suspended")).await.unwrap_or(false)
}

/// Every MicroVM, at rest: suspended or terminated.
async fn settle_microvms(shared: &microvm::Shared) -> Result<Vec<Record>, StartError> {
    let mut settled = Vec::new();
    for row in shared.store.all_microvms().await? {
        let id = row.id.clone();
        let mut record = match records::microvm(row) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(%error, "a MicroVM is left out");
                continue;
            }
        };
        let sleeps = holds_suspended_state(&shared.dir.join(&id)).await;
        if settle(&mut record, sleeps, SystemTime::now()) {
            tracing::info!(id, state = ?record.vm.state, reason = record.vm.state_reason, "took up a MicroVM of an earlier server");
            shared.store.save_microvm(&id, &records::change(&record)).await?;
        }
        settled.push(record);
    }
    Ok(settled)
}

/// Decides what has become of a MicroVM; tells whether that is news.
fn settle(record: &mut Record, sleeps: bool, now: SystemTime) -> bool {
    let vm = &mut record.vm;
    match vm.state {
        MicrovmState::Terminated => return false,
        MicrovmState::Suspended if sleeps => return false,
        MicrovmState::Pending | MicrovmState::Running | MicrovmState::Suspending if sleeps => {
            vm.state = MicrovmState::Suspended;
            record.suspended_at.get_or_insert(now);
            record.suspended_by.get_or_insert(SuspendedBy::Host);
        }
        _ => {
            vm.state = MicrovmState::Terminated;
            vm.state_reason.get_or_insert_with(|| HOST_STOPPED.to_owned());
            vm.terminated_at = Some(now);
        }
    }
    true
}

async fn remove_orphans(shared: &images::Shared, microvms: &[Record]) -> Result<(), StartError> {
    let data_dir = &shared.settings.data_dir;
    keep_only(&data_dir.join("tmp"), &HashSet::new()).await?;
    let suspended = microvms.iter().filter(|record| record.vm.state == MicrovmState::Suspended).map(|record| record.vm.id.clone());
    keep_only(&data_dir.join("microvms"), &suspended.collect()).await?;
    let successful = word(VersionState::Successful);
    let all = hearth_store::Keyset { before: None, limit: u32::MAX };
    let mut ids = HashSet::new();
    for image in shared.store.all_images().await? {
        let versions = shared.store.list_versions(&image.id, all).await?;
        let launched = versions.into_iter().filter(|version| version.state == successful).map(|version| version.number);
        // A version may be gone whose MicroVMs are not.
        let resumed = microvms.iter().filter(|record| record.image_id == image.id && record.vm.state != MicrovmState::Terminated);
        let kept: HashSet<String> = launched.chain(resumed.map(|record| record.number)).map(version_name).collect();
        if !kept.is_empty() {
            keep_only(&images::image_dir(data_dir, &image.id), &kept).await?;
            ids.insert(image.id);
        }
    }
    keep_only(&data_dir.join("images"), &ids).await
}

/// Makes a directory if it is missing, and deletes what is in it but for some names.
async fn keep_only(dir: &Path, kept: &HashSet<String>) -> Result<(), StartError> {
    let (dir_owned, kept) = (dir.to_owned(), kept.clone());
    let cleaning = tokio::task::spawn_blocking(move || -> io::Result<()> {
        std::fs::create_dir_all(&dir_owned)?;
        for entry in std::fs::read_dir(&dir_owned)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| kept.contains(name)) {
                continue;
            }
            tracing::info!(path = %entry.path().display(), "removing what an earlier server left");
            if entry.file_type()?.is_dir() { std::fs::remove_dir_all(entry.path())? } else { std::fs::remove_file(entry.path())? }
        }
        Ok(())
    });
    let cleaned = cleaning.await.map_err(io::Error::other).flatten();
    cleaned.map_err(|source| StartError::Host { what: format!("clearing {}", dir.display()), source })
}
