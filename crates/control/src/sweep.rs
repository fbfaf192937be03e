//! Removes the records of MicroVMs that have been terminated for long enough, and the operator's copies of their logs. What the API shows of
//! those stays until its time has come, as on AWS.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use hearth_store::{MicrovmRow, StoreError};

use crate::{
    logs::{LogGroup, stream_name},
    microvm::Shared,
    records::{millis, time, version_name},
    registry::Registry,
};

/// After the store failed, so that a broken disk does not keep a core busy.
const RETRY: Duration = Duration::from_secs(60);

/// Sweeps when the oldest termination is due; sleeps otherwise. Never ends.
pub(crate) async fn run(shared: Arc<Shared>, registry: Arc<Registry>, retention: Duration) {
    loop {
        let due_in = match next(&shared, retention).await {
            Ok(Some(due_in)) => due_in,
            Ok(None) => {
                shared.terminated.notified().await;
                continue;
            }
            Err(error) => {
                tracing::error!(%error, "terminated MicroVMs are not removed");
                RETRY
            }
        };
        tokio::time::sleep(due_in).await;
        if let Err(error) = sweep(&shared, &registry, retention).await {
            tracing::error!(%error, "terminated MicroVMs are not removed");
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// How long it is until something is to be swept; nothing if there is nothing terminated.
async fn next(shared: &Shared, retention: Duration) -> Result<Option<Duration>, StoreError> {
    let oldest = shared.store.oldest_termination().await?;
    Ok(oldest.map(|at| (time(at) + retention).duration_since(SystemTime::now()).unwrap_or_default()))
}

async fn sweep(shared: &Shared, registry: &Registry, retention: Duration) -> Result<(), StoreError> {
    let until = SystemTime::now().checked_sub(retention).map_or(0, millis);
    for row in shared.store.terminated_until(until).await? {
        remove_log(shared, &row).await;
        shared.store.delete_microvm(&row.id).await?;
        registry.remove(&row.id);
        shared.changes.send_modify(|count| *count += 1);
    }
    Ok(())
}

async fn remove_log(shared: &Shared, row: &MicrovmRow) {
    let group = LogGroup::of_image(&row.account, &row.region, &row.image_name).private();
    let stream = stream_name(time(row.started_ms), &version_name(row.number), &row.id);
    if let Err(error) = shared.logs.delete_stream(&group, &stream).await {
        tracing::warn!(id = row.id, %error, "the log of a removed MicroVM is left");
    }
}
