//! Logs of builds and MicroVMs: append-only files that can be read while they grow.
//!
//! A stream is the file `<dir>/<account>/<region>/<group>/<stream>.jsonl`, group and stream percent-encoded. Each line is a JSON object:
//! `t` milliseconds since the Unix epoch, `s` the source (`build`, `stdout`, `stderr`, `system`), `m` the text, and `d`, if present, how many
//! lines were lost before this one. A stream is open while a [`LogWriter`] for it lives; readers of an open stream are told when it grows.

use std::{
    collections::HashMap,
    io::{self, BufRead, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use futures::stream::{self, BoxStream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, watch},
};
use tokio_util::task::TaskTracker;

/// Lines that wait for the disk, per stream. After that they are lost, and counted.
const QUEUE_LINES: usize = 4096;
/// Bytes written at once.
const BATCH_BYTES: usize = 64 << 10;
/// Bytes read at once.
const CHUNK_BYTES: u64 = 256 << 10;
/// Longest name of a file, in bytes (limits.h NAME_MAX).
const NAME_MAX: usize = 255;

/// A log group: streams that belong together. Two scopes may have groups of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LogGroup {
    /// Twelve digits.
    pub account: String,
    /// For example `us-east-1`.
    pub region: String,
    /// For example `/aws/lambda-microvms/demo`.
    pub name: String,
}

impl LogGroup {
    /// The group of an image's builds and of the MicroVMs that run it (SPEC 13.1).
    pub fn of_image(account: &str, region: &str, image_name: &str) -> Self {
        Self { account: account.to_owned(), region: region.to_owned(), name: format!("/aws/lambda-microvms/{image_name}") }
    }
}

/// Version that build streams have in their name (SPEC 13.1).
pub const BUILD_VERSION: &str = "0.0";

/// A stream's name: `YYYY/MM/DD[<version>]<id>`, the date in UTC (SPEC 13.1). Builds are `[0.0]` and the build's id.
pub fn stream_name(at: SystemTime, version: &str, id: &str) -> String {
    let at = time::OffsetDateTime::from(at);
    format!("{:04}/{:02}/{:02}[{version}]{id}", at.year(), u8::from(at.month()), at.day())
}

/// Who wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogOrigin {
    /// The build of the container image.
    Build,
    /// The application's standard output.
    Stdout,
    /// The application's standard error.
    Stderr,
    /// The server or the guest.
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
    /// Lines lost before this one.
    #[serde(rename = "d", default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl LogLine {
    /// A line that was written now.
    pub fn now(origin: LogOrigin, text: impl Into<String>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        Self { time_ms: u64::try_from(now).unwrap_or(u64::MAX), origin, text: text.into(), dropped: 0 }
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
        Self { time_ms: record.time_ns / 1_000_000, origin, text, dropped: record.dropped }
    }
}

/// What a group holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it last grew.
    pub modified: SystemTime,
}

/// Part of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    pub lines: Vec<LogLine>,
    /// Where the next part begins: an offset in bytes.
    pub next: u64,
}

/// How far an open stream has been written.
#[derive(Debug, Clone, Copy)]
struct Progress {
    bytes: u64,
    open: bool,
}

/// All logs.
#[derive(Debug)]
pub struct LogStore {
    dir: PathBuf,
    stream_limit: u64,
    open: Mutex<HashMap<PathBuf, watch::Receiver<Progress>>>,
    writers: TaskTracker,
}

impl LogStore {
    /// Largest size of a stream in bytes, unless told otherwise.
    pub const DEFAULT_STREAM_LIMIT: u64 = 64 << 20;

    /// Logs in a directory, made when the first line is written. Lines beyond `stream_limit` bytes of a stream are lost, and the stream says so.
    pub fn new(dir: PathBuf, stream_limit: u64) -> Arc<Self> {
        Arc::new(Self { dir, stream_limit, open: Mutex::default(), writers: TaskTracker::new() })
    }

