//! Logs of builds and MicroVMs: append-only files that can be read while they grow.
//!
//! ```text
//! <dir>/public/<account>/<region>/<group>/<stream>/<offset>.jsonl     what the CloudWatch Logs API shows
//! <dir>/operator/…                                                    the operator's copies of what is logged elsewhere or nowhere
//! ```
//!
//! Each line is a JSON object: `t` milliseconds since the Unix epoch, `s` the source (`build`, `stdout`, `stderr`, `system`), `m` the text,
//! `i`, if present, how many milliseconds after `t` it arrived here, and `d`, if present, how many lines were lost where this one stands, which says so. A line is
//! never older than the one before it. A stream is open while a [`LogWriter`] for it lives; readers of an open stream are told when it grows.
//! What has become too old or too much is removed by [`LogStore::keep`].

mod names;
mod read;
mod retention;
mod route;
mod segments;
mod write;

use std::{
    collections::HashMap,
    io,
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use futures::stream::{self, BoxStream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

pub use read::{Event, Events, Filter, Filtered, GroupInfo, Limits, Place, Position, ReadError, StreamInfo, Streams, Times, event_id};
pub use retention::Retention;
pub use route::Route;
pub use write::LogWriter;

use segments::Segments;

/// Bytes of a stream that are read at once.
const CHUNK_BYTES: u64 = 256 << 10;

/// A log group: streams that belong together. Two scopes may have groups of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LogGroup {
    /// Twelve digits.
    pub account: String,
    /// For example `us-east-1`.
    pub region: String,
    /// For example `/aws/lambda-microvms/demo`.
    pub name: String,
    /// For the operator's eyes: no API of the service shows it.
    pub private: bool,
}

impl LogGroup {
    /// A group that the API shows.
    pub fn new(account: &str, region: &str, name: impl Into<String>) -> Self {
        Self { account: account.to_owned(), region: region.to_owned(), name: name.into(), private: false }
    }

    /// The group of an image's builds and of the MicroVMs that run it (SPEC 13.1).
    pub fn of_image(account: &str, region: &str, image_name: &str) -> Self {
        Self::new(account, region, format!("/aws/lambda-microvms/{image_name}"))
    }

    /// ARN of a stream of this group, as policies name it.
    pub fn stream_arn(&self, stream: &str) -> String {
        let Self { account, region, name, .. } = self;
        format!("arn:aws:logs:{region}:{account}:log-group:{name}:log-stream:{stream}")
    }

    /// Where the operator's copies are of what would be in this group by default.
    pub fn private(self) -> Self {
        Self { private: true, ..self }
    }
}

/// Version that the stream of a Dockerfile's output has in its name (SPEC 13.1).
const BUILD_VERSION: &str = "0.0";

/// A stream's name: `YYYY/MM/DD[<version>]<id>`, the date in UTC (SPEC 13.1).
pub fn stream_name(at: SystemTime, version: &str, id: &str) -> String {
    let at = time::OffsetDateTime::from(at);
    format!("{:04}/{:02}/{:02}[{version}]{id}", at.year(), u8::from(at.month()), at.day())
}

/// The streams of a build, in the order in which they are written: the Dockerfile's, and the console of the MicroVM that is captured, which has
/// the image's version in its name (SPEC 13.1).
pub fn build_streams(created_at: SystemTime, version: &str, build_id: &str) -> [String; 2] {
    [BUILD_VERSION, version].map(|version| stream_name(created_at, version, build_id))
}

/// Who wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogOrigin {
    /// The build of an image, and the server about it.
    Build,
    /// The application's standard output.
    Stdout,
    /// The application's standard error.
    Stderr,
    /// The server or the guest about a MicroVM. For the operator: the API shows what builds and apps wrote.
    System,
}

/// A line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Milliseconds since the Unix epoch.
    #[serde(rename = "t")]
    pub time_ms: u64,
    #[serde(rename = "s")]
    pub origin: LogOrigin,
    /// Without its newline.
    #[serde(rename = "m")]
    pub text: String,
    /// Lines lost before this one. As it is stored, a line of its own tells of them.
    #[serde(rename = "d", default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
    /// Milliseconds from its time to its arrival here. The writer sets it.
    #[serde(rename = "i", default, skip_serializing_if = "is_zero")]
    pub late_ms: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl LogLine {
    /// A line that was written now.
    pub fn now(origin: LogOrigin, text: impl Into<String>) -> Self {
        Self { time_ms: now_ms(), origin, text: text.into(), dropped: 0, late_ms: 0 }
    }
}

