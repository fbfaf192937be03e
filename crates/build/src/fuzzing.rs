//! What the fuzz targets reach of the parsers in here.

use std::{path::Path, time::Duration};

use crate::{ArchiveLimits, archive, dockerfile, process::Stop, progress::Progress};

/// Unpacks an archive with limits that a fuzzer's pace bears; whether it was accepted.
pub fn unpack(archive: &Path, context: &Path) -> bool {
    let limits = ArchiveLimits { unpacked_bytes: 1 << 20, entries: 1000 };
    archive::unpack(archive, context, limits, &Stop::after(Duration::from_secs(10))).is_ok()
}

/// Reads a Dockerfile; what BuildKit gets instead, if it is accepted.
pub fn read_dockerfile(text: &str, context: &Path) -> Option<String> {
    dockerfile::read(text, "amd64", context).ok().map(|recipe| recipe.text)
}

/// Reads BuildKit's output, of which parts are what steps print. Returns the lines that are shown.
pub fn read_progress(output: &str) -> Vec<String> {
    let mut progress = Progress::default();
    let mut lines: Vec<String> = output.lines().flat_map(|line| progress.take(line)).collect();
    lines.extend(progress.finish().0);
    lines
}
