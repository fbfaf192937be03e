//! What can go wrong with the database file, and what the operator can do about it.

use std::path::{Path, PathBuf};

use sqlx::migrate::MigrateError;

/// Primary result codes of SQLite (sqlite.org/rescode.html).
mod code {
    pub const READONLY: u32 = 8;
    pub const CORRUPT: u32 = 11;
    pub const FULL: u32 = 13;
    pub const NOTADB: u32 = 26;
}

/// The database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// a newer server wrote it
    #[error("the database {path} was written by a newer version of Hearth (schema {schema}): start that version, or another data directory", path = path.display())]
    TooNew {
        /// The database.
        path: PathBuf,
        /// The first schema version that this server does not know.
        schema: i64,
    },
    /// it is not a database, or a damaged one
    #[error(
        "the database {path} is damaged ({reason}): restore it from a backup, or move it away together with its -wal and -shm files to start with an empty one",
        path = path.display()
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        reason: String,
    },
    /// the disk is full
    #[error("the disk that holds the database {path} is full: free some space and start again", path = path.display())]
    Full {
        /// The database.
        path: PathBuf,
    },
    /// anything else
    #[error("cannot open the database {path}: {source}", path = path.display())]
    Other {
        /// The database.
        path: PathBuf,
        /// What failed.
        source: sqlx::Error,
    },
}

impl OpenError {
    pub(crate) fn new(path: &Path, source: sqlx::Error) -> Self {
        let path = path.to_owned();
        match primary_code(&source) {
            Some(code::CORRUPT | code::NOTADB) => Self::Damaged { path, reason: source.to_string() },
            Some(code::FULL) => Self::Full { path },
            _ => Self::Other { path, source },
        }
    }

    pub(crate) fn migration(path: &Path, error: MigrateError) -> Self {
        let path = path.to_owned();
        match error {
            MigrateError::VersionMissing(schema) | MigrateError::VersionTooNew(schema, _) => Self::TooNew { path, schema },
            MigrateError::VersionMismatch(schema) | MigrateError::Dirty(schema) => {
                Self::Damaged { path, reason: format!("its schema {schema} is not the one that Hearth makes") }
            }
            MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _) => Self::new(&path, source),
            other => Self::Other { path, source: other.into() },
        }
    }
}

/// A query failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// the disk is full
    #[error("{what}: the disk that holds the database {path} is full: free some space", path = path.display())]
    Full {
        /// What was being done.
        what: &'static str,
        /// The database.
        path: PathBuf,
    },
    /// the file is damaged
    #[error("{what}: the database {path} is damaged ({reason}): stop Hearth and restore it from a backup", path = path.display())]
    Damaged {
        /// What was being done.
        what: &'static str,
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        reason: String,
    },
    /// the file cannot be written
    #[error("{what}: the database {path} cannot be written: check its permissions and that its file system is not mounted read-only", path = path.display())]
    ReadOnly {
        /// What was being done.
        what: &'static str,
        /// The database.
        path: PathBuf,
    },
    /// anything else
    #[error("{what}: {source}")]
    Query {
        /// What was being done.
        what: &'static str,
        /// What failed.
        source: sqlx::Error,
    },
}

impl StoreError {
    pub(crate) fn new(what: &'static str, path: &Path, source: sqlx::Error) -> Self {
        let path = path.to_owned();
        match primary_code(&source) {
            Some(code::FULL) => Self::Full { what, path },
            Some(code::CORRUPT | code::NOTADB) => Self::Damaged { what, path, reason: source.to_string() },
            Some(code::READONLY) => Self::ReadOnly { what, path },
            _ => Self::Query { what, source },
        }
    }
}

/// SQLite's primary result code: the low byte of the extended one.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<u32>().ok().map(|extended| extended & 0xff)
}
