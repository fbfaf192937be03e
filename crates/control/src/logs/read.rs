//! Reading as CloudWatch Logs does: groups, streams, a stream in either direction, and many streams merged by time.
//!
//! What the operator alone may see is not found here: operators' copies, and lines of the server or the guest ([`LogOrigin::System`]).

use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, VecDeque},
    io,
    ops::ControlFlow,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{
    LogGroup, LogLine, LogOrigin, LogStore, blocking, millis, names,
    segments::{Entry, Segments},
};

/// What CloudWatch Logs adds to an event's text when it counts bytes.
const EVENT_OVERHEAD: usize = 26;
/// Bytes that are looked at for one page of a filter; it may then be short, or empty.
const SCAN_BYTES: u64 = 32 << 20;
/// Bytes that all streams of a merge hold ready together.
const MERGE_BYTES: u64 = 8 << 20;
/// How far the time of a file may be behind the clock.
const FILE_CLOCK: Duration = Duration::from_secs(1);

/// A log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// there is no such group
    #[error("The specified log group does not exist.")]
    NoGroup,
    /// there is no such stream
    #[error("The specified log stream does not exist.")]
    NoStream,
    /// the files cannot be read
    #[error("reading logs: {0}")]
    Io(#[from] io::Error),
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupInfo {
    pub name: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// A stream. Times are in milliseconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    pub name: String,
    pub created_ms: u64,
    pub first_ms: Option<u64>,
    pub last_ms: Option<u64>,
    /// When the last line arrived.
    pub ingested_ms: Option<u64>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Where it stands in its stream, in bytes; unique there.
    pub offset: u64,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// When it arrived; milliseconds since the Unix epoch.
    pub ingested_ms: u64,
    pub text: String,
}

impl From<Entry> for Event {
    fn from(entry: Entry) -> Self {
        let LogLine { time_ms, late_ms, text, .. } = entry.line;
        Self { offset: entry.offset, time_ms, ingested_ms: time_ms.saturating_add(late_ms), text }
    }
}

/// An id for an event: the same whenever it is read, and no other event of the account has it. 56 digits, as the service's are.
pub fn event_id(group: &str, stream: &str, event: &Event) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("{}:{group}{stream}", group.len()).as_bytes());
    let stream = digest.as_ref().first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    format!("{:016}{stream:020}{:020}", event.time_ms, event.offset)
}

/// Which times, in milliseconds since the Unix epoch: from `start`, before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    pub start: u64,
    pub end: u64,
}

/// How much at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub events: usize,
    /// Of the events' texts, with 26 for each event.
    pub bytes: usize,
}

impl Limits {
    fn take(&mut self, text: &str, first: bool) -> bool {
        let bytes = text.len() + EVENT_OVERHEAD;
        if self.events == 0 || (bytes > self.bytes && !first) {
            return false;
        }
        self.events -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
        true
    }
}

/// Where in a stream a page begins, and which way it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The oldest events.
    Head,
    /// The newest events.
    Tail,
    /// From an offset towards newer events.
    From(u64),
    /// Before an offset, towards older events.
    Before(u64),
}

/// Part of a stream, the oldest event first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    pub events: Vec<Event>,
    /// Older events are before this offset.
    pub before: u64,
    /// Newer events are from this offset on.
    pub after: u64,
}

/// Which streams of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Streams {
    All,
    Prefix(String),
    Names(Vec<String>),
}

/// Where a merge goes on: after the line of this time that ends at this offset of this stream.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub time_ms: u64,
    pub stream: String,
    pub offset: u64,
}

/// What a filter asks for.
pub struct Filter {
    pub streams: Streams,
    pub times: Times,
    /// The end of the page before.
    pub after: Option<Position>,
    pub limits: Limits,
    /// Whether a text is wanted.
    pub wanted: Box<dyn Fn(&str) -> bool + Send>,
}

/// Part of what a filter finds, in the order of time, stream and offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filtered {
    /// With the names of their streams.
    pub events: Vec<(String, Event)>,
    /// Present if there may be more.
    pub next: Option<Position>,
}

impl LogStore {
    /// Names of the groups of a scope.
    pub async fn list_groups(&self, account: &str, region: &str) -> io::Result<Vec<String>> {
        let scope = self.scope_dir(account, region, false);
        blocking(move || Ok(names::list(&scope)?.into_iter().map(|(name, _)| name).collect())).await
    }

