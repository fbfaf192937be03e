//! Durable records of images, versions, builds, MicroVMs and connectors, in one SQLite file.
//!
//! One connection writes, so that a check and the change that depends on it are one step; a few others read. A write that returned is on
//! disk: what a caller was promised survives a power cut.

#![forbid(unsafe_code)]

mod connectors;
mod error;
mod images;
mod microvms;
mod tokens;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::{
    Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use connectors::{ConnectorRow, ConnectorVersionRow, CreateConnector, DeleteConnector, NewConnector, UpdateConnector};
pub use error::{OpenError, StoreError};
pub use images::{
    BuildBytes, BuildRow, ChangeVersion, CreateImage, CreateVersion, DeleteImage, ImageRow, NewImage, NewVersion, VersionRow,
};
pub use microvms::{CreateMicrovm, MicrovmChange, MicrovmRow, NewMicrovm};
pub use tokens::{ClientToken, Made};

/// Connections that read. Each is a thread.
const READERS: u32 = 2;
/// How long a connection waits for another process that holds the file (a backup, a shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    path: Arc<PathBuf>,
    writer: SqlitePool,
    readers: SqlitePool,
}

/// Whose records: nothing is ever found across accounts or regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope<'a> {
    /// Twelve digits.
    pub account: &'a str,
    /// For example `us-east-1`.
    pub region: &'a str,
}

/// Part of a list, newest first.
#[derive(Debug, Clone, Copy)]
pub struct Keyset {
    /// Only records with a smaller `seq`.
    pub before: Option<i64>,
    /// At most this many.
    pub limit: u32,
}

impl Store {
    /// Opens the database and brings its schema up to date; makes it if there is none.
    pub async fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::new(path, source);
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let writer = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await.map_err(failed)?;
        if let Err(error) = sqlx::migrate!().run(&writer).await {
            writer.close().await;
            return Err(OpenError::migration(path, error));
        }
        let readers = SqlitePoolOptions::new().max_connections(READERS).connect_with(options.read_only(true)).await.map_err(failed)?;
        Ok(Self { path: Arc::new(path.to_owned()), writer, readers })
    }

    /// Writes everything into the main file and closes it.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// A transaction that may write. There is only one at a time.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        self.writer.begin().await.map_err(self.failed("starting a transaction"))
    }

    fn failed(&self, what: &'static str) -> impl Fn(sqlx::Error) -> StoreError + use<> {
        let path = Arc::clone(&self.path);
        move |source| StoreError::new(what, &path, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hearth.db");
        let store = Store::open(&path).await.unwrap();
        let image = images::tests::new_image("demo");
        store.create_image(&image, None).await.unwrap();
        store.close().await;
        let store = Store::open(&path).await.unwrap();
        assert!(store.image_by_name(images::tests::SCOPE, "demo").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_newer_schema_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hearth.db");
        let store = Store::open(&path).await.unwrap();
        sqlx::query(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'later', 1, x'00', 0)",
        )
        .execute(&store.writer)
        .await
        .unwrap();
        store.close().await;
        let error = Store::open(&path).await.unwrap_err();
        assert!(matches!(error, OpenError::TooNew { .. }), "{error}");
        assert!(error.to_string().contains("newer version of Hearth"), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hearth.db");
        std::fs::write(&path, vec![b'x'; 8192]).unwrap();
        let error = Store::open(&path).await.unwrap_err();
        assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("hearth.db"), "{error}");
    }

    #[tokio::test]
    async fn a_full_disk_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("hearth.db")).await.unwrap();
        // As if the disk ended where the file does.
        sqlx::query("PRAGMA max_page_count = 1").execute(&store.writer).await.unwrap();
        let tags = format!("{{\"k\":\"{}\"}}", "v".repeat(100_000));
        let image = NewImage { tags: &tags, ..images::tests::new_image("demo") };
        let error = store.create_image(&image, None).await.unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        assert!(error.to_string().contains("free some space"), "{error}");
        assert!(store.image_by_name(images::tests::SCOPE, "demo").await.unwrap().is_none());
    }
}
