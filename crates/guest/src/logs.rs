//! The application's output on its way to the host.
//!
//! The queue of lines is bounded. While the host takes lines, an application that writes faster waits, as it would for a slow terminal. If
//! the host takes none for a moment, nobody waits for it any more: lines are counted and forgotten, oldest first, and the next line that is
//! there says how many. What was taken but not delivered when a session breaks off is taken again by the next one.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Context,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hearth_guest_protocol::{LogRecord, LogSource, MAX_LINE_BYTES};
use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::{Notify, watch},
    task::coop,
    time::timeout,
};

/// Most bytes of lines in the queue. Part of what the application cannot have of the machine's memory.
const CAPACITY_BYTES: usize = 1 << 20;
/// What a line costs beside its bytes, about.
const RECORD_BYTES: usize = 96;
/// Bytes taken from the queue at once, unless one line is longer.
const BATCH_BYTES: usize = 32 << 10;
/// Bytes read from a pipe at once.
const CHUNK_BYTES: usize = 16 << 10;
/// How long the application waits for a host that takes nothing.
const PATIENCE: Duration = Duration::from_millis(250);

/// A bounded queue of records. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Logs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    pushed: Notify,
    /// Records were delivered, or a pipe read empty.
    progress: Notify,
    /// Nothing more will be written.
    finished: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Queue {
    records: VecDeque<LogRecord>,
    bytes: usize,
    /// The first so many records are with the reader: they stay until it says that they are delivered.
    taken: usize,
    /// Nothing was delivered for as long as anybody waits.
    stalled: bool,
    /// Pipes from which something was read, and which have not been found empty since.
    flowing: usize,
}

impl Queue {
    fn has_room(&self, bytes: usize) -> bool {
        self.bytes + bytes + RECORD_BYTES <= CAPACITY_BYTES
    }

    fn push(&mut self, mut record: LogRecord) {
        let mut lost = 0;
        while !self.has_room(record.line.len())
            && let Some(oldest) = self.records.remove(self.taken)
        {
            self.bytes -= oldest.line.len() + RECORD_BYTES;
            lost += oldest.dropped + 1;
        }
        self.records.get_mut(self.taken).unwrap_or(&mut record).dropped += lost;
        self.bytes += record.line.len() + RECORD_BYTES;
        self.records.push_back(record);
    }

    fn take(&mut self) -> Vec<LogRecord> {
        let mut bytes = 0;
        let fits = |record: &&LogRecord| {
            let first = bytes == 0;
            bytes += record.line.len() + RECORD_BYTES;
            first || bytes <= BATCH_BYTES
        };
        let batch: Vec<LogRecord> = self.records.iter().take_while(fits).cloned().collect();
        self.taken = batch.len();
        batch
    }

    fn deliver(&mut self) {
        for record in self.records.drain(..self.taken) {
            self.bytes -= record.line.len() + RECORD_BYTES;
        }
        self.taken = 0;
        self.stalled = false;
    }
}

impl Logs {
    /// Adds a line. Never waits: a full queue loses its oldest record.
    pub fn push(&self, source: LogSource, line: Vec<u8>) {
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        self.queue().push(LogRecord { source, time_ns, line, dropped: 0 });
        self.shared.pushed.notify_one();
    }

    /// The oldest records, when there are any. They stay in the queue until [`Logs::delivered`]. Meant for one reader at a time.
    pub async fn take(&self) -> Vec<LogRecord> {
        loop {
            let batch = self.queue().take();
            if !batch.is_empty() {
                return batch;
            }
            self.shared.pushed.notified().await;
        }
    }

    /// What was taken last need not be kept.
    pub fn delivered(&self) {
        self.queue().deliver();
        self.shared.progress.notify_waiters();
    }

    /// Waits until everything that was written so far is delivered, as long as something is delivered every now and then: at least once in
    /// `patience`.
    pub async fn drained(&self, patience: Duration) {
        // Readers of pipes that have something in them are told so first.
        tokio::task::yield_now().await;
        let empty = |queue: &Queue| queue.records.is_empty() && queue.flowing == 0;
        while !empty(&self.queue()) {
            if !self.progress(patience, empty).await {
                return;
            }
        }
    }

