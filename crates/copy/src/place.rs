//! Where `docker cp SOURCE DESTINATION` puts things: it depends on what both are, and on what their names end with.

/// What is at a path, symbolic links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Missing,
    /// A file, or anything else that is no directory.
    File,
    /// A directory.
    Directory,
}

/// Where the stream goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory to unpack in. It exists, or the copy fails.
    pub directory: String,
    /// What the source is called there; `.` if its content goes there without it.
    pub name: String,
}

/// The source cannot go to the destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// a name that only a directory can have
    #[error("{0} ends with a slash, but there is no such directory")]
    NoDirectory(String),
    /// a directory cannot replace a file
    #[error("{0} is a file: a directory cannot be copied there")]
    OntoFile(String),
}

/// The last part of a path: what the source is called in the stream if the destination is a directory. A directory named with `/.` at its
/// end stands for its content.
pub fn source_name(path: &str) -> &str {
    if path.ends_with("/.") || path == "." {
        return ".";
    }
    match path.trim_end_matches('/').rsplit('/').next() {
        Some("" | ".." | ".") | None => ".",
        Some(name) => name,
    }
}

/// Decides where a source goes.
pub fn place(source: &str, source_is_directory: bool, destination: &str, found: Found) -> Result<Place, PlaceError> {
    match found {
        Found::Directory => Ok(Place { directory: destination.to_owned(), name: source_name(source).to_owned() }),
        Found::File if source_is_directory => Err(PlaceError::OntoFile(destination.to_owned())),
        Found::Missing if !source_is_directory && destination.ends_with('/') => Err(PlaceError::NoDirectory(destination.to_owned())),
        Found::File | Found::Missing => Ok(beside(destination)),
    }
}

/// A place under the destination's own name.
fn beside(destination: &str) -> Place {
    let trimmed = destination.trim_end_matches('/');
    let (directory, name) = trimmed.rsplit_once('/').map_or((".", trimmed), |(directory, name)| (directory, name));
    let directory = if directory.is_empty() { "/" } else { directory };
    Place { directory: directory.to_owned(), name: name.to_owned() }
}