    /// Describes a group.
    pub async fn describe_group(&self, group: &LogGroup) -> Result<GroupInfo, ReadError> {
        let (dir, name) = (existing(self.group_dir(group)).await?, group.name.clone());
        let info = blocking(move || {
            let mut bytes = 0;
            for (_, stream) in names::list(&dir)? {
                bytes += Segments::of(&stream)?.bytes();
            }
            Ok(GroupInfo { name, created_ms: created_ms(&dir)?, bytes })
        });
        Ok(info.await?)
    }

    /// The streams of a group, by name, and when each last grew.
    pub async fn list_streams(&self, group: &LogGroup) -> Result<Vec<(String, SystemTime)>, ReadError> {
        let dir = existing(self.group_dir(group)).await?;
        let list = blocking(move || {
            let mut streams = Vec::new();
            for (name, dir) in names::list(&dir)? {
                streams.extend(Segments::of(&dir)?.modified().map(|modified| (name, modified)));
            }
            Ok(streams)
        });
        Ok(list.await?)
    }

    /// Describes a stream.
    pub async fn describe_stream(&self, group: &LogGroup, stream: &str) -> io::Result<StreamInfo> {
        let (dir, name) = (self.stream_dir(group, stream), stream.to_owned());
        blocking(move || {
            let segments = Segments::of(&dir)?;
            let (first, last) = (segments.first()?, segments.last()?);
            let first_ms = first.map(|entry| entry.line.time_ms);
            let created_ms = created_ms(&dir)?;
            Ok(StreamInfo {
                name,
                // A line has a moment on its way here.
                created_ms: first_ms.map_or(created_ms, |first| first.min(created_ms)),
                first_ms,
                last_ms: last.as_ref().map(|entry| entry.line.time_ms),
                ingested_ms: last.map(|entry| entry.line.time_ms + entry.line.late_ms),
            })
        })
        .await
    }

    /// Reads part of a stream.
    pub async fn events(&self, group: &LogGroup, stream: &str, times: Times, place: Place, limits: Limits) -> Result<Events, ReadError> {
        existing(self.group_dir(group)).await?;
        let dir = self.stream_dir(group, stream);
        let events = blocking(move || {
            let segments = Segments::of(&dir)?;
            if segments.0.is_empty() {
                return Ok(None);
            }
            let (floor, end) = (segments.seek(times.start)?, segments.seek(times.end)?);
            let page = match place {
                Place::Head => page_from(&segments, floor, floor, end, limits),
                Place::From(offset) => page_from(&segments, offset, floor, end, limits),
                Place::Tail => page_before(&segments, end, floor, end, limits),
                Place::Before(offset) => page_before(&segments, offset, floor, end, limits),
            };
            page.map(Some)
        });
        events.await?.ok_or(ReadError::NoStream)
    }

    /// Reads what several streams have, merged by time.
    pub async fn filter(&self, group: &LogGroup, filter: Filter) -> Result<Filtered, ReadError> {
        let dir = existing(self.group_dir(group)).await?;
        let filtered = blocking(move || {
            let streams = match &filter.streams {
                Streams::All => names::list(&dir)?,
                Streams::Prefix(prefix) => names::list(&dir)?.into_iter().filter(|(name, _)| name.starts_with(prefix)).collect(),
                Streams::Names(wanted) => {
                    let mut streams: Vec<(String, PathBuf)> = wanted.iter().map(|name| (name.clone(), names::dir(&dir, name))).collect();
                    streams.sort();
                    streams.dedup();
                    if !streams.iter().all(|(_, dir)| dir.is_dir()) {
                        return Ok(None);
                    }
                    streams
                }
            };
            Merge::of(streams, &filter)?.page(&filter).map(Some)
        });
        filtered.await?.ok_or(ReadError::NoStream)
    }
}

async fn existing(dir: PathBuf) -> Result<PathBuf, ReadError> {
    match tokio::fs::metadata(&dir).await {
        Ok(_) => Ok(dir),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ReadError::NoGroup),
        Err(error) => Err(error.into()),
    }
}

/// Not every file system keeps when something was made.
fn created_ms(dir: &PathBuf) -> io::Result<u64> {
    let metadata = std::fs::metadata(dir)?;
    Ok(millis(metadata.created().or_else(|_| metadata.modified())?))
}

