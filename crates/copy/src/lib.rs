//! Files as tar streams, by the rules of `docker cp`: the host's command line packs what the guest unpacks, and the other way round.
//!
//! Memory is bounded whatever the size of the files. Devices, sockets and pipes are left out, and named. Symbolic links are copied, not
//! followed, and nothing is unpacked outside the directory that was named.

#![forbid(unsafe_code)]

mod pack;
mod place;
mod unpack;

pub use pack::pack;
pub use place::{Found, Place, PlaceError, place, source_name};
pub use unpack::unpack;

use std::{io, path::Path};

/// A copy failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub struct CopyError {
    /// What was being done, to what.
    pub doing: String,
    /// Why it failed.
    pub source: io::Error,
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let doing = format!("{doing} {}", path.display());
    move |source| CopyError { doing, source }
}

#[cfg(test)]
mod tests;
