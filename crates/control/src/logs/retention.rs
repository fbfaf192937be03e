//! What is kept: segments go when they have not grown for long enough, and the oldest ones of a group go when it holds too much.
//!
//! A segment that is being written to stays; segments are small against what a group may hold, and the smaller the more are being written.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{Duration, SystemTime},
};

use super::{
    LogStore, blocking, names,
    segments::{Segment, Segments},
};

/// After the disk failed, so that a broken one does not keep a core busy.
const RETRY: Duration = Duration::from_secs(60);
/// Sizes of segments, in bytes.
const LARGEST_SEGMENT: u64 = 4 << 20;
const SMALLEST_SEGMENT: u64 = 16 << 10;
/// All segments that are being written to may together have this part of what a group may hold.
const OPEN_PART: u64 = 8;

/// How long and how much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Since a line was written.
    pub age: Duration,
    /// Bytes on the disk of all streams of a group.
    pub group_bytes: u64,
}

impl Default for Retention {
    /// 14 days, 256 MiB.
    fn default() -> Self {
        Self { age: Duration::from_secs(14 * 24 * 3600), group_bytes: 256 << 20 }
    }
}

/// What is known of a group between two looks at its files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GroupSize {
    bytes: u64,
    /// It is looked at when it has become larger than this.
    look_at: u64,
}

/// A group as it is on the disk.
struct Found {
    dir: PathBuf,
    /// With the stream's directory.
    segments: Vec<(PathBuf, Segment)>,
}