    /// Opens a stream for writing, until the writer is dropped. One writer at a time; what an earlier one wrote stays.
    pub fn writer(self: &Arc<Self>, group: &LogGroup, stream: &str) -> LogWriter {
        let (lines, queue) = mpsc::channel(QUEUE_LINES);
        match self.path(group, stream) {
            Ok(path) => {
                let (progress, observer) = watch::channel(Progress { bytes: 0, open: true });
                self.open_streams().insert(path.clone(), observer);
                let store = Arc::clone(self);
                self.writers.spawn(async move { store.write(path, queue, progress).await });
            }
            Err(error) => tracing::warn!(group = group.name, stream, %error, "this log is not kept"),
        }
        LogWriter { lines, dropped: Arc::default() }
    }

    /// Waits until every line is on its way to the disk. No writer may be alive.
    pub async fn close(&self) {
        self.writers.close();
        self.writers.wait().await;
    }

    /// Names of the groups of a scope.
    pub async fn list_groups(&self, account: &str, region: &str) -> io::Result<Vec<String>> {
        let dir = self.dir.join(encode(account)).join(encode(region));
        let mut names: Vec<String> = entries(dir).await?.into_iter().filter_map(|(name, _)| decode(&name)).collect();
        names.sort();
        Ok(names)
    }

    /// The streams of a group, by name. A group that does not exist has none.
    pub async fn list_streams(&self, group: &LogGroup) -> io::Result<Vec<StreamInfo>> {
        let mut streams = Vec::new();
        for (file, metadata) in entries(self.group_dir(group)).await? {
            let Some(name) = file.strip_suffix(".jsonl").and_then(decode) else { continue };
            streams.push(StreamInfo { name, bytes: metadata.len(), modified: metadata.modified()? });
        }
        streams.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(streams)
    }

    /// Reads some lines from an offset that an earlier read returned, or 0. No lines: the end has been reached.
    pub async fn read(&self, group: &LogGroup, stream: &str, from: u64) -> io::Result<Chunk> {
        read_chunk(self.path(group, stream)?, from).await
    }

    /// Lines from an offset on, as they appear. Ends when the stream has no writer and has been read to its end.
    pub fn follow(&self, group: &LogGroup, stream: &str, from: u64) -> BoxStream<'static, LogLine> {
        let Ok(path) = self.path(group, stream) else { return stream::empty().boxed() };
        let progress = self.open_streams().get(&path).cloned();
        stream::unfold((path, progress, from), |(path, mut progress, from)| async move {
            loop {
                let writing = progress.as_mut().is_some_and(|progress| progress.borrow_and_update().open);
                let chunk = match read_chunk(path.clone(), from).await {
                    Ok(chunk) => chunk,
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "a log cannot be read");
                        return None;
                    }
                };
                if !chunk.lines.is_empty() {
                    return Some((stream::iter(chunk.lines), (path, progress, chunk.next)));
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
        match tokio::fs::remove_file(self.path(group, stream)?).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Fails while the group has other streams, which is what we want.
        let _ = tokio::fs::remove_dir(self.group_dir(group)).await;
        Ok(())
    }

    fn open_streams(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, watch::Receiver<Progress>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group_dir(&self, group: &LogGroup) -> PathBuf {
        self.dir.join(encode(&group.account)).join(encode(&group.region)).join(encode(&group.name))
    }

    fn path(&self, group: &LogGroup, stream: &str) -> io::Result<PathBuf> {
        let file = format!("{}.jsonl", encode(stream));
        if file.len() > NAME_MAX || encode(&group.name).len() > NAME_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of the log is too long"));
        }
        Ok(self.group_dir(group).join(file))
    }

    /// Writes a stream's lines until its writer is gone.
    async fn write(&self, path: PathBuf, mut queue: mpsc::Receiver<LogLine>, progress: watch::Sender<Progress>) {
        let mut batch = Vec::with_capacity(BATCH_BYTES);
        let mut file = match open_for_append(&path).await {
            Ok((file, bytes)) => {
                progress.send_modify(|progress| progress.bytes = bytes);
                Some(file)
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a log cannot be written, its lines are lost");
                None
            }
        };
        let mut lost = 0;
        while let Some(line) = queue.recv().await {
            batch.clear();
            let room = self.stream_limit.saturating_sub(progress.borrow().bytes);
            let mut lines = 0;
            let mut next = Some(line);
            while let Some(mut line) = next {
                line.dropped += std::mem::take(&mut lost);
                lost = append(&mut batch, line, room);
                lines += 1;
                next = if batch.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            let Some(open) = file.as_mut().filter(|_| !batch.is_empty()) else { continue };
            match write_batch(open, &batch).await {
                Ok(()) => progress.send_modify(|progress| progress.bytes += batch.len() as u64),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "lines of a log are lost");
                    lost += lines;
                }
            }
        }
        let mut open = self.open_streams();
        // A later writer of the same stream has put its own entry there.
        if open.get(&path).is_some_and(|entry| entry.same_channel(&progress.subscribe())) {
            open.remove(&path);
        }
        progress.send_modify(|progress| progress.open = false);
    }
}

