//! Writing: one task per open stream, which takes lines from all of the stream's writers and appends them in batches.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    fs::File,
    io::AsyncWriteExt,
    sync::{mpsc, watch},
};

use super::{
    LogGroup, LogLine, LogOrigin, LogStore, blocking, now_ms,
    segments::{Segment, Segments},
};

/// Lines that wait for the disk, per stream. After that they are lost, and counted.
const QUEUE_LINES: usize = 4096;
/// Bytes written at once.
const BATCH_BYTES: usize = 64 << 10;
/// Longest text of a line, in bytes; more becomes several lines. What CloudWatch Logs takes as one event is 256 KiB with its own 26 bytes.
const TEXT_BYTES: usize = (256 << 10) - 26;
/// Age at which a segment is not continued, so that it can be removed as a whole: a day.
const SEGMENT_AGE_MS: u64 = 24 * 3600 * 1000;

/// How far an open stream has been written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Offset of the next line.
    end: u64,
    /// Where the segment begins that grows; nothing before the first line.
    pub segment: Option<u64>,
    pub open: bool,
}

/// A stream with writers.
#[derive(Debug)]
pub(super) struct Open {
    lines: mpsc::WeakSender<LogLine>,
    dropped: Arc<AtomicU64>,
    pub progress: watch::Receiver<Progress>,
}

/// One writer's way to one stream.
#[derive(Debug, Clone)]
pub(super) struct Channel {
    lines: mpsc::Sender<LogLine>,
    dropped: Arc<AtomicU64>,
}

impl Channel {
    async fn append(&self, line: LogLine) {
        // Fails when the stream cannot be kept, which is logged where that is found out.
        let _ = self.lines.send(self.with_losses(line)).await;
    }

    fn offer(&self, line: LogLine) {
        if let Err(mpsc::error::TrySendError::Full(line)) = self.lines.try_send(self.with_losses(line)) {
            self.dropped.fetch_add(line.dropped + 1, Ordering::Relaxed);
        }
    }

    fn with_losses(&self, mut line: LogLine) -> LogLine {
        line.dropped += self.dropped.swap(0, Ordering::Relaxed);
        line
    }
}

/// Writes lines to where a [`super::Route`] leads. Streams are open until the last of their writers is dropped.
#[derive(Debug, Clone)]
pub struct LogWriter {
    own: Channel,
    shipped: Option<Channel>,
}

impl LogWriter {
    pub(super) fn new(own: Channel, shipped: Option<Channel>) -> Self {
        Self { own, shipped }
    }

    /// Appends a line; waits while the disk is behind.
    pub async fn append(&self, line: LogLine) {
        if let Some(shipped) = &self.shipped {
            shipped.append(line.clone()).await;
        }
        self.own.append(line).await;
    }

    /// Appends a line unless the disk is behind; the next line that is appended says how many were lost.
    pub fn offer(&self, line: LogLine) {
        if let Some(shipped) = &self.shipped {
            shipped.offer(line.clone());
        }
        self.own.offer(line);
    }
}

/// Joins a stream's writers, or becomes the first of them.
pub(super) fn open(store: &Arc<LogStore>, group: &LogGroup, dir: PathBuf) -> Channel {
    let mut streams = store.open_streams();
    let earlier = streams.get(&dir);
    if let Some(open) = earlier
        && let Some(lines) = open.lines.upgrade()
    {
        return Channel { lines, dropped: Arc::clone(&open.dropped) };
    }
    // Its writers are gone, but not all of their lines are written.
    let before = earlier.map(|open| open.progress.clone());
    let (lines, queue) = mpsc::channel(QUEUE_LINES);
    let (progress, observer) = watch::channel(Progress { end: 0, segment: None, open: true });
    let dropped = Arc::new(AtomicU64::new(0));
    streams.insert(dir.clone(), Open { lines: lines.downgrade(), dropped: Arc::clone(&dropped), progress: observer });
    let task = Task { store: Arc::clone(store), group_dir: store.group_dir(group), dir, progress, file: None, born_ms: 0, last_ms: 0 };
    store.writers.spawn(task.run(queue, before));
    Channel { lines, dropped }
}

