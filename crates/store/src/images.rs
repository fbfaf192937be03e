//! Images, their versions and their builds.

use sqlx::{FromRow, SqliteConnection};

use crate::{
    ClientToken, Keyset, Scope, Store, StoreError,
    tokens::{self, Seen},
};

/// A row of `images`.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct ImageRow {
    pub seq: i64,
    /// UUID.
    pub id: String,
    pub account: String,
    pub region: String,
    pub name: String,
    pub state: String,
    /// Number of the newest version that can be launched.
    pub latest_active: Option<i64>,
    /// Number of the newest version that could not be built.
    pub latest_failed: Option<i64>,
    /// JSON object.
    pub tags: String,
    pub created_ms: i64,
    pub updated_ms: i64,
}

/// A row of `versions`.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct VersionRow {
    pub seq: i64,
    pub image_id: String,
    /// `n` of `n.0`.
    pub number: i64,
    pub state: String,
    pub status: String,
    pub state_reason: Option<String>,
    /// JSON object.
    pub spec: String,
    /// JSON object.
    pub tags: String,
    pub created_ms: i64,
    pub updated_ms: i64,
}

/// A row of `builds`.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct BuildRow {
    pub seq: i64,
    /// UUID.
    pub id: String,
    pub image_id: String,
    pub number: i64,
    pub state: String,
    pub state_reason: Option<String>,
    pub created_ms: i64,
    #[sqlx(flatten)]
    pub bytes: BuildBytes,
}

/// Sizes of what a build made, as far as it got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromRow)]
pub struct BuildBytes {
    #[sqlx(rename = "code_install_bytes")]
    pub code_install: Option<i64>,
    #[sqlx(rename = "disk_snapshot_bytes")]
    pub disk_snapshot: Option<i64>,
    #[sqlx(rename = "memory_snapshot_bytes")]
    pub memory_snapshot: Option<i64>,
}

/// An image to be made, with its first version and that version's build.
#[derive(Debug, Clone)]
pub struct NewImage<'a> {
    pub scope: Scope<'a>,
    pub id: &'a str,
    pub name: &'a str,
    pub spec: &'a str,
    pub tags: &'a str,
    pub build_id: &'a str,
    pub now_ms: i64,
}

/// What became of a [`NewImage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateImage {
    Created,
    /// The token made this image before, with the same parameters.
    Replayed {
        /// The image's id.
        id: String,
    },
    /// The token was used with other parameters.
    TokenReused,
    NameTaken,
}

/// What became of the wish to delete an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteImage {
    /// It is `DELETING` now, or was already.
    Started,
    /// It has MicroVMs that are not terminated.
    InUse,
    /// It is being built.
    Busy {
        /// The image's state.
        state: String,
    },
    Gone,
}

