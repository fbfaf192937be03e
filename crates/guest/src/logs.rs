//! The application's output on its way to the host. The pipes are always drained, so the application never blocks on a host that does not
//! listen; what nobody fetches in time is counted and forgotten, oldest first.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use hearth_guest_protocol::{LogRecord, LogSource};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::Notify,
};

/// Records kept while nobody fetches them.
pub const CAPACITY: usize = 1024;
/// Longest piece of a line, in bytes.
pub const LINE_BYTES: usize = 8 << 10;

/// A bounded queue of records. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Logs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<VecDeque<LogRecord>>,
    pushed: Notify,
    drained: Notify,
}

impl Logs {
    /// Adds a line. Never waits: a full queue loses its oldest record.
    pub fn push(&self, source: LogSource, line: &[u8]) {
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        let mut queue = self.queue();
        queue.push_back(LogRecord { source, time_ns, line: line.to_vec(), dropped: 0 });
        if queue.len() > CAPACITY {
            let lost = queue.pop_front().map_or(0, |record| record.dropped + 1);
            if let Some(oldest) = queue.front_mut() {
                oldest.dropped += lost;
            }
        }
        drop(queue);
        self.shared.pushed.notify_one();
    }

    /// The oldest record, when there is one. Meant for one reader at a time.
    pub async fn next(&self) -> LogRecord {
        loop {
            if let Some(record) = self.queue().pop_front() {
                return record;
            }
            self.shared.drained.notify_waiters();
            self.shared.pushed.notified().await;
        }
    }

    /// Waits until a reader has fetched everything and asks for more.
    pub async fn drained(&self) {
        let drained = self.shared.drained.notified();
        if !self.queue().is_empty() {
            drained.await;
        }
    }

    /// Copies a pipe into the queue, line by line, until its end.
    pub async fn collect(self, source: LogSource, mut pipe: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut lines = Lines::default();
        let mut chunk = vec![0; LINE_BYTES];
        loop {
            let count = pipe.read(&mut chunk).await?;
            if count == 0 {
                lines.finish(|line| self.push(source, line));
                return Ok(());
            }
            lines.split(&chunk[..count], |line| self.push(source, line));
            // A busy writer must not keep the only thread.
            tokio::task::consume_budget().await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<LogRecord>> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a byte stream into lines of at most [`LINE_BYTES`].
#[derive(Debug, Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn split(&mut self, mut bytes: &[u8], mut emit: impl FnMut(&[u8])) {
        while !bytes.is_empty() {
            let room = LINE_BYTES - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            match window.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    self.partial.extend_from_slice(&window[..end]);
                    emit(&self.partial);
                    self.partial.clear();
                    bytes = &bytes[end + 1..];
                }
                None => {
                    self.partial.extend_from_slice(window);
                    bytes = &bytes[window.len()..];
                    if self.partial.len() == LINE_BYTES {
                        emit(&self.partial);
                        self.partial.clear();
                    }
                }
            }
        }
    }

    fn finish(&mut self, mut emit: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            emit(&self.partial);
            self.partial.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cut(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.split(chunk, |line| out.push(line.to_vec()));
        }
        lines.finish(|line| out.push(line.to_vec()));
        out
    }

    #[test]
    fn lines_are_put_together_and_cut() {
        assert_eq!(cut(&[b"on", b"e\n\ntwo\nth", b"ree"]), [b"one".to_vec(), b"".to_vec(), b"two".to_vec(), b"three".to_vec()]);
        let long = vec![b'x'; LINE_BYTES + 3];
        assert_eq!(cut(&[&long, b"\n"]), [vec![b'x'; LINE_BYTES], b"xxx".to_vec()]);
        assert!(cut(&[]).is_empty());
    }

    #[tokio::test]
    async fn a_full_queue_loses_and_counts_the_oldest() {
        let logs = Logs::default();
        for number in 0..CAPACITY + 5 {
            logs.push(LogSource::Stdout, number.to_string().as_bytes());
        }
        let first = logs.next().await;
        assert_eq!((first.line.as_slice(), first.dropped), (b"5".as_slice(), 5));
        assert_eq!(logs.next().await.dropped, 0);
    }

    #[tokio::test]
    async fn a_pipe_is_collected_to_its_end() {
        let logs = Logs::default();
        logs.clone().collect(LogSource::Stderr, b"a\nb".as_slice()).await.unwrap();
        assert_eq!(logs.next().await.line, b"a");
        let last = logs.next().await;
        assert_eq!((last.line.as_slice(), last.source), (b"b".as_slice(), LogSource::Stderr));
    }

    #[tokio::test]
    async fn drained_waits_for_the_reader() {
        let logs = Logs::default();
        logs.drained().await;
        logs.push(LogSource::System, b"x");
        assert!(tokio::time::timeout(Duration::from_millis(20), logs.drained()).await.is_err());
        let reader = tokio::spawn({
            let logs = logs.clone();
            async move {
                loop {
                    logs.next().await;
                }
            }
        });
        tokio::time::timeout(Duration::from_secs(5), logs.drained()).await.unwrap();
        reader.abort();
    }
}