/// Appends a line to the batch if the stream has room for it; returns how many lines are lost since the last one that had.
fn append(batch: &mut Vec<u8>, line: LogLine, room: u64) -> u64 {
    let lost = line.dropped + 1;
    let Ok(text) = serde_json::to_vec(&line) else { return lost };
    if (batch.len() + text.len()) as u64 >= room {
        return lost;
    }
    batch.extend_from_slice(&text);
    batch.push(b'\n');
    0
}

/// Writes lines of one stream. Clones write the same stream; it is open until the last one is dropped.
#[derive(Debug, Clone)]
pub struct LogWriter {
    lines: mpsc::Sender<LogLine>,
    dropped: Arc<AtomicU64>,
}

impl LogWriter {
    /// Appends a line; waits while the disk is behind.
    pub async fn append(&self, line: LogLine) {
        // Fails when the stream cannot be kept, which was logged when it was opened.
        let _ = self.lines.send(self.with_losses(line)).await;
    }

    /// Appends a line unless the disk is behind; the next line that is appended says how many were lost.
    pub fn offer(&self, line: LogLine) {
        if let Err(mpsc::error::TrySendError::Full(line)) = self.lines.try_send(self.with_losses(line)) {
            self.dropped.fetch_add(line.dropped + 1, Ordering::Relaxed);
        }
    }

    fn with_losses(&self, mut line: LogLine) -> LogLine {
        line.dropped += self.dropped.swap(0, Ordering::Relaxed);
        line
    }
}

async fn open_for_append(path: &Path) -> io::Result<(tokio::fs::File, u64)> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await?;
    }
    let file = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await?;
    let bytes = file.metadata().await?.len();
    Ok((file, bytes))
}

async fn write_batch(file: &mut tokio::fs::File, batch: &[u8]) -> io::Result<()> {
    file.write_all(batch).await?;
    file.flush().await
}

/// Reads whole lines; one that is still being written is left for the next time.
async fn read_chunk(path: PathBuf, from: u64) -> io::Result<Chunk> {
    let read = move || -> io::Result<Chunk> {
        let mut file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Chunk { lines: Vec::new(), next: from }),
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(from))?;
        let mut reader = io::BufReader::new(file);
        let mut chunk = Chunk { lines: Vec::new(), next: from };
        let mut text = Vec::new();
        while chunk.next - from < CHUNK_BYTES {
            text.clear();
            let count = reader.by_ref().take(4 * CHUNK_BYTES).read_until(b'\n', &mut text)?;
            if text.last() != Some(&b'\n') {
                break;
            }
            chunk.next += count as u64;
            // A line that a crash cut short and the next run continued does not parse: it is skipped.
            chunk.lines.extend(serde_json::from_slice::<LogLine>(&text).ok());
        }
        Ok(chunk)
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