impl From<hearth_guest_protocol::LogRecord> for LogLine {
    fn from(record: hearth_guest_protocol::LogRecord) -> Self {
        use hearth_guest_protocol::LogSource;
        let origin = match record.source {
            LogSource::Stdout => LogOrigin::Stdout,
            LogSource::Stderr => LogOrigin::Stderr,
            LogSource::System => LogOrigin::System,
        };
        let text = String::from_utf8_lossy(&record.line).into_owned();
        Self { time_ms: record.time_ns / 1_000_000, origin, text, dropped: record.dropped, late_ms: 0 }
    }
}

/// Part of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    pub lines: Vec<LogLine>,
    /// Where the next part begins: an offset in bytes.
    pub next: u64,
}

/// All logs.
#[derive(Debug)]
pub struct LogStore {
    dir: PathBuf,
    retention: Retention,
    open: Mutex<HashMap<PathBuf, write::Open>>,
    /// Bytes of each group's directory.
    sizes: Mutex<HashMap<PathBuf, retention::GroupSize>>,
    /// A group has more than it may keep.
    overfull: Notify,
    writers: TaskTracker,
}

impl LogStore {
    /// Logs in a directory, made when the first line is written.
    pub fn new(dir: PathBuf, retention: Retention) -> Arc<Self> {
        Arc::new(Self {
            dir,
            retention,
            open: Mutex::default(),
            sizes: Mutex::default(),
            overfull: Notify::new(),
            writers: TaskTracker::new(),
        })
    }

    /// What is kept, and how long.
    pub fn retention(&self) -> Retention {
        self.retention
    }

    /// Opens what a route leads to, until the writer is dropped.
    pub fn writer(self: &Arc<Self>, route: &Route) -> LogWriter {
        let open = |(group, stream): &(LogGroup, String)| write::open(self, group, self.stream_dir(group, stream));
        LogWriter::new(open(&route.own), route.shipped.as_ref().map(open))
    }

    /// Waits until every line is on its way to the disk. No writer may be alive.
    pub async fn close(&self) {
        self.writers.close();
        self.writers.wait().await;
    }

    /// Where the operator finds a stream: in the operator's copy of its group, if it is there.
    pub async fn own_copy(&self, group: &LogGroup, stream: &str) -> LogGroup {
        let private = group.clone().private();
        let dir = self.stream_dir(&private, stream);
        let open = self.open_streams().contains_key(&dir);
        if open || tokio::fs::try_exists(dir).await.unwrap_or(false) { private } else { group.clone() }
    }

    /// Reads some lines from an offset that an earlier read returned, or 0. No lines: the end has been reached.
    pub async fn read(&self, group: &LogGroup, stream: &str, from: u64) -> io::Result<Chunk> {
        read_chunk(self.stream_dir(group, stream), from).await
    }

    /// Lines from an offset on, as they appear. Ends when the stream has no writer and has been read to its end.
    pub fn follow(&self, group: &LogGroup, stream: &str, from: u64) -> BoxStream<'static, LogLine> {
        let dir = self.stream_dir(group, stream);
        let progress: Option<watch::Receiver<write::Progress>> = self.open_streams().get(&dir).map(|open| open.progress.clone());
        stream::unfold((dir, progress, from), |(dir, mut progress, from)| async move {
            loop {
                let writing = progress.as_mut().is_some_and(|progress| progress.borrow_and_update().open);
                let chunk = match read_chunk(dir.clone(), from).await {
                    Ok(chunk) => chunk,
                    Err(error) => {
                        tracing::warn!(dir = %dir.display(), %error, "a log cannot be read");
                        return None;
                    }
                };
                if !chunk.lines.is_empty() {
                    return Some((stream::iter(chunk.lines), (dir, progress, chunk.next)));
                }
                match progress.as_mut().filter(|_| writing) {
                    // The writer's end closes the channel; the next turn reads what it wrote last.
                    Some(progress) => drop(progress.changed().await),
                    None => return None,
                }
            }
        })
        .flatten()
        .boxed()
    }

    /// Deletes a stream that has no writer.
    pub async fn delete_stream(&self, group: &LogGroup, stream: &str) -> io::Result<()> {
        let (dir, parent) = (self.stream_dir(group, stream), self.group_dir(group));
        blocking(move || {
            for segment in Segments::of(&dir)?.0 {
                std::fs::remove_file(segment.path)?;
            }
            names::prune(&dir, &parent);
            names::prune(&parent, parent.parent().unwrap_or(&parent));
            Ok(())
        })
        .await
    }

    fn open_streams(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, write::Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group_dir(&self, group: &LogGroup) -> PathBuf {
        names::dir(&self.scope_dir(&group.account, &group.region, group.private), &group.name)
    }

    fn scope_dir(&self, account: &str, region: &str, private: bool) -> PathBuf {
        let account = names::dir(&self.dir.join(if private { "operator" } else { "public" }), account);
        names::dir(&account, region)
    }

    fn stream_dir(&self, group: &LogGroup, stream: &str) -> PathBuf {
        names::dir(&self.group_dir(group), stream)
    }
}