fn is_shown(line: &LogLine) -> bool {
    line.origin != LogOrigin::System
}

fn page_from(segments: &Segments, from: u64, floor: u64, end: u64, mut limits: Limits) -> io::Result<Events> {
    let from = from.max(floor);
    let mut events: Vec<Event> = Vec::new();
    let mut after = from;
    if from < end {
        after = segments.forward(from, |entry| {
            if entry.offset >= end {
                return ControlFlow::Break(());
            }
            if is_shown(&entry.line) {
                if !limits.take(&entry.line.text, events.is_empty()) {
                    return ControlFlow::Break(());
                }
                events.push(entry.into());
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(Events { before: events.first().map_or(from, |event| event.offset), after, events })
}

fn page_before(segments: &Segments, to: u64, floor: u64, end: u64, mut limits: Limits) -> io::Result<Events> {
    let to = to.min(end);
    let mut events: Vec<Event> = Vec::new();
    let mut after = to;
    segments.backward(to, floor, |entry| {
        if is_shown(&entry.line) {
            if !limits.take(&entry.line.text, events.is_empty()) {
                return ControlFlow::Break(());
            }
            if events.is_empty() {
                after = entry.next;
            }
            events.push(entry.into());
        }
        ControlFlow::Continue(())
    })?;
    events.reverse();
    Ok(Events { before: events.first().map_or(to.max(floor), |event| event.offset), after, events })
}

/// A stream in a merge.
struct Source {
    name: String,
    segments: Segments,
    /// What has been read but not taken.
    ready: VecDeque<Entry>,
    /// Where to read on.
    from: u64,
}

/// Streams, and which of them has the oldest line.
struct Merge {
    sources: Vec<Source>,
    /// Time of the next line, index of the source; sources are in the order of their names.
    next: BinaryHeap<Reverse<(u64, usize)>>,
    /// Bytes that each source holds ready.
    chunk: u64,
    end: u64,
}

impl Merge {
    fn of(streams: Vec<(String, PathBuf)>, filter: &Filter) -> io::Result<Self> {
        let Times { start, end } = filter.times;
        let mut sources = Vec::new();
        for (name, dir) in streams {
            let segments = Segments::of(&dir)?;
            let Some(modified) = segments.modified() else { continue };
            let start = start.max(filter.after.as_ref().map_or(0, |after| after.time_ms));
            if millis(modified + FILE_CLOCK) < start {
                continue;
            }
            let from = match filter.after.as_ref().map(|after| (name.cmp(&after.stream), after)) {
                Some((Ordering::Less, after)) => segments.seek(start.max(after.time_ms.saturating_add(1)))?,
                Some((Ordering::Equal, after)) => after.offset,
                Some((Ordering::Greater, _)) | None => segments.seek(start)?,
            };
            sources.push(Source { name, segments, ready: VecDeque::new(), from });
        }
        let chunk = (MERGE_BYTES / sources.len().max(1) as u64).clamp(1 << 10, 256 << 10);
        let mut merge = Self { sources, next: BinaryHeap::new(), chunk, end };
        for index in 0..merge.sources.len() {
            merge.queue(index)?;
        }
        Ok(merge)
    }

    /// Puts a source in its place, if it has another line.
    fn queue(&mut self, index: usize) -> io::Result<()> {
        let Source { segments, ready, from, .. } = &mut self.sources[index];
        if ready.is_empty() {
            let begin = *from;
            let chunk = self.chunk;
            *from = segments.forward(begin, |entry| {
                if entry.offset.saturating_sub(begin) >= chunk && !ready.is_empty() {
                    return ControlFlow::Break(());
                }
                ready.push_back(entry);
                ControlFlow::Continue(())
            })?;
        }
        if let Some(entry) = ready.front().filter(|entry| entry.line.time_ms < self.end) {
            self.next.push(Reverse((entry.line.time_ms, index)));
        }
        Ok(())
    }

    fn page(mut self, filter: &Filter) -> io::Result<Filtered> {
        let mut limits = filter.limits;
        let mut events: Vec<(String, Event)> = Vec::new();
        let mut taken: Option<Position> = None;
        let mut scanned = 0;
        while let Some(Reverse((time_ms, index))) = self.next.pop() {
            let source = &mut self.sources[index];
            let Some(entry) = source.ready.pop_front() else { continue };
            let position = Position { time_ms, stream: source.name.clone(), offset: entry.next };
            scanned += entry.next - entry.offset;
            if is_shown(&entry.line) && (filter.wanted)(&entry.line.text) {
                if !limits.take(&entry.line.text, events.is_empty()) {
                    return Ok(Filtered { events, next: taken });
                }
                events.push((source.name.clone(), entry.into()));
            }
            self.queue(index)?;
            if scanned >= SCAN_BYTES {
                return Ok(Filtered { events, next: Some(position).filter(|_| !self.next.is_empty()) });
            }
            taken = Some(position);
        }
        Ok(Filtered { events, next: None })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::logs::{
        Retention, Route,
        tests::{group, line, route},
    };

    const ALL: Times = Times { start: 0, end: u64::MAX };
    const FEW: Limits = Limits { events: 7, bytes: 1 << 20 };

    async fn store(streams: &[(&str, &[u64])]) -> (tempfile::TempDir, Arc<LogStore>) {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().to_owned(), Retention::default());
        for (name, times) in streams {
            let writer = logs.writer(&route(name));
            for time_ms in *times {
                writer.append(LogLine { time_ms: *time_ms, ..line(&format!("{name} {time_ms}")) }).await;
            }
        }
        logs.close().await;
        (dir, logs)
    }

    fn times(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.time_ms).collect()
    }

    #[tokio::test]
    async fn a_stream_is_read_to_its_end_in_either_direction_and_the_place_stays() {
        let all: Vec<u64> = (1..=50).collect();
        let (_dir, logs) = store(&[("s", &all)]).await;
        let read = async |place| logs.events(&group(), "s", Times { start: 3, end: 48 }, place, FEW).await;
        let expected: Vec<u64> = (3..48).collect();

        let (mut seen, mut place) = (Vec::new(), Place::Head);
        loop {
            let page = read(place).await.unwrap();
            let next = Place::From(page.after);
            if page.events.is_empty() {
                assert_eq!(next, place, "the same token at the end");
                break;
            }
            seen.extend(times(&page.events));
            place = next;
        }
        assert_eq!(seen, expected);

        let (mut seen, mut place) = (Vec::new(), Place::Tail);
        loop {
            let page = read(place).await.unwrap();
            let next = Place::Before(page.before);
            if page.events.is_empty() {
                assert_eq!(next, place, "the same token at the beginning");
                break;
            }
            seen.splice(0..0, times(&page.events));
            place = next;
        }
        assert_eq!(seen, expected);

        let tail = read(Place::Tail).await.unwrap();
        let before = read(Place::Before(tail.before)).await.unwrap();
        assert_eq!(read(Place::From(before.after)).await.unwrap().events, tail.events, "there and back");
    }

    #[tokio::test]
    async fn pages_are_limited_by_bytes_but_never_empty() {
        let (_dir, logs) = store(&[("s", &[1, 2, 3, 4])]).await;
        for (bytes, count) in [(1, 1), (60, 2), (1000, 4)] {
            for place in [Place::Head, Place::Tail] {
                let page = logs.events(&group(), "s", ALL, place, Limits { events: 100, bytes }).await.unwrap();
                assert_eq!(page.events.len(), count, "{bytes} {place:?}");
            }
        }
    }

    fn everything(after: Option<Position>) -> Filter {
        Filter { streams: Streams::All, times: ALL, after, limits: FEW, wanted: Box::new(|_| true) }
    }

    #[tokio::test]
    async fn streams_are_merged_by_time_whatever_the_size_of_the_pages() {
        let (a, b, c) = ([1, 2, 2, 2, 9, 9, 30], [2, 2, 3, 4, 9, 9, 9], [2, 8, 9]);
        let (_dir, logs) = store(&[("b", &b), ("c", &c), ("a", &a)]).await;
        let whole = Filter { limits: Limits { events: 1000, bytes: 1 << 20 }, ..everything(None) };
        let whole = logs.filter(&group(), whole).await.unwrap();
        assert_eq!((whole.events.len(), whole.next), (17, None));
        let keys: Vec<_> = whole.events.iter().map(|(stream, event)| (event.time_ms, stream.clone(), event.offset)).collect();
        assert!(keys.is_sorted(), "{keys:?}");
        for events in 1..=17 {
            let (mut seen, mut after, mut pages) = (Vec::new(), None, 0);
            loop {
                let filter = Filter { limits: Limits { events, bytes: 1 << 20 }, ..everything(after) };
                let page = logs.filter(&group(), filter).await.unwrap();
                seen.extend(page.events);
                pages += 1;
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            assert_eq!((seen, pages), (whole.events.clone(), 17_usize.div_ceil(events)));
        }
        let mut ids: Vec<String> = whole.events.iter().map(|(stream, event)| event_id("g", stream, event)).collect();
        assert!(ids.iter().all(|id| id.len() == 56));
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 17);
    }

    #[tokio::test]
    async fn a_filter_chooses_streams_times_and_texts() {
        let (_dir, logs) = store(&[("a1", &[1, 2, 3]), ("a2", &[2, 3, 4]), ("b", &[3])]).await;
        let texts = async |filter| {
            let filtered = logs.filter(&group(), filter).await.unwrap();
            filtered.events.into_iter().map(|(_, event)| event.text).collect::<Vec<_>>()
        };
        let filter = Filter { streams: Streams::Prefix("a".to_owned()), times: Times { start: 2, end: 4 }, ..everything(None) };
        assert_eq!(texts(filter).await, ["a1 2", "a2 2", "a1 3", "a2 3"]);
        let filter = Filter { streams: Streams::Names(vec!["b".to_owned(), "a2".to_owned()]), ..everything(None) };
        assert_eq!(texts(filter).await, ["a2 2", "a2 3", "b 3", "a2 4"]);
        assert_eq!(texts(Filter { wanted: Box::new(|text| text.ends_with('3')), ..everything(None) }).await, ["a1 3", "a2 3", "b 3"]);
        let filter = Filter { streams: Streams::Names(vec!["x".to_owned()]), ..everything(None) };
        assert!(matches!(logs.filter(&group(), filter).await, Err(ReadError::NoStream)));
    }

    #[tokio::test]
    async fn what_is_the_operator_s_and_what_is_another_account_s_is_not_there() {
        let (_dir, logs) = store(&[]).await;
        let logs = LogStore::new(logs.dir.clone(), Retention::default());
        let writer = logs.writer(&route("s"));
        writer.append(LogLine::now(LogOrigin::System, "the guest says")).await;
        writer.append(LogLine::now(LogOrigin::Stdout, "the app says")).await;
        let disabled = serde_json::json!({"disabled": {}});
        let other = LogGroup::of_image("000000000000", "us-east-1", "quiet");
        logs.writer(&Route::new(other.clone(), "s".to_owned(), Some(&disabled))).append(line("quiet")).await;
        drop(writer);
        logs.close().await;
        assert_eq!(logs.list_groups("000000000000", "us-east-1").await.unwrap(), [group().name]);
        assert!(matches!(logs.filter(&other, everything(None)).await, Err(ReadError::NoGroup)));
        for place in [Place::Head, Place::Tail] {
            let page = logs.events(&group(), "s", ALL, place, FEW).await.unwrap();
            assert_eq!(page.events.iter().map(|event| event.text.as_str()).collect::<Vec<_>>(), ["the app says"]);
        }
        assert_eq!(logs.filter(&group(), everything(None)).await.unwrap().events.len(), 1);
        for (account, region) in [("111111111111", "us-east-1"), ("000000000000", "eu-west-1")] {
            assert!(logs.list_groups(account, region).await.unwrap().is_empty());
            let foreign = LogGroup::of_image(account, region, "demo");
            assert!(matches!(logs.list_streams(&foreign).await, Err(ReadError::NoGroup)));
            assert!(matches!(logs.events(&foreign, "s", ALL, Place::Head, FEW).await, Err(ReadError::NoGroup)));
        }
    }

    #[tokio::test]
    async fn groups_and_streams_are_described() {
        let (_dir, logs) = store(&[("a", &[5, 6]), ("b", &[7])]).await;
        let info = logs.describe_group(&group()).await.unwrap();
        assert!(info.bytes > 100 && info.created_ms > 1_700_000_000_000);
        let streams = logs.list_streams(&group()).await.unwrap();
        assert_eq!(streams.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let stream = logs.describe_stream(&group(), "a").await.unwrap();
        assert_eq!((stream.first_ms, stream.last_ms), (Some(5), Some(6)));
        assert!(stream.ingested_ms.unwrap() > 1_700_000_000_000);
        assert!(matches!(logs.events(&group(), "c", ALL, Place::Head, FEW).await, Err(ReadError::NoStream)));
    }
}