impl Store {
    /// Records an image in state `CREATING` with version 1 and a build, both `PENDING`.
    pub async fn create_image(&self, image: &NewImage<'_>, token: Option<ClientToken<'_>>) -> Result<CreateImage, StoreError> {
        let failed = self.failed("recording a new image");
        let mut tx = self.begin().await?;
        if let Some(token) = token {
            match tokens::look_up(&mut tx, image.scope, token).await.map_err(&failed)? {
                Seen::Never => {}
                Seen::Same(id) => return Ok(CreateImage::Replayed { id }),
                Seen::Different => return Ok(CreateImage::TokenReused),
            }
        }
        let inserted = sqlx::query(
            "INSERT INTO images (id, account, region, name, state, tags, created_ms, updated_ms)
             VALUES (?1, ?2, ?3, ?4, 'CREATING', ?5, ?6, ?6) ON CONFLICT (account, region, name) DO NOTHING",
        )
        .bind(image.id)
        .bind(image.scope.account)
        .bind(image.scope.region)
        .bind(image.name)
        .bind(image.tags)
        .bind(image.now_ms)
        .execute(&mut *tx)
        .await
        .map_err(&failed)?;
        if inserted.rows_affected() == 0 {
            return Ok(CreateImage::NameTaken);
        }
        insert_version(&mut tx, image).await.map_err(&failed)?;
        if let Some(token) = token {
            tokens::remember(&mut tx, image.scope, token, image.id).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(CreateImage::Created)
    }

    pub async fn image_by_name(&self, scope: Scope<'_>, name: &str) -> Result<Option<ImageRow>, StoreError> {
        sqlx::query_as("SELECT * FROM images WHERE account = ?1 AND region = ?2 AND name = ?3")
            .bind(scope.account)
            .bind(scope.region)
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading an image"))
    }

    pub async fn image_by_id(&self, id: &str) -> Result<Option<ImageRow>, StoreError> {
        sqlx::query_as("SELECT * FROM images WHERE id = ?1")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading an image"))
    }

    pub async fn list_images(&self, scope: Scope<'_>, keys: Keyset) -> Result<Vec<ImageRow>, StoreError> {
        sqlx::query_as("SELECT * FROM images WHERE account = ?1 AND region = ?2 AND seq < ?3 ORDER BY seq DESC LIMIT ?4")
            .bind(scope.account)
            .bind(scope.region)
            .bind(keys.before.unwrap_or(i64::MAX))
            .bind(keys.limit)
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing images"))
    }

    /// Every image of every account, oldest first.
    pub async fn all_images(&self) -> Result<Vec<ImageRow>, StoreError> {
        sqlx::query_as("SELECT * FROM images ORDER BY seq").fetch_all(&self.readers).await.map_err(self.failed("listing all images"))
    }

    pub async fn version(&self, image_id: &str, number: i64) -> Result<Option<VersionRow>, StoreError> {
        sqlx::query_as("SELECT * FROM versions WHERE image_id = ?1 AND number = ?2")
            .bind(image_id)
            .bind(number)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading an image version"))
    }

    pub async fn list_versions(&self, image_id: &str, keys: Keyset) -> Result<Vec<VersionRow>, StoreError> {
        sqlx::query_as("SELECT * FROM versions WHERE image_id = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3")
            .bind(image_id)
            .bind(keys.before.unwrap_or(i64::MAX))
            .bind(keys.limit)
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing image versions"))
    }

    pub async fn build(&self, image_id: &str, number: i64, id: &str) -> Result<Option<BuildRow>, StoreError> {
        sqlx::query_as("SELECT * FROM builds WHERE image_id = ?1 AND number = ?2 AND id = ?3")
            .bind(image_id)
            .bind(number)
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading a build"))
    }

    pub async fn list_builds(&self, image_id: &str, number: i64, keys: Keyset) -> Result<Vec<BuildRow>, StoreError> {
        sqlx::query_as("SELECT * FROM builds WHERE image_id = ?1 AND number = ?2 AND seq < ?3 ORDER BY seq DESC LIMIT ?4")
            .bind(image_id)
            .bind(number)
            .bind(keys.before.unwrap_or(i64::MAX))
            .bind(keys.limit)
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing builds"))
    }

    /// Version and build are `IN_PROGRESS`.
    pub async fn build_started(&self, image_id: &str, number: i64, build_id: &str, now_ms: i64) -> Result<(), StoreError> {
        let failed = self.failed("recording that a build started");
        let mut tx = self.begin().await?;
        set_version(&mut tx, image_id, number, ("IN_PROGRESS", "INACTIVE"), now_ms).await.map_err(&failed)?;
        set_build(&mut tx, build_id, "IN_PROGRESS", None, BuildBytes::default()).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// Version and build are `SUCCESSFUL`, the version `ACTIVE`, the image in `image_state`.
    pub async fn build_succeeded(
        &self,
        image_id: &str,
        number: i64,
        build_id: &str,
        bytes: BuildBytes,
        image_state: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let failed = self.failed("recording that a build succeeded");
        let mut tx = self.begin().await?;
        set_build(&mut tx, build_id, "SUCCESSFUL", None, bytes).await.map_err(&failed)?;
        set_version(&mut tx, image_id, number, ("SUCCESSFUL", "ACTIVE"), now_ms).await.map_err(&failed)?;
        sqlx::query("UPDATE images SET state = ?2, latest_active = ?3, updated_ms = ?4 WHERE id = ?1")
            .bind(image_id)
            .bind(image_state)
            .bind(number)
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// Version and build are `FAILED`, the version `INACTIVE`, the image in `image_state`. The reason is the build's (SPEC 2.1).
    #[expect(clippy::too_many_arguments, reason = "one column each")]
    pub async fn build_failed(
        &self,
        image_id: &str,
        number: i64,
        build_id: &str,
        reason: &str,
        bytes: BuildBytes,
        image_state: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let failed = self.failed("recording that a build failed");
        let mut tx = self.begin().await?;
        set_build(&mut tx, build_id, "FAILED", Some(reason), bytes).await.map_err(&failed)?;
        set_version(&mut tx, image_id, number, ("FAILED", "INACTIVE"), now_ms).await.map_err(&failed)?;
        sqlx::query("UPDATE images SET state = ?2, latest_failed = ?3, updated_ms = ?4 WHERE id = ?1")
            .bind(image_id)
            .bind(image_state)
            .bind(number)
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// Builds that are not finished.
    pub async fn unfinished_builds(&self) -> Result<Vec<BuildRow>, StoreError> {
        sqlx::query_as("SELECT * FROM builds WHERE state IN ('PENDING', 'IN_PROGRESS') ORDER BY seq")
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing unfinished builds"))
    }

    /// Marks an image `DELETING` unless it is being built or has MicroVMs that are not terminated.
    pub async fn begin_image_delete(&self, id: &str, now_ms: i64) -> Result<DeleteImage, StoreError> {
        let failed = self.failed("recording that an image is to be deleted");
        let mut tx = self.begin().await?;
        let state: Option<(String,)> =
            sqlx::query_as("SELECT state FROM images WHERE id = ?1").bind(id).fetch_optional(&mut *tx).await.map_err(&failed)?;
        match state {
            None => return Ok(DeleteImage::Gone),
            Some((state,)) if state == "DELETING" => return Ok(DeleteImage::Started),
            Some((state,)) if state == "CREATING" || state == "UPDATING" => return Ok(DeleteImage::Busy { state }),
            Some(_) => {}
        }
        let (live,): (i64,) = sqlx::query_as("SELECT count(*) FROM microvms WHERE image_id = ?1 AND state <> 'TERMINATED'")
            .bind(id)
            .fetch_one(&mut *tx)
            .await
            .map_err(&failed)?;
        if live > 0 {
            return Ok(DeleteImage::InUse);
        }
        sqlx::query("UPDATE images SET state = 'DELETING', updated_ms = ?2 WHERE id = ?1")
            .bind(id)
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
        tx.commit().await.map_err(&failed)?;
        Ok(DeleteImage::Started)
    }

    /// Forgets an image, its versions, builds and tokens. Its name is free again.
    pub async fn finish_image_delete(&self, id: &str) -> Result<(), StoreError> {
        let failed = self.failed("removing a deleted image");
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM images WHERE id = ?1").bind(id).execute(&mut *tx).await.map_err(&failed)?;
        tokens::free(&mut tx, id).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }
}

async fn insert_version(connection: &mut SqliteConnection, image: &NewImage<'_>) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO versions (image_id, number, state, status, spec, tags, created_ms, updated_ms)
         VALUES (?1, 1, 'PENDING', 'INACTIVE', ?2, ?3, ?4, ?4)",
    )
    .bind(image.id)
    .bind(image.spec)
    .bind(image.tags)
    .bind(image.now_ms)
    .execute(&mut *connection)
    .await?;
    sqlx::query("INSERT INTO builds (id, image_id, number, state, created_ms) VALUES (?1, ?2, 1, 'PENDING', ?3)")
        .bind(image.build_id)
        .bind(image.id)
        .bind(image.now_ms)
        .execute(connection)
        .await?;
    Ok(())
}

async fn set_version(
    connection: &mut SqliteConnection,
    image_id: &str,
    number: i64,
    (state, status): (&str, &str),
    now_ms: i64,
) -> sqlx::Result<()> {
    sqlx::query("UPDATE versions SET state = ?3, status = ?4, updated_ms = ?5 WHERE image_id = ?1 AND number = ?2")
        .bind(image_id)
        .bind(number)
        .bind(state)
        .bind(status)
        .bind(now_ms)
        .execute(connection)
        .await?;
    Ok(())
}

async fn set_build(connection: &mut SqliteConnection, id: &str, state: &str, reason: Option<&str>, bytes: BuildBytes) -> sqlx::Result<()> {
    sqlx::query(
        "UPDATE builds SET state = ?2, state_reason = ?3, code_install_bytes = ?4, disk_snapshot_bytes = ?5, memory_snapshot_bytes = ?6
         WHERE id = ?1",
    )
    .bind(id)
    .bind(state)
    .bind(reason)
    .bind(bytes.code_install)
    .bind(bytes.disk_snapshot)
    .bind(bytes.memory_snapshot)
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SCOPE: Scope<'static> = Scope { account: "000000000000", region: "us-east-1" };

    pub(crate) fn new_image(name: &str) -> NewImage<'_> {
        NewImage { scope: SCOPE, id: name, name, spec: "{}", tags: "{}", build_id: name, now_ms: 1000 }
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("hearth.db")).await.unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn a_token_replays_its_image_and_is_freed_with_it() {
        let (_dir, store) = store().await;
        let token = ClientToken { operation: "create", token: "t", fingerprint: "f" };
        assert_eq!(store.create_image(&new_image("a"), Some(token)).await.unwrap(), CreateImage::Created);
        let replayed = CreateImage::Replayed { id: "a".to_owned() };
        assert_eq!(store.create_image(&new_image("b"), Some(token)).await.unwrap(), replayed);
        let other = ClientToken { fingerprint: "g", ..token };
        assert_eq!(store.create_image(&new_image("b"), Some(other)).await.unwrap(), CreateImage::TokenReused);
        let elsewhere = NewImage { scope: Scope { region: "eu-west-1", ..SCOPE }, ..new_image("b") };
        assert_eq!(store.create_image(&elsewhere, Some(other)).await.unwrap(), CreateImage::Created);
        store.finish_image_delete("a").await.unwrap();
        assert_eq!(store.create_image(&new_image("a"), Some(other)).await.unwrap(), CreateImage::Created);
    }

    #[tokio::test]
    async fn a_name_is_taken_in_its_scope_only() {
        let (_dir, store) = store().await;
        store.create_image(&new_image("a"), None).await.unwrap();
        let again = NewImage { id: "other", build_id: "other", ..new_image("a") };
        assert_eq!(store.create_image(&again, None).await.unwrap(), CreateImage::NameTaken);
        assert!(store.version("other", 1).await.unwrap().is_none(), "nothing is left of the refused image");
        let elsewhere = NewImage { scope: Scope { account: "111111111111", ..SCOPE }, ..again };
        assert_eq!(store.create_image(&elsewhere, None).await.unwrap(), CreateImage::Created);
    }

    #[tokio::test]
    async fn a_build_carries_image_and_version_along() {
        let (_dir, store) = store().await;
        store.create_image(&new_image("a"), None).await.unwrap();
        assert_eq!(store.begin_image_delete("a", 1).await.unwrap(), DeleteImage::Busy { state: "CREATING".to_owned() });
        assert_eq!(store.unfinished_builds().await.unwrap().len(), 1);
        store.build_started("a", 1, "a", 2000).await.unwrap();
        let bytes = BuildBytes { code_install: Some(1), disk_snapshot: Some(2), memory_snapshot: Some(3) };
        store.build_succeeded("a", 1, "a", bytes, "CREATED", 3000).await.unwrap();
        let image = store.image_by_id("a").await.unwrap().unwrap();
        assert_eq!((image.state.as_str(), image.latest_active, image.updated_ms), ("CREATED", Some(1), 3000));
        let version = store.version("a", 1).await.unwrap().unwrap();
        assert_eq!((version.state.as_str(), version.status.as_str()), ("SUCCESSFUL", "ACTIVE"));
        assert_eq!(store.build("a", 1, "a").await.unwrap().unwrap().bytes, bytes);
        assert!(store.unfinished_builds().await.unwrap().is_empty());
        assert_eq!(store.begin_image_delete("a", 1).await.unwrap(), DeleteImage::Started);
        store.finish_image_delete("a").await.unwrap();
        assert!(store.build("a", 1, "a").await.unwrap().is_none());
    }
}