    /// Nothing more will be written: a pipe that is empty is at its end.
    pub fn finish(&self) {
        self.shared.finished.send_replace(true);
    }

    /// Copies a pipe into the queue, line by line, until its end.
    pub async fn collect(self, source: LogSource, mut pipe: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut lines = Lines::default();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut flow = Flow { logs: &self, on: false };
        let mut finished = self.shared.finished.subscribe();
        loop {
            let read = |cx: &mut Context<'_>| {
                let mut buffer = ReadBuf::new(&mut chunk);
                let read = Pin::new(&mut pipe).poll_read(cx, &mut buffer);
                // A task that has had its share does not know whether the pipe is empty.
                flow.set(read.is_ready() || !coop::has_budget_remaining());
                read.map_ok(|()| buffer.filled().len())
            };
            let count = tokio::select! {
                biased;
                count = poll_fn(read) => count?,
                _ = finished.wait_for(|finished| *finished) => 0,
            };
            let mut bytes = &chunk[..count];
            while let Some(line) = if count == 0 { lines.finish() } else { lines.next(&mut bytes) } {
                self.wait_for_room(line.len()).await;
                self.push(source, line);
                // A busy writer must not keep the only thread.
                tokio::task::consume_budget().await;
            }
            if count == 0 {
                return Ok(());
            }
        }
    }

    async fn wait_for_room(&self, bytes: usize) {
        let go_on = |queue: &Queue| queue.stalled || queue.has_room(bytes);
        while !go_on(&self.queue()) {
            if !self.progress(PATIENCE, go_on).await {
                self.queue().stalled = true;
            }
        }
    }

    /// Waits for the next progress, unless `enough` holds already; false if there is none in time.
    async fn progress(&self, patience: Duration, enough: impl Fn(&Queue) -> bool) -> bool {
        let progress = self.shared.progress.notified();
        tokio::pin!(progress);
        // From here on none is missed.
        progress.as_mut().enable();
        enough(&self.queue()) || timeout(patience, progress).await.is_ok()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a pipe among those from which something was read, as long as that is so.
struct Flow<'a> {
    logs: &'a Logs,
    on: bool,
}

impl Flow<'_> {
    fn set(&mut self, on: bool) {
        match (self.on, on) {
            (false, true) => self.logs.queue().flowing += 1,
            (true, false) => {
                self.logs.queue().flowing -= 1;
                self.logs.shared.progress.notify_waiters();
            }
            _ => {}
        }
        self.on = on;
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// Cuts a byte stream into lines of at most [`MAX_LINE_BYTES`].
#[derive(Debug, Default)]
struct Lines {
    partial: Vec<u8>,
    /// What comes next belongs to a line whose beginning was cut off already.
    continued: bool,
}

impl Lines {
    /// The next line, of what there was before and of the beginning of `bytes`, which is then gone from there.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Vec<u8>> {
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            let end = window.iter().position(|&byte| byte == b'\n');
            self.partial.extend_from_slice(&window[..end.unwrap_or(window.len())]);
            *bytes = &bytes[end.map_or(window.len(), |end| end + 1)..];
            if end.is_some() {
                let line = std::mem::take(&mut self.partial);
                let whole = !std::mem::take(&mut self.continued);
                // A line that was cut at its very end has nothing more.
                if whole || !line.is_empty() {
                    return Some(line);
                }
            } else if self.partial.len() == MAX_LINE_BYTES {
                let rest = self.partial.split_off(whole_characters(&self.partial));
                self.continued = true;
                return Some(std::mem::replace(&mut self.partial, rest));
            }
        }
        None
    }

    /// What the stream ends with, if that is no whole line.
    fn finish(&mut self) -> Option<Vec<u8>> {
        (!self.partial.is_empty()).then(|| std::mem::take(&mut self.partial))
    }
}