/// The task that appends to a stream.
struct Task {
    store: Arc<LogStore>,
    group_dir: PathBuf,
    dir: PathBuf,
    progress: watch::Sender<Progress>,
    /// The segment that grows.
    file: Option<File>,
    born_ms: u64,
    /// Time of the newest line.
    last_ms: u64,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<LogLine>, before: Option<watch::Receiver<Progress>>) {
        if let Some(mut before) = before {
            // Fails when the task has ended altogether, which is as good.
            let _ = before.wait_for(|progress| !progress.open).await;
        }
        if let Err(error) = self.find_end().await {
            tracing::warn!(dir = %self.dir.display(), %error, "what was logged before cannot be read");
        }
        let mut batch = Vec::with_capacity(BATCH_BYTES);
        let mut lost = 0;
        let mut failing = false;
        while let Some(line) = queue.recv().await {
            batch.clear();
            let mut lines = 0;
            let mut next = Some(line);
            while let Some(mut line) = next {
                line.dropped += std::mem::take(&mut lost);
                lines += 1 + line.dropped;
                self.encode(line, &mut batch);
                next = if batch.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            let written = self.write(&batch).await;
            if let Err(error) = &written {
                // Said once, not for every batch while the disk is full.
                if !failing {
                    tracing::warn!(dir = %self.dir.display(), %error, "lines of a log are lost");
                }
                // Nothing may follow the half of a batch in a file.
                self.file = None;
                lost = lines;
            }
            failing = written.is_err();
        }
        let mut open = self.store.open_streams();
        // A later writer of the same stream has put its own entry there.
        if open.get(&self.dir).is_some_and(|entry| entry.progress.same_channel(&self.progress.subscribe())) {
            open.remove(&self.dir);
        }
        self.progress.send_modify(|progress| progress.open = false);
    }

    async fn find_end(&mut self) -> io::Result<()> {
        let dir = self.dir.clone();
        let (end, last) = blocking(move || {
            let segments = Segments::of(&dir)?;
            Ok((segments.end(), segments.last()?))
        })
        .await?;
        self.progress.send_modify(|progress| progress.end = end);
        self.last_ms = last.map_or(0, |entry| entry.line.time_ms);
        Ok(())
    }

    /// Adds a line to the batch, after one that tells what was lost before it. Its time is the writer's, but neither later than now nor earlier than the line before it, whatever the
    /// clock of a guest says: a stream is in the order of its times.
    fn encode(&mut self, mut line: LogLine, batch: &mut Vec<u8>) {
        if line.dropped > 0 {
            let dropped = std::mem::take(&mut line.dropped);
            let text = match dropped {
                1 => "[1 line was lost here]".to_owned(),
                more => format!("[{more} lines were lost here]"),
            };
            // Whoever reads the application's lines shall see it, whatever the line that follows is.
            let origin = if line.origin == LogOrigin::System { LogOrigin::Stdout } else { line.origin };
            self.encode_line(LogLine { origin, text, dropped, ..line }, batch);
        }
        self.encode_line(line, batch);
    }

    fn encode_line(&mut self, mut line: LogLine, batch: &mut Vec<u8>) {
        let now = now_ms();
        line.time_ms = line.time_ms.min(now).max(self.last_ms);
        line.late_ms = now.saturating_sub(line.time_ms);
        self.last_ms = line.time_ms;
        loop {
            let rest = (line.text.len() > TEXT_BYTES).then(|| line.text.split_off(line.text.floor_char_boundary(TEXT_BYTES)));
            let whole = batch.len();
            match serde_json::to_writer(&mut *batch, &line) {
                Ok(()) => batch.push(b'\n'),
                // Strings and numbers have a JSON form.
                Err(_) => batch.truncate(whole),
            }
            match rest {
                Some(rest) => line.text = rest,
                None => return,
            }
        }
    }

    async fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        let Progress { end, segment, .. } = *self.progress.borrow();
        let size = segment.map_or(0, |start| end - start);
        let fits = size + batch.len() as u64 <= self.store.segment_limit() || size == 0;
        let young = now_ms().saturating_sub(self.born_ms) < SEGMENT_AGE_MS;
        let mut file = match self.file.take().filter(|_| fits && young) {
            Some(file) => file,
            None => self.begin_segment().await?,
        };
        file.write_all(batch).await?;
        file.flush().await?;
        self.file = Some(file);
        self.progress.send_modify(|progress| progress.end += batch.len() as u64);
        self.store.grew(&self.group_dir, batch.len() as u64);
        Ok(())
    }

    async fn begin_segment(&mut self) -> io::Result<File> {
        // After a failure the file may be longer than what is known to be in it.
        self.find_end_again().await?;
        let start = self.progress.borrow().end;
        // Published first, so that it is not mistaken for a segment that nobody writes to.
        self.progress.send_modify(|progress| progress.segment = Some(start));
        self.born_ms = now_ms();
        let path = Segment::path(&self.dir, start);
        match create(&self.dir, &path).await {
            // The directory was empty, and removed in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(&self.dir, &path).await,
            created => created,
        }
    }

    async fn find_end_again(&self) -> io::Result<()> {
        let dir = self.dir.clone();
        let end = blocking(move || Ok(Segments::of(&dir)?.end())).await?;
        self.progress.send_modify(|progress| progress.end = progress.end.max(end));
        Ok(())
    }
}

