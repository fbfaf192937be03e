//! A stream's files: segments named by the offset in bytes at which they begin, so that old ones can go and offsets keep their meaning.
//!
//! A writer only appends, and begins a segment of its own; lines are in the order of their times. So a time is found by bisection, a page is
//! read from an offset forwards or backwards, and nothing is ever read as a whole. Everything here blocks.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    ops::ControlFlow,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::Deserialize;

use super::LogLine;

/// Longest line on the disk, in bytes; the writer's pieces are shorter, whatever JSON makes of them.
pub(super) const LINE_LIMIT: u64 = 2 << 20;
/// Bytes read at once.
const BLOCK: u64 = 64 << 10;

/// A line, and where it stands in its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub offset: u64,
    /// Where the next line begins.
    pub next: u64,
    pub line: LogLine,
}

/// One file of a stream.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub start: u64,
    pub bytes: u64,
    pub modified: SystemTime,
    pub path: PathBuf,
}

impl Segment {
    pub fn path(dir: &Path, start: u64) -> PathBuf {
        dir.join(format!("{start:020}.jsonl"))
    }

    pub fn end(&self) -> u64 {
        self.start + self.bytes
    }

    fn open_at(&self, offset: u64) -> io::Result<BufReader<File>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(offset.saturating_sub(self.start)))?;
        Ok(BufReader::with_capacity(BLOCK as usize, file))
    }

    /// The first line that begins after `offset`, or at it if it is the segment's first.
    fn line_after(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let mut reader = self.open_at(offset)?;
        let mut text = Vec::new();
        let mut at = offset;
        if offset > self.start {
            match read_line(&mut reader, &mut text)? {
                Some(bytes) => at += bytes,
                None => return Ok(None),
            }
        }
        loop {
            match read_line(&mut reader, &mut text)? {
                Some(bytes) => match serde_json::from_slice::<TimeOnly>(&text) {
                    Ok(line) => return Ok(Some((at, line.t))),
                    Err(_) => at += bytes,
                },
                None => return Ok(None),
            }
        }
    }
}

/// What bisection looks at.
#[derive(Deserialize)]
struct TimeOnly {
    t: u64,
}

/// A stream's segments as they were a moment ago, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Segments(pub Vec<Segment>);

