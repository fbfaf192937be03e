//! The image that this runs in.

use std::fs;

/// The table of names.
pub const TABLE: &str = "/usr/share/hearth/dnf-packages";

/// The Debian release that the image is, for readers.
pub fn release() -> String {
    let version = fs::read_to_string("/etc/debian_version").unwrap_or_default();
    format!("Debian {}", version.trim()).trim_end().to_owned()
}