async fn create(dir: &Path, path: &Path) -> io::Result<File> {
    tokio::fs::create_dir_all(dir).await?;
    tokio::fs::OpenOptions::new().create_new(true).append(true).open(path).await
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::logs::{
        Retention, Route,
        tests::{group, line, route},
    };

    #[tokio::test]
    async fn a_second_writer_continues_where_the_first_ended() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        for text in ["one", "two", "three"] {
            // Opened again at once: the lines before may still be on their way.
            logs.writer(&route("s")).append(line(text)).await;
        }
        logs.close().await;
        let lines = logs.read(&group(), "s", 0).await.unwrap().lines;
        assert_eq!(lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["one", "two", "three"]);
    }

    #[tokio::test]
    async fn writers_of_one_stream_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let verbatim = serde_json::json!({"cloudWatch": {"logGroup": "g", "logStream": "s"}});
        let writers: Vec<LogWriter> =
            (0..3).map(|index| logs.writer(&Route::new(group(), format!("own {index}"), Some(&verbatim)))).collect();
        for index in 0..300 {
            writers[index % 3].append(line(&index.to_string())).await;
        }
        drop(writers);
        logs.close().await;
        let shared = LogGroup::new("000000000000", "us-east-1", "g");
        let lines = logs.read(&shared, "s", 0).await.unwrap().lines;
        let expected: Vec<String> = (0..300).map(|index| index.to_string()).collect();
        assert_eq!(lines.into_iter().map(|line| line.text).collect::<Vec<_>>(), expected);
        assert_eq!(logs.read(&group().private(), "own 1", 0).await.unwrap().lines.len(), 100);
    }

    #[tokio::test]
    async fn times_do_not_run_backwards_or_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let writer = logs.writer(&route("s"));
        for time_ms in [1000, 7, u64::MAX, 2000] {
            writer.append(LogLine { time_ms, ..line("x") }).await;
        }
        drop(writer);
        logs.close().await;
        let lines = logs.read(&group(), "s", 0).await.unwrap().lines;
        assert_eq!((lines[0].time_ms, lines[1].time_ms), (1000, 1000));
        assert!(lines[2].time_ms <= now_ms() && lines[2].time_ms > 2000 && lines[3].time_ms == lines[2].time_ms);
        let arrived = lines[0].time_ms + lines[0].late_ms;
        assert!(arrived <= now_ms() && arrived + 60_000 > now_ms(), "{arrived}");
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_becomes_several() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let text = "\u{1}ü".repeat(TEXT_BYTES);
        logs.writer(&route("s")).append(line(&text)).await;
        logs.close().await;
        let lines: Vec<LogLine> = logs.follow(&group(), "s", 0).collect().await;
        assert!(lines.len() >= 3 && lines.iter().all(|line| line.text.len() <= TEXT_BYTES));
        assert!(lines.into_iter().map(|line| line.text).collect::<String>() == text);
    }

    #[tokio::test]
    async fn losses_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        let writer = logs.writer(&route("s"));
        // The writing task has no chance to run between these.
        for _ in 0..QUEUE_LINES + 7 {
            writer.offer(LogLine::now(LogOrigin::Stdout, "x"));
        }
        tokio::task::yield_now().await;
        writer.append(line("after")).await;
        drop(writer);
        let lines: Vec<LogLine> = logs.follow(&group(), "s", 0).collect().await;
        assert_eq!(lines.iter().map(|line| line.dropped).sum::<u64>(), 7);
        assert_eq!(lines.len(), QUEUE_LINES + 2);
        let texts: Vec<&str> = lines[QUEUE_LINES - 1..].iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, ["x", "[7 lines were lost here]", "after"]);
    }
}