impl Segments {
    /// Looks at a stream's directory. A stream that does not exist has no segments.
    pub fn of(dir: &Path) -> io::Result<Self> {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        let mut segments = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(start) = name.to_str().and_then(|name| name.strip_suffix(".jsonl")).and_then(|start| start.parse().ok()) else {
                continue;
            };
            match entry.metadata() {
                Ok(metadata) => {
                    segments.push(Segment { start, bytes: metadata.len(), modified: metadata.modified()?, path: entry.path() });
                }
                // Its time has come between the two looks.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        segments.sort_by_key(|segment| segment.start);
        Ok(Self(segments))
    }

    pub fn start(&self) -> u64 {
        self.0.first().map_or(0, |segment| segment.start)
    }

    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, Segment::end)
    }

    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|segment| segment.bytes).sum()
    }

    /// When the stream last grew.
    pub fn modified(&self) -> Option<SystemTime> {
        self.0.last().map(|segment| segment.modified)
    }

    /// Shows lines from an offset on, until `visit` breaks or there are no more; returns where the first line begins that was not taken. The
    /// one that `visit` breaks at counts as not taken. A line that is still being written is left for the next time.
    pub fn forward(&self, from: u64, mut visit: impl FnMut(Entry) -> ControlFlow<()>) -> io::Result<u64> {
        let mut at = from.max(self.start());
        let mut text = Vec::new();
        for segment in self.0.iter().skip(self.0.partition_point(|segment| segment.end() <= at)) {
            at = at.max(segment.start);
            let mut reader = match segment.open_at(at) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                reader => reader?,
            };
            while let Some(bytes) = read_line(&mut reader, &mut text)? {
                let next = at + bytes;
                // A line that a crash cut short does not parse: it is skipped.
                if let Ok(line) = serde_json::from_slice::<LogLine>(&text)
                    && visit(Entry { offset: at, next, line }).is_break()
                {
                    return Ok(at);
                }
                at = next;
            }
        }
        Ok(at)
    }

    /// Shows the lines before an offset, the last one first, until `visit` breaks or `floor` is reached.
    pub fn backward(&self, to: u64, floor: u64, mut visit: impl FnMut(Entry) -> ControlFlow<()>) -> io::Result<()> {
        for segment in self.0.iter().rev().skip_while(|segment| segment.start >= to) {
            let mut end = to.min(segment.end());
            let file = match File::open(&segment.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                file => file?,
            };
            let mut size = BLOCK;
            while end > segment.start.max(floor) {
                let begin = end.saturating_sub(size).max(segment.start);
                let mut block = vec![0; usize::try_from(end - begin).map_err(io::Error::other)?];
                file.read_exact_at(&mut block, begin - segment.start)?;
                // The block begins within a line, unless it is the segment's first.
                let skipped = if begin == segment.start { Some(0) } else { newline(&block[..block.len() - 1]).map(|at| at + 1) };
                let Some(skipped) = skipped else {
                    if size > LINE_LIMIT {
                        return Ok(());
                    }
                    size *= 2;
                    continue;
                };
                let first = begin + skipped as u64;
                let mut entries = Vec::new();
                let mut offset = first;
                for text in block[skipped..].split_inclusive(|byte| *byte == b'\n') {
                    let next = offset + text.len() as u64;
                    let whole = text.last() == Some(&b'\n') && offset >= floor;
                    entries.extend(serde_json::from_slice(text).ok().filter(|_| whole).map(|line| Entry { offset, next, line }));
                    offset = next;
                }
                for entry in entries.into_iter().rev() {
                    if visit(entry).is_break() {
                        return Ok(());
                    }
                }
                (end, size) = (first, BLOCK);
            }
            if segment.start <= floor {
                break;
            }
        }
        Ok(())
    }

    /// Where the first line begins that is not older than a time; the end, if there is none.
    pub fn seek(&self, time_ms: u64) -> io::Result<u64> {
        let mut from = 0;
        let mut to = self.0.len();
        // Segments before `from` begin with an older line, those from `to` on do not.
        while from < to {
            let middle = from.midpoint(to);
            let segment = &self.0[middle];
            let older = segment.line_after(segment.start)?.is_none_or(|(_, time)| time < time_ms);
            if older { from = middle + 1 } else { to = middle }
        }
        let Some(segment) = from.checked_sub(1).map(|index| &self.0[index]) else { return Ok(self.start()) };
        let (mut older, mut end) = (segment.start, segment.end());
        while end - older > BLOCK {
            let middle = older.midpoint(end);
            match segment.line_after(middle)? {
                Some((at, time)) if time < time_ms => older = at,
                _ => end = middle,
            }
        }
        self.forward(older, |entry| if entry.line.time_ms < time_ms { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    }

    /// The newest line.
    pub fn last(&self) -> io::Result<Option<Entry>> {
        let mut last = None;
        self.backward(self.end(), self.start(), |entry| {
            last = Some(entry);
            ControlFlow::Break(())
        })?;
        Ok(last)
    }

    /// The oldest line.
    pub fn first(&self) -> io::Result<Option<Entry>> {
        let mut first = None;
        self.forward(0, |entry| {
            first = Some(entry);
            ControlFlow::Break(())
        })?;
        Ok(first)
    }
}

/// Reads a line and tells its length with the newline; nothing if there is no whole one.
fn read_line(reader: &mut impl BufRead, text: &mut Vec<u8>) -> io::Result<Option<u64>> {
    text.clear();
    let count = reader.by_ref().take(LINE_LIMIT).read_until(b'\n', text)?;
    Ok((text.last() == Some(&b'\n')).then_some(count as u64))
}

fn newline(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte == b'\n')
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::logs::LogOrigin;

    /// Writes lines in segments of `per_segment`; the text of a line is as long as `length` says.
    fn stream(times: &[u64], per_segment: usize, length: impl Fn(usize) -> usize) -> (tempfile::TempDir, Segments) {
        let dir = tempfile::tempdir().unwrap();
        let mut start = 0;
        for (number, times) in times.chunks(per_segment).enumerate() {
            let mut file = File::create(Segment::path(dir.path(), start)).unwrap();
            for (index, time_ms) in times.iter().enumerate() {
                let text = format!("{}{}", number * per_segment + index, "x".repeat(length(index)));
                let line = LogLine { time_ms: *time_ms, origin: LogOrigin::Stdout, text, dropped: 0, late_ms: 0 };
                let line = serde_json::to_string(&line).unwrap() + "\n";
                file.write_all(line.as_bytes()).unwrap();
                start += line.len() as u64;
            }
        }
        let segments = Segments::of(dir.path()).unwrap();
        (dir, segments)
    }

    fn all(segments: &Segments, from: u64) -> Vec<Entry> {
        let mut entries = Vec::new();
        segments
            .forward(from, |entry| {
                entries.push(entry);
                ControlFlow::Continue(())
            })
            .unwrap();
        entries
    }

    #[test]
    fn backwards_is_forwards_reversed_whatever_the_lengths() {
        let times: Vec<u64> = (0..500).collect();
        // Some lines are longer than a block, some blocks end exactly with a line.
        let (_dir, segments) = stream(&times, 120, |index| [10, 900, 70_000, 0][index % 4]);
        let forward = all(&segments, 0);
        assert_eq!(forward.len(), times.len());
        for (to, floor) in [(segments.end(), 0), (forward[400].offset, forward[7].offset), (forward[120].offset, forward[119].offset)] {
            let mut backward = Vec::new();
            segments
                .backward(to, floor, |entry| {
                    backward.push(entry);
                    ControlFlow::Continue(())
                })
                .unwrap();
            backward.reverse();
            let expected: Vec<Entry> = forward.iter().filter(|entry| entry.offset >= floor && entry.next <= to).cloned().collect();
            assert!(backward == expected, "{to} {floor}: {} of {}", backward.len(), expected.len());
        }
    }

    #[test]
    fn a_time_is_found_between_and_within_segments() {
        let times: Vec<u64> = (0..3000).map(|index| 100 + index / 3 * 2).collect();
        let (_dir, segments) = stream(&times, 800, |index| index % 400);
        let entries = all(&segments, 0);
        for time in [0, 100, 101, 102, 631, 632, 633, 1200, 2097, 2098, 2099, 9999] {
            let expected = entries.iter().find(|entry| entry.line.time_ms >= time).map_or(segments.end(), |entry| entry.offset);
            assert_eq!(segments.seek(time).unwrap(), expected, "{time}");
        }
        assert_eq!(Segments::default().seek(5).unwrap(), 0);
    }

    #[test]
    fn lines_that_were_cut_are_left_out_and_removed_segments_do_not_matter() {
        let (dir, segments) = stream(&[1, 2, 3, 4], 2, |_| 0);
        let second = segments.0[1].start;
        let mut file = File::options().append(true).open(&segments.0[1].path).unwrap();
        file.write_all(b"{\"t\":5,\"s\":\"std").unwrap();
        let cut = Segments::of(dir.path()).unwrap();
        std::fs::write(Segment::path(dir.path(), cut.end()), "{\"t\":6,\"s\":\"stdout\",\"m\":\"x\"}\n{\"t\":7").unwrap();
        let segments = Segments::of(dir.path()).unwrap();
        let times = |entries: Vec<Entry>| entries.iter().map(|entry| entry.line.time_ms).collect::<Vec<_>>();
        assert_eq!(times(all(&segments, 0)), [1, 2, 3, 4, 6]);
        assert_eq!(segments.last().unwrap().unwrap().line.time_ms, 6);
        assert_eq!(segments.seek(5).unwrap(), cut.end());
        std::fs::remove_file(&segments.0[0].path).unwrap();
        assert_eq!(times(all(&segments, 0)), [3, 4, 6], "also when it was removed after the look");
        let segments = Segments::of(dir.path()).unwrap();
        assert_eq!((segments.start(), times(all(&segments, 0))), (second, vec![3, 4, 6]));
    }
}