/// Files are read where waiting for a disk holds nobody up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

async fn read_chunk(dir: PathBuf, from: u64) -> io::Result<Chunk> {
    blocking(move || {
        let mut lines = Vec::new();
        let next = Segments::of(&dir)?.forward(from, |entry| {
            if entry.offset.saturating_sub(from) >= CHUNK_BYTES && !lines.is_empty() {
                return ControlFlow::Break(());
            }
            lines.push(entry.line);
            ControlFlow::Continue(())
        })?;
        Ok(Chunk { lines, next })
    })
    .await
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> u64 {
    millis(SystemTime::now())
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    pub(super) fn group() -> LogGroup {
        LogGroup::of_image("000000000000", "us-east-1", "demo")
    }

    pub(super) fn route(stream: &str) -> Route {
        Route::new(group(), stream.to_owned(), None)
    }

    pub(super) fn line(text: &str) -> LogLine {
        LogLine::now(LogOrigin::Build, text)
    }

    fn texts(lines: &[LogLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn streams_are_named_after_day_version_and_owner() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_599);
        assert_eq!(stream_name(at, "1.0", "microvm-x"), "2025/12/31[1.0]microvm-x");
    }

    #[tokio::test]
    async fn what_is_appended_can_be_read_in_parts_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let writer = logs.writer(&route("a/b"));
        writer.append(line("one")).await;
        writer.append(line("two")).await;
        drop(writer);
        logs.close().await;
        let chunk = logs.read(&group(), "a/b", 0).await.unwrap();
        assert_eq!(texts(&chunk.lines), ["one", "two"]);
        assert_eq!(logs.read(&group(), "a/b", chunk.next).await.unwrap(), Chunk { lines: Vec::new(), next: chunk.next });
        logs.delete_stream(&group(), "a/b").await.unwrap();
        assert!(!logs.group_dir(&group()).exists());
    }

    #[tokio::test]
    async fn a_follower_sees_lines_as_they_come_and_ends_with_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let writer = logs.writer(&route("s"));
        let mut follower = logs.follow(&group(), "s", 0);
        for text in ["one", "two", "three"] {
            writer.append(line(text)).await;
            assert_eq!(follower.next().await.unwrap().text, text);
        }
        writer.append(line("last")).await;
        drop(writer);
        assert_eq!(follower.next().await.unwrap().text, "last");
        assert_eq!(follower.next().await, None);
        assert_eq!(logs.follow(&group(), "s", 0).count().await, 4);
    }

    #[tokio::test]
    async fn the_operator_reads_what_goes_elsewhere_or_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        assert_eq!(logs.own_copy(&group(), "s").await, group());
        let disabled = serde_json::json!({"disabled": {}});
        let writer = logs.writer(&Route::new(group(), "s".to_owned(), Some(&disabled)));
        assert_eq!(logs.own_copy(&group(), "s").await, group().private(), "before the first line");
        writer.append(line("x")).await;
        drop(writer);
        logs.close().await;
        let own = logs.own_copy(&group(), "s").await;
        assert_eq!(texts(&logs.read(&own, "s", 0).await.unwrap().lines), ["x"]);
        assert_eq!(logs.read(&group(), "s", 0).await.unwrap().lines, []);
    }
}