/// Length of `text` without the beginning of a UTF-8 character that may be completed by what follows.
fn whole_characters(text: &[u8]) -> usize {
    let last = text.iter().rposition(|byte| byte & 0b1100_0000 != 0b1000_0000).unwrap_or(0);
    let expected = text.get(last).map_or(1, |byte| match byte.leading_ones() {
        ones @ 2..=4 => ones as usize,
        _ => 1,
    });
    if text.len() - last < expected { last } else { text.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for mut chunk in chunks.iter().copied() {
            out.extend(std::iter::from_fn(|| lines.next(&mut chunk)));
        }
        out.extend(lines.finish());
        out
    }

    async fn next(logs: &Logs) -> LogRecord {
        let record = logs.take().await.remove(0);
        logs.queue().taken = 1;
        logs.delivered();
        record
    }

    #[test]
    fn lines_are_put_together_and_cut() {
        assert_eq!(cut(&[b"on", b"e\n\ntwo\nth", b"ree"]), [b"one".to_vec(), b"".to_vec(), b"two".to_vec(), b"three".to_vec()]);
        let long = vec![b'x'; MAX_LINE_BYTES + 3];
        assert_eq!(cut(&[&long, b"\n"]), [vec![b'x'; MAX_LINE_BYTES], b"xxx".to_vec()]);
        // The end of one that was cut just there is no line, but an empty one after it is.
        let full = &long[3..];
        assert_eq!(cut(&[full, b"\n", b"\n", b"a\n"]), [full, b"", b"a"]);
        assert_eq!(cut(&[&[full, b"\n"].concat(), full]), [full, full]);
        assert!(cut(&[]).is_empty());
    }

    #[test]
    fn a_cut_goes_around_characters() {
        let long = "\u{1F525}".repeat(MAX_LINE_BYTES / 4 * 3);
        // Nowhere is the beginning of a character a multiple of the limit.
        let pieces = cut(&[b"abc", long.as_bytes()]);
        assert!(pieces.len() > 2 && pieces.iter().all(|piece| std::str::from_utf8(piece).is_ok()));
        assert_eq!(pieces.concat().len(), 3 + long.len());
        // What is no text is cut where the limit is.
        for byte in [0x80, 0xff, 0xc0] {
            assert_eq!(cut(&[&vec![byte; 2 * MAX_LINE_BYTES]]).concat().len(), 2 * MAX_LINE_BYTES);
        }
        assert_eq!(whole_characters(b"a\xe2\x82"), 1);
        assert_eq!(whole_characters(b"a\xe2\x82\xac"), 4);
    }

    #[tokio::test]
    async fn a_full_queue_loses_and_counts_the_oldest() {
        let logs = Logs::default();
        let fit = CAPACITY_BYTES / (1000 + RECORD_BYTES);
        for number in 0..fit + 5 {
            logs.push(LogSource::Stdout, format!("{number:01000}").into_bytes());
        }
        let first = next(&logs).await;
        assert_eq!((first.line, first.dropped), (format!("{:01000}", 5).into_bytes(), 5));
        assert_eq!(next(&logs).await.dropped, 0);
        assert!(logs.queue().bytes <= CAPACITY_BYTES);
    }

    #[tokio::test]
    async fn what_was_taken_is_neither_lost_nor_forgotten() {
        let logs = Logs::default();
        logs.push(LogSource::Stdout, b"first".to_vec());
        assert_eq!(logs.take().await.len(), 1);
        for _ in 0..2 * CAPACITY_BYTES / MAX_LINE_BYTES {
            logs.push(LogSource::Stdout, vec![b'x'; MAX_LINE_BYTES]);
        }
        // A session that broke off has delivered nothing.
        let again = logs.take().await;
        assert_eq!((again[0].line.as_slice(), again[0].dropped), (b"first".as_slice(), 0));
        logs.delivered();
        assert!(next(&logs).await.dropped >= (CAPACITY_BYTES / MAX_LINE_BYTES) as u64);
    }

    #[tokio::test]
    async fn a_pipe_is_collected_to_its_end() {
        let logs = Logs::default();
        logs.clone().collect(LogSource::Stderr, b"a\nb".as_slice()).await.unwrap();
        assert_eq!(next(&logs).await.line, b"a");
        let last = next(&logs).await;
        assert_eq!((last.line.as_slice(), last.source), (b"b".as_slice(), LogSource::Stderr));
    }

    #[tokio::test(start_paused = true)]
    async fn a_writer_waits_for_a_reader_but_not_for_ever() {
        let lines: Vec<u8> = (0..40_000).flat_map(|number| format!("{number:0100}\n").into_bytes()).collect();
        let total = |records: &[LogRecord]| records.iter().map(|record| record.dropped + 1).sum::<u64>();

        // With a reader, however slow, every line arrives.
        let logs = Logs::default();
        let writer = tokio::spawn({
            let (logs, lines) = (logs.clone(), lines.clone());
            async move { logs.collect(LogSource::Stdout, lines.as_slice()).await }
        });
        let mut read = Vec::new();
        while read.len() < 40_000 {
            read.extend(logs.take().await);
            tokio::time::sleep(PATIENCE / 2).await;
            logs.delivered();
        }
        writer.await.unwrap().unwrap();
        assert_eq!(total(&read), 40_000);

        // Without one it waits once.
        let started = tokio::time::Instant::now();
        logs.clone().collect(LogSource::Stdout, lines.as_slice()).await.unwrap();
        assert_eq!(started.elapsed(), PATIENCE);
        let mut rest = Vec::new();
        while !logs.queue().records.is_empty() {
            rest.extend(logs.take().await);
            logs.delivered();
        }
        assert!(rest.len() < 40_000 && rest[0].dropped > 0);
        assert_eq!(total(&rest), 40_000);
    }

    #[tokio::test(start_paused = true)]
    async fn drained_waits_for_what_is_still_in_a_pipe() {
        let logs = Logs::default();
        let (mut app, pipe) = tokio::io::duplex(1 << 20);
        tokio::spawn(logs.clone().collect(LogSource::Stdout, pipe));
        let reader = tokio::spawn({
            let logs = logs.clone();
            async move {
                let mut count = 0;
                while count < 50_000 {
                    count += logs.take().await.len();
                    logs.delivered();
                }
            }
        });
        tokio::io::AsyncWriteExt::write_all(&mut app, &b"a line\n".repeat(50_000)).await.unwrap();
        logs.drained(Duration::from_secs(1)).await;
        assert!(reader.is_finished(), "everything was read");
        // The beginning of a line is not waited for, unless it is all that there will be.
        tokio::io::AsyncWriteExt::write_all(&mut app, b"half a").await.unwrap();
        let started = tokio::time::Instant::now();
        logs.drained(Duration::from_secs(1)).await;
        assert_eq!(started.elapsed(), Duration::ZERO);
        let last = tokio::spawn({
            let logs = logs.clone();
            async move { next(&logs).await.line }
        });
        logs.finish();
        logs.drained(Duration::from_secs(1)).await;
        assert_eq!(last.await.unwrap(), b"half a");
    }

    #[tokio::test(start_paused = true)]
    async fn drained_waits_for_the_reader_while_there_is_one() {
        let logs = Logs::default();
        let patience = Duration::from_secs(1);
        logs.drained(patience).await;
        for _ in 0..10 {
            logs.push(LogSource::System, vec![b'x'; BATCH_BYTES]);
        }
        let started = tokio::time::Instant::now();
        logs.drained(patience).await;
        assert_eq!(started.elapsed(), patience);
        let reader = tokio::spawn({
            let logs = logs.clone();
            async move {
                loop {
                    logs.take().await;
                    tokio::time::sleep(patience / 2).await;
                    logs.delivered();
                }
            }
        });
        logs.drained(patience).await;
        assert!(logs.queue().records.is_empty());
        reader.abort();
    }
}
