//! What the fuzz targets reach of the parsers in here.

use std::{path::Path, time::Duration};

use crate::{ArchiveLimits, archive, process::Stop};

/// Unpacks an archive with limits that a fuzzer's pace bears; whether it was accepted.
pub fn unpack(archive: &Path, context: &Path) -> bool {
    let limits = ArchiveLimits { unpacked_bytes: 1 << 20, entries: 1000 };
    archive::unpack(archive, context, limits, &Stop::after(Duration::from_secs(10))).is_ok()
}
