//! Keeps a build from filling the host's disk: it ends when less than a reserve is free.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Time between two looks. The kernel has no event for it.
const TICK: Duration = Duration::from_millis(500);

/// The host's disk has too little left.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the host's disk has less left than builds must leave free (`build_disk_reserve_mib`)")]
pub(crate) struct Low;

/// Watches the disk for as long as it lives.
#[derive(Debug)]
pub(crate) struct Guard {
    low: Arc<OnceLock<Low>>,
    _task: AbortOnDropHandle<()>,
}

impl Guard {
    /// Cancels `build` when one of the file systems of `places` has less than `reserve` bytes free. Nothing is watched if that is 0. Fails if it
    /// is so already.
    pub(crate) async fn start(places: Vec<PathBuf>, reserve: u64, build: CancellationToken) -> Result<Self, Low> {
        let low = Arc::new(OnceLock::new());
        let places = if reserve == 0 { Vec::new() } else { places };
        look(&places, reserve).await?;
        let found = Arc::clone(&low);
        let watch = async move {
            let mut ticks = interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while !places.is_empty() {
                ticks.tick().await;
                if let Err(low) = look(&places, reserve).await {
                    let _ = found.set(low);
                    build.cancel();
                    return;
                }
            }
        };
        Ok(Self { low, _task: AbortOnDropHandle::new(tokio::spawn(watch)) })
    }

    /// Why it has cancelled the build, if it has.
    pub(crate) fn low(&self) -> Option<Low> {
        self.low.get().cloned()
    }
}

/// Whether the file system of each place has so many bytes free. Blocks.
pub(crate) fn is_free(places: &[PathBuf], reserve: u64) -> bool {
    least_free(places).is_none_or(|free| free >= reserve)
}

async fn look(places: &[PathBuf], reserve: u64) -> Result<(), Low> {
    let places = places.to_vec();
    let free = spawn_blocking(move || least_free(&places));
    match free.await.expect("asking for free space does not panic") {
        Some(free) if free < reserve => {
            tracing::warn!(free_mib = free >> 20, reserve_mib = reserve >> 20, "the host's disk is nearly full: builds are ended");
            Err(Low)
        }
        _ => Ok(()),
    }
}

/// Least free space of the file systems that can be asked.
fn least_free(places: &[PathBuf]) -> Option<u64> {
    places.iter().filter_map(|place| nix::sys::statvfs::statvfs(place).ok()).map(free_bytes).min()
}

fn free_bytes(found: nix::sys::statvfs::Statvfs) -> u64 {
    found.blocks_available().saturating_mul(found.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn build_is_cancelled_or_refused_below_the_reserve_only() {
        let dir = tempfile::tempdir().unwrap();
        let free = free_bytes(nix::sys::statvfs::statvfs(dir.path()).unwrap());
        let here = || vec![dir.path().to_owned()];
        let build = CancellationToken::new();
        let guard = Guard::start(here(), 1, build.clone()).await.unwrap();
        assert!(guard.low().is_none() && !build.is_cancelled());
        let low = Guard::start(here(), free.saturating_mul(2), build.clone()).await.unwrap_err();
        assert!(low.to_string().contains("build_disk_reserve_mib"), "{low}");
        Guard::start(here(), 0, build.clone()).await.unwrap();
    }
}