impl LogStore {
    /// Removes what is due, now and whenever something is. Never ends.
    pub async fn keep(self: Arc<Self>) {
        loop {
            let due_in = match self.sweep(SystemTime::now()).await {
                // What is written from now on is due no sooner than that.
                Ok(oldest) => {
                    oldest.map_or(self.retention.age, |at| (at + self.retention.age).duration_since(SystemTime::now()).unwrap_or_default())
                }
                Err(error) => {
                    tracing::error!(%error, "old logs are not removed");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            tokio::select! {
                () = tokio::time::sleep(due_in) => {}
                () = self.overfull.notified() => {}
            }
        }
    }

    /// Largest size of a segment, in bytes.
    pub(super) fn segment_limit(&self) -> u64 {
        let open = self.open_streams().len() as u64;
        (self.retention.group_bytes / OPEN_PART / open.max(1)).clamp(SMALLEST_SEGMENT, LARGEST_SEGMENT)
    }

    /// Counts bytes that were written to a group.
    pub(super) fn grew(&self, group: &Path, bytes: u64) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let first = GroupSize { bytes: 0, look_at: self.retention.group_bytes };
        let size = match sizes.get_mut(group) {
            Some(size) => size,
            None => sizes.entry(group.to_owned()).or_insert(first),
        };
        size.bytes += bytes;
        if size.bytes > size.look_at {
            self.overfull.notify_one();
        }
    }

    /// Removes what is due; tells how old the oldest is that stays and that nobody writes to.
    pub(super) async fn sweep(self: &Arc<Self>, now: SystemTime) -> io::Result<Option<SystemTime>> {
        let store = Arc::clone(self);
        blocking(move || {
            let mut oldest: Option<SystemTime> = None;
            let mut sizes = HashMap::new();
            for group in groups(&store.dir)? {
                let (dir, kept, oldest_here) = store.sweep_group(group, now)?;
                oldest = oldest.into_iter().chain(oldest_here).min();
                // What cannot be removed yet is not worth a look at every batch.
                let look_at = store.retention.group_bytes.max(kept + store.retention.group_bytes / OPEN_PART);
                sizes.insert(dir, GroupSize { bytes: kept, look_at });
            }
            *store.sizes.lock().unwrap_or_else(PoisonError::into_inner) = sizes;
            Ok(oldest)
        })
        .await
    }

    /// Removes what is due of a group. Returns its directory, the bytes that stay, and the age of the oldest segment.
    fn sweep_group(&self, group: Found, now: SystemTime) -> io::Result<(PathBuf, u64, Option<SystemTime>)> {
        let Found { dir, mut segments } = group;
        segments.sort_by_key(|(_, segment)| segment.modified);
        let mut kept: u64 = segments.iter().map(|(_, segment)| segment.bytes).sum();
        // Room for what is written until the next look.
        let most = self.retention.group_bytes - self.retention.group_bytes / OPEN_PART;
        let overfull = kept > self.retention.group_bytes;
        let mut oldest = None;
        for (stream, segment) in segments {
            // The files were looked at first: a segment that nobody grew then is not grown again.
            if self.grows(&stream, segment.start) {
                continue;
            }
            let old = segment.modified + self.retention.age <= now;
            let too_much = overfull && kept > most;
            if !(old || too_much) {
                oldest = oldest.or(Some(segment.modified));
                continue;
            }
            match std::fs::remove_file(&segment.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => kept -= segment.bytes,
            }
            names::prune(&stream, &dir);
        }
        names::prune(&dir, dir.parent().unwrap_or(&dir));
        Ok((dir, kept, oldest))
    }

    fn grows(&self, stream: &Path, start: u64) -> bool {
        self.open_streams().get(stream).is_some_and(|open| open.progress.borrow().segment == Some(start))
    }
}

/// Every group of every scope.
fn groups(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (_, account) in names::list(&dir.join("public"))?.into_iter().chain(names::list(&dir.join("operator"))?) {
        for (_, region) in names::list(&account)? {
            for (_, group) in names::list(&region)? {
                let mut segments = Vec::new();
                for (_, stream) in names::list(&group)? {
                    segments.extend(Segments::of(&stream)?.0.into_iter().map(|segment| (stream.clone(), segment)));
                }
                found.push(Found { dir: group, segments });
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::{
        LogLine,
        tests::{group, line, route},
    };

    async fn kept(logs: &Arc<LogStore>, stream: &str) -> Vec<LogLine> {
        use futures::StreamExt;
        logs.follow(&group(), stream, 0).collect().await
    }

    fn bytes(dir: &Path) -> u64 {
        groups(dir).unwrap().iter().flat_map(|group| &group.segments).map(|(_, segment)| segment.bytes).sum()
    }

    #[tokio::test]
    async fn what_is_too_old_goes_and_its_group_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention { age: Duration::from_secs(60), ..Retention::default() });
        logs.writer(&route("old")).append(line("x")).await;
        let writer = logs.writer(&route("open"));
        writer.append(line("y")).await;
        let mut seen = logs.follow(&group(), "open", 0);
        futures::StreamExt::next(&mut seen).await.unwrap();
        while logs.open_streams().len() > 1 {
            tokio::task::yield_now().await;
        }
        let now = SystemTime::now();
        let oldest = logs.sweep(now).await.unwrap().unwrap();
        assert!(oldest <= now && oldest + Duration::from_secs(60) > now, "the timer is set for what is the oldest");
        assert_eq!(kept(&logs, "old").await.len(), 1);
        assert_eq!(logs.sweep(now + Duration::from_secs(61)).await.unwrap(), None);
        assert_eq!(kept(&logs, "old").await, []);
        assert_eq!(logs.read(&group(), "open", 0).await.unwrap().lines.len(), 1, "somebody may yet write to it");
        drop(writer);
        logs.close().await;
        logs.sweep(now + Duration::from_secs(61)).await.unwrap();
        assert!(!logs.group_dir(&group()).exists());
    }

    #[tokio::test]
    async fn the_keeper_looks_again_when_something_is_due() {
        let dir = tempfile::tempdir().unwrap();
        let age = Duration::from_millis(300);
        let logs = LogStore::new(dir.path().to_owned(), Retention { age, ..Retention::default() });
        logs.writer(&route("s")).append(line("x")).await;
        logs.close().await;
        let keeper = tokio::spawn(Arc::clone(&logs).keep());
        let gone = async {
            while logs.group_dir(&group()).exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect("removed by the keeper");
        keeper.abort();
    }

    #[tokio::test]
    async fn a_group_that_holds_too_much_loses_its_oldest_lines_while_it_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let limit = 1 << 20;
        let logs = LogStore::new(dir.path().to_owned(), Retention { group_bytes: limit, ..Retention::default() });
        let keeper = tokio::spawn(Arc::clone(&logs).keep());
        let writer = logs.writer(&route("s"));
        let text = "x".repeat(1000);
        for index in 0..3000 {
            writer.append(line(&format!("{index} {text}"))).await;
        }
        drop(writer);
        logs.close().await;
        keeper.abort();
        logs.sweep(SystemTime::now()).await.unwrap();
        assert!(bytes(dir.path()) <= limit, "{}", bytes(dir.path()));
        let lines = kept(&logs, "s").await;
        assert!(lines.len() > 500, "{}", lines.len());
        assert!(lines.last().unwrap().text.starts_with("2999 "), "the newest stay");
        let chunk = logs.read(&group(), "s", 0).await.unwrap();
        assert_eq!(chunk.lines[0], lines[0], "an offset of what is gone leads to the oldest that is kept");
    }
}