async fn entries(dir: PathBuf) -> io::Result<Vec<(String, std::fs::Metadata)>> {
    let list = move || -> io::Result<Vec<(String, std::fs::Metadata)>> {
        let found = match std::fs::read_dir(&dir) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        found.map(|entry| entry.and_then(|entry| Ok((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?)))).collect()
    };
    tokio::task::spawn_blocking(list).await.map_err(io::Error::other)?
}

/// A name as a file name: everything but letters, digits, `-`, `_` and inner dots becomes `%XX`.
fn encode(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') || (byte == b'.' && index > 0) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn group() -> LogGroup {
        LogGroup::of_image("000000000000", "us-east-1", "demo")
    }

    fn line(text: &str) -> LogLine {
        LogLine { time_ms: 5, origin: LogOrigin::Build, text: text.to_owned(), dropped: 0 }
    }

    #[test]
    fn streams_are_named_after_day_version_and_owner() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_599);
        assert_eq!(stream_name(at, "1.0", "microvm-x"), "2025/12/31[1.0]microvm-x");
    }

    #[test]
    fn names_survive_the_file_system() {
        for name in ["/aws/lambda-microvms/demo", "2025/12/31[1.0]microvm-x", "..", ".", "%", "ü"] {
            let encoded = encode(name);
            assert!(!encoded.contains('/') && !encoded.starts_with('.'), "{encoded}");
            assert_eq!(decode(&encoded).as_deref(), Some(name));
        }
    }

    #[tokio::test]
    async fn what_is_appended_can_be_listed_and_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), LogStore::DEFAULT_STREAM_LIMIT);
        let writer = logs.writer(&group(), "a/b");
        writer.append(line("one")).await;
        writer.append(line("two")).await;
        drop(writer);
        logs.close().await;
        assert_eq!(logs.list_groups("000000000000", "us-east-1").await.unwrap(), ["/aws/lambda-microvms/demo"]);
        assert!(logs.list_groups("111111111111", "us-east-1").await.unwrap().is_empty());
        assert_eq!(logs.list_streams(&group()).await.unwrap()[0].name, "a/b");
        let chunk = logs.read(&group(), "a/b", 0).await.unwrap();
        assert_eq!(chunk.lines, [line("one"), line("two")]);
        assert_eq!(logs.read(&group(), "a/b", chunk.next).await.unwrap(), Chunk { lines: Vec::new(), next: chunk.next });
        logs.delete_stream(&group(), "a/b").await.unwrap();
        assert!(logs.list_groups("000000000000", "us-east-1").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_follower_sees_lines_as_they_come_and_ends_with_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), LogStore::DEFAULT_STREAM_LIMIT);
        let writer = logs.writer(&group(), "s");
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
    async fn a_full_stream_loses_lines_and_a_second_writer_continues_where_the_first_ended() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), 100);
        let writer = logs.writer(&group(), "s");
        for _ in 0..10 {
            writer.append(line("0123456789")).await;
        }
        drop(writer);
        logs.close().await;
        let kept = logs.read(&group(), "s", 0).await.unwrap().lines.len();
        assert!((1..10).contains(&kept), "{kept}");
        let logs = LogStore::new(dir.path().to_owned(), LogStore::DEFAULT_STREAM_LIMIT);
        logs.writer(&group(), "s").append(line("more")).await;
        logs.close().await;
        assert_eq!(logs.read(&group(), "s", 0).await.unwrap().lines.len(), kept + 1);
    }

    #[tokio::test]
    async fn losses_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), LogStore::DEFAULT_STREAM_LIMIT);
        let writer = logs.writer(&group(), "s");
        // The writing task has no chance to run between these.
        for _ in 0..QUEUE_LINES + 7 {
            writer.offer(line("x"));
        }
        tokio::task::yield_now().await;
        writer.append(line("after")).await;
        drop(writer);
        let lines: Vec<LogLine> = logs.follow(&group(), "s", 0).collect().await;
        assert_eq!(lines.iter().map(|line| line.dropped).sum::<u64>(), 7);
        assert_eq!(lines.len(), QUEUE_LINES + 1);
    }
}
