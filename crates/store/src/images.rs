//! Images, their versions and their builds.

use sqlx::{FromRow, SqliteConnection};

use crate::{
    ClientToken, Keyset, Made, Scope, Store, StoreError,
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
    /// Number of the newest version there ever was.
    pub last_number: i64,
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
    /// Images that the scope may have.
    pub limit: u32,
    pub now_ms: i64,
}

/// What became of a [`NewImage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateImage {
    Created,
    /// The token made this image before, with the same parameters.
    Replayed(Made),
    /// The token was used with other parameters.
    TokenReused,
    NameTaken,
    /// The scope has as many images as it may.
    LimitReached,
}

/// A version to be made of an image that exists, with its build.
#[derive(Debug, Clone)]
pub struct NewVersion<'a> {
    pub scope: Scope<'a>,
    pub image_id: &'a str,
    pub spec: &'a str,
    pub build_id: &'a str,
    /// Versions that the image may have.
    pub limit: u32,
    pub now_ms: i64,
}

/// What became of a [`NewVersion`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateVersion {
    Created {
        /// The version's number.
        number: i64,
    },
    /// The token made this version before, with the same parameters.
    Replayed(Made),
    /// The token was used with other parameters.
    TokenReused,
    /// The image has as many versions as it may.
    LimitReached,
    /// The image is in the middle of something else.
    Busy {
        /// The image's state.
        state: String,
    },
    Gone,
}

/// What became of the wish to change or delete one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeVersion {
    /// The image is `UPDATING` now.
    Started,
    /// The image is in the middle of something else.
    Busy {
        /// The image's state.
        state: String,
    },
    /// It is the only version.
    Only,
    /// It was never built.
    NotBuilt {
        /// The version's state.
        state: String,
    },
    Gone,
}

/// What became of the wish to delete an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteImage {
    /// It is `DELETING` now, or was already.
    Started,
    /// It has MicroVMs that are not terminated.
    InUse,
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
                Seen::Same(made) => return Ok(CreateImage::Replayed(made)),
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
        let (images,): (i64,) = sqlx::query_as("SELECT count(*) FROM images WHERE account = ?1 AND region = ?2")
            .bind(image.scope.account)
            .bind(image.scope.region)
            .fetch_one(&mut *tx)
            .await
            .map_err(&failed)?;
        if images > i64::from(image.limit) {
            return Ok(CreateImage::LimitReached);
        }
        insert_version(&mut tx, image.id, 1, image.spec, image.build_id, image.now_ms).await.map_err(&failed)?;
        if let Some(token) = token {
            tokens::remember(&mut tx, image.scope, token, image.id, 1).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(CreateImage::Created)
    }

    /// Records the next version of an image, and its build, both `PENDING`; the image is `UPDATING` from now on.
    pub async fn create_version(&self, version: &NewVersion<'_>, token: Option<ClientToken<'_>>) -> Result<CreateVersion, StoreError> {
        let failed = self.failed("recording a new image version");
        let mut tx = self.begin().await?;
        if let Some(token) = token {
            match tokens::look_up(&mut tx, version.scope, token).await.map_err(&failed)? {
                Seen::Never => {}
                Seen::Same(made) => return Ok(CreateVersion::Replayed(made)),
                Seen::Different => return Ok(CreateVersion::TokenReused),
            }
        }
        match image_state(&mut tx, version.image_id).await.map_err(&failed)? {
            None => return Ok(CreateVersion::Gone),
            Some(state) if is_busy(&state) => return Ok(CreateVersion::Busy { state }),
            Some(_) => {}
        }
        if count_versions(&mut tx, version.image_id).await.map_err(&failed)? >= i64::from(version.limit) {
            return Ok(CreateVersion::LimitReached);
        }
        let (number,): (i64,) = sqlx::query_as(
            "UPDATE images SET state = 'UPDATING', last_number = last_number + 1, updated_ms = ?2 WHERE id = ?1 RETURNING last_number",
        )
        .bind(version.image_id)
        .bind(version.now_ms)
        .fetch_one(&mut *tx)
        .await
        .map_err(&failed)?;
        insert_version(&mut tx, version.image_id, number, version.spec, version.build_id, version.now_ms).await.map_err(&failed)?;
        if let Some(token) = token {
            tokens::remember(&mut tx, version.scope, token, version.image_id, number).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(CreateVersion::Created { number })
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
        set_image(&mut tx, image_id, image_state, now_ms).await.map_err(&failed)?;
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
        set_image(&mut tx, image_id, image_state, now_ms).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// Builds that are not finished.
    pub async fn unfinished_builds(&self) -> Result<Vec<BuildRow>, StoreError> {
        sqlx::query_as("SELECT * FROM builds WHERE state IN ('PENDING', 'IN_PROGRESS') ORDER BY seq")
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing unfinished builds"))
    }

    /// Marks an image `DELETING` unless it has MicroVMs that are not terminated. A build may still run: its end does not change the image's
    /// state any more.
    pub async fn begin_image_delete(&self, id: &str, now_ms: i64) -> Result<DeleteImage, StoreError> {
        let failed = self.failed("recording that an image is to be deleted");
        let mut tx = self.begin().await?;
        match image_state(&mut tx, id).await.map_err(&failed)? {
            None => return Ok(DeleteImage::Gone),
            Some(state) if state == "DELETING" => return Ok(DeleteImage::Started),
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

    /// Sets whether a version may be launched; the image is `UPDATING` until [`Store::image_updated`].
    pub async fn begin_status_change(&self, image_id: &str, number: i64, status: &str, now_ms: i64) -> Result<ChangeVersion, StoreError> {
        let failed = self.failed("recording a version's status");
        let mut tx = self.begin().await?;
        let state = match changeable(&mut tx, image_id, number).await.map_err(&failed)? {
            Ok(state) => state,
            Err(refused) => return Ok(refused),
        };
        if status == "ACTIVE" && state != "SUCCESSFUL" {
            return Ok(ChangeVersion::NotBuilt { state });
        }
        set_version(&mut tx, image_id, number, (&state, status), now_ms).await.map_err(&failed)?;
        set_image(&mut tx, image_id, "UPDATING", now_ms).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)?;
        Ok(ChangeVersion::Started)
    }

    /// Marks a version `DELETING` unless it is the only one; nothing is launched from it any more. The image is `UPDATING` until
    /// [`Store::finish_version_delete`].
    pub async fn begin_version_delete(&self, image_id: &str, number: i64, now_ms: i64) -> Result<ChangeVersion, StoreError> {
        let failed = self.failed("recording that a version is to be deleted");
        let mut tx = self.begin().await?;
        if let Err(refused) = changeable(&mut tx, image_id, number).await.map_err(&failed)? {
            return Ok(refused);
        }
        if count_versions(&mut tx, image_id).await.map_err(&failed)? < 2 {
            return Ok(ChangeVersion::Only);
        }
        set_version(&mut tx, image_id, number, ("DELETING", "INACTIVE"), now_ms).await.map_err(&failed)?;
        set_image(&mut tx, image_id, "UPDATING", now_ms).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)?;
        Ok(ChangeVersion::Started)
    }

    /// Forgets a version, its builds and its tokens; the image is `UPDATED`.
    pub async fn finish_version_delete(&self, image_id: &str, number: i64, now_ms: i64) -> Result<(), StoreError> {
        let failed = self.failed("removing a deleted version");
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM versions WHERE image_id = ?1 AND number = ?2")
            .bind(image_id)
            .bind(number)
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
        tokens::free_version(&mut tx, image_id, number).await.map_err(&failed)?;
        set_image(&mut tx, image_id, "UPDATED", now_ms).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// The image is `UPDATED`.
    pub async fn image_updated(&self, image_id: &str, now_ms: i64) -> Result<(), StoreError> {
        let failed = self.failed("recording that an image is updated");
        let mut tx = self.begin().await?;
        set_image(&mut tx, image_id, "UPDATED", now_ms).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }

    /// Whether a version exists, or a MicroVM that was launched from it is not terminated yet.
    pub async fn is_version_needed(&self, image_id: &str, number: i64) -> Result<bool, StoreError> {
        let (needed,) = sqlx::query_as(
            "SELECT EXISTS (SELECT 1 FROM versions WHERE image_id = ?1 AND number = ?2 AND state <> 'DELETING')
             OR EXISTS (SELECT 1 FROM microvms WHERE image_id = ?1 AND number = ?2 AND state <> 'TERMINATED')",
        )
        .bind(image_id)
        .bind(number)
        .fetch_one(&self.readers)
        .await
        .map_err(self.failed("looking for what uses a version"))?;
        Ok(needed)
    }

    /// Merges a JSON object into an image's tags; a null removes its key. Returns false, and changes nothing, if there would be more than
    /// `limit` tags.
    pub async fn change_image_tags(&self, id: &str, changes: &str, limit: u32) -> Result<bool, StoreError> {
        let changed = sqlx::query(
            "UPDATE images SET tags = json_patch(tags, ?2)
             WHERE id = ?1 AND (SELECT count(*) FROM json_each(json_patch(tags, ?2))) <= ?3",
        )
        .bind(id)
        .bind(changes)
        .bind(limit)
        .execute(&self.writer)
        .await
        .map_err(self.failed("changing an image's tags"))?;
        Ok(changed.rows_affected() == 1)
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

async fn insert_version(
    connection: &mut SqliteConnection,
    image_id: &str,
    number: i64,
    spec: &str,
    build_id: &str,
    now_ms: i64,
) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO versions (image_id, number, state, status, spec, created_ms, updated_ms)
         VALUES (?1, ?2, 'PENDING', 'INACTIVE', ?3, ?4, ?4)",
    )
    .bind(image_id)
    .bind(number)
    .bind(spec)
    .bind(now_ms)
    .execute(&mut *connection)
    .await?;
    sqlx::query("INSERT INTO builds (id, image_id, number, state, created_ms) VALUES (?1, ?2, ?3, 'PENDING', ?4)")
        .bind(build_id)
        .bind(image_id)
        .bind(number)
        .bind(now_ms)
        .execute(connection)
        .await?;
    Ok(())
}

/// Whether an image can take no other change now.
fn is_busy(state: &str) -> bool {
    ["CREATING", "UPDATING", "DELETING"].contains(&state)
}

async fn image_state(connection: &mut SqliteConnection, id: &str) -> sqlx::Result<Option<String>> {
    let row: Option<(String,)> = sqlx::query_as("SELECT state FROM images WHERE id = ?1").bind(id).fetch_optional(connection).await?;
    Ok(row.map(|(state,)| state))
}

async fn count_versions(connection: &mut SqliteConnection, image_id: &str) -> sqlx::Result<i64> {
    let (count,) = sqlx::query_as("SELECT count(*) FROM versions WHERE image_id = ?1").bind(image_id).fetch_one(connection).await?;
    Ok(count)
}

/// Sets an image's state, and finds its newest versions anew. An image that is being deleted stays `DELETING`.
async fn set_image(connection: &mut SqliteConnection, id: &str, state: &str, now_ms: i64) -> sqlx::Result<()> {
    sqlx::query(
        "UPDATE images SET state = iif(state = 'DELETING', state, ?2), updated_ms = ?3,
         latest_active = (SELECT max(number) FROM versions WHERE image_id = ?1 AND status = 'ACTIVE'),
         latest_failed = (SELECT max(number) FROM versions WHERE image_id = ?1 AND state = 'FAILED')
         WHERE id = ?1",
    )
    .bind(id)
    .bind(state)
    .bind(now_ms)
    .execute(connection)
    .await?;
    Ok(())
}

/// The state of a version that may be changed now, or why it may not.
async fn changeable(connection: &mut SqliteConnection, image_id: &str, number: i64) -> sqlx::Result<Result<String, ChangeVersion>> {
    let version: Option<(String,)> = sqlx::query_as("SELECT state FROM versions WHERE image_id = ?1 AND number = ?2")
        .bind(image_id)
        .bind(number)
        .fetch_optional(&mut *connection)
        .await?;
    let image = image_state(connection, image_id).await?;
    Ok(match (image, version) {
        (Some(state), Some(_)) if is_busy(&state) => Err(ChangeVersion::Busy { state }),
        (Some(_), Some((state,))) => Ok(state),
        _ => Err(ChangeVersion::Gone),
    })
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
        NewImage { scope: SCOPE, id: name, name, spec: "{}", tags: "{}", build_id: name, limit: 100, now_ms: 1000 }
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
        let replayed = CreateImage::Replayed(Made { id: "a".to_owned(), number: 1 });
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
    fn next(build_id: &str) -> NewVersion<'_> {
        NewVersion { scope: SCOPE, image_id: "a", spec: "{}", build_id, limit: 3, now_ms: 4000 }
    }

    /// An image `a` with one version that is active.
    async fn built() -> (tempfile::TempDir, Store) {
        let (dir, store) = store().await;
        store.create_image(&new_image("a"), None).await.unwrap();
        store.build_succeeded("a", 1, "a", BuildBytes::default(), "CREATED", 3000).await.unwrap();
        (dir, store)
    }

    async fn latest(store: &Store) -> (String, Option<i64>, Option<i64>) {
        let image = store.image_by_id("a").await.unwrap().unwrap();
        (image.state, image.latest_active, image.latest_failed)
    }

    #[tokio::test]
    async fn a_second_version_leaves_the_first_active_until_it_is_built() {
        let (_dir, store) = built().await;
        assert_eq!(store.create_version(&next("b"), None).await.unwrap(), CreateVersion::Created { number: 2 });
        assert_eq!(latest(&store).await, ("UPDATING".to_owned(), Some(1), None));
        let busy = CreateVersion::Busy { state: "UPDATING".to_owned() };
        assert_eq!(store.create_version(&next("c"), None).await.unwrap(), busy);
        store.build_failed("a", 2, "b", "bad", BuildBytes::default(), "UPDATE_FAILED", 5000).await.unwrap();
        assert_eq!(latest(&store).await, ("UPDATE_FAILED".to_owned(), Some(1), Some(2)));
        assert_eq!(store.create_version(&next("c"), None).await.unwrap(), CreateVersion::Created { number: 3 });
        store.build_succeeded("a", 3, "c", BuildBytes::default(), "UPDATED", 6000).await.unwrap();
        assert_eq!(latest(&store).await, ("UPDATED".to_owned(), Some(3), Some(2)));
        assert_eq!(store.create_version(&next("d"), None).await.unwrap(), CreateVersion::LimitReached);
    }

    #[tokio::test]
    async fn a_version_s_token_goes_with_the_version_and_the_image_s_with_the_image() {
        let (_dir, store) = store().await;
        let create = ClientToken { operation: "CreateMicrovmImage", token: "t", fingerprint: "f" };
        let update = ClientToken { operation: "UpdateMicrovmImage", ..create };
        store.create_image(&new_image("a"), Some(create)).await.unwrap();
        store.build_succeeded("a", 1, "a", BuildBytes::default(), "CREATED", 3000).await.unwrap();
        assert_eq!(store.create_version(&next("b"), Some(update)).await.unwrap(), CreateVersion::Created { number: 2 });
        let replayed = CreateVersion::Replayed(Made { id: "a".to_owned(), number: 2 });
        assert_eq!(store.create_version(&next("c"), Some(update)).await.unwrap(), replayed, "even while the image is busy");
        store.build_succeeded("a", 2, "b", BuildBytes::default(), "UPDATED", 5000).await.unwrap();
        for number in [1, 2] {
            let only = number == 2;
            let expected = if only { ChangeVersion::Only } else { ChangeVersion::Started };
            assert_eq!(store.begin_version_delete("a", number, 6000).await.unwrap(), expected);
            if !only {
                store.finish_version_delete("a", number, 6000).await.unwrap();
            }
        }
        let other = CreateImage::Replayed(Made { id: "a".to_owned(), number: 1 });
        assert_eq!(store.create_image(&new_image("a"), Some(create)).await.unwrap(), other);
        assert_eq!(store.create_version(&next("c"), None).await.unwrap(), CreateVersion::Created { number: 3 });
        store.build_succeeded("a", 3, "c", BuildBytes::default(), "UPDATED", 7000).await.unwrap();
        store.begin_version_delete("a", 2, 8000).await.unwrap();
        store.finish_version_delete("a", 2, 8000).await.unwrap();
        assert_eq!(store.create_version(&next("d"), Some(update)).await.unwrap(), CreateVersion::Created { number: 4 });
    }

    #[tokio::test]
    async fn the_latest_active_version_follows_status_and_deletion() {
        let (_dir, store) = built().await;
        store.create_version(&next("b"), None).await.unwrap();
        store.build_succeeded("a", 2, "b", BuildBytes::default(), "UPDATED", 5000).await.unwrap();
        assert_eq!(store.begin_status_change("a", 2, "INACTIVE", 6000).await.unwrap(), ChangeVersion::Started);
        assert_eq!(latest(&store).await, ("UPDATING".to_owned(), Some(1), None));
        let busy = ChangeVersion::Busy { state: "UPDATING".to_owned() };
        assert_eq!(store.begin_status_change("a", 2, "ACTIVE", 6000).await.unwrap(), busy);
        assert_eq!(store.begin_version_delete("a", 1, 6000).await.unwrap(), busy);
        store.image_updated("a", 6000).await.unwrap();
        assert_eq!(store.begin_version_delete("a", 1, 7000).await.unwrap(), ChangeVersion::Started);
        store.finish_version_delete("a", 1, 7000).await.unwrap();
        assert_eq!(latest(&store).await, ("UPDATED".to_owned(), None, None));
        assert_eq!(store.begin_version_delete("a", 1, 7000).await.unwrap(), ChangeVersion::Gone);
        assert!(!store.is_version_needed("a", 1).await.unwrap() && store.is_version_needed("a", 2).await.unwrap());
    }

    #[tokio::test]
    async fn begin_image_delete_while_a_build_runs_outlives_the_build() {
        let (_dir, store) = store().await;
        for (id, fails) in [("a", true), ("b", false)] {
            store.create_image(&new_image(id), None).await.unwrap();
            assert_eq!(store.begin_image_delete(id, 2000).await.unwrap(), DeleteImage::Started);
            if fails {
                store.build_failed(id, 1, id, "stopped", BuildBytes::default(), "CREATE_FAILED", 3000).await.unwrap();
            } else {
                store.build_succeeded(id, 1, id, BuildBytes::default(), "CREATED", 3000).await.unwrap();
            }
            assert_eq!(store.image_by_id(id).await.unwrap().unwrap().state, "DELETING");
        }
    }

    #[tokio::test]
    async fn what_was_not_built_is_not_activated() {
        let (_dir, store) = store().await;
        store.create_image(&new_image("a"), None).await.unwrap();
        store.build_failed("a", 1, "a", "bad", BuildBytes::default(), "CREATE_FAILED", 3000).await.unwrap();
        let refused = ChangeVersion::NotBuilt { state: "FAILED".to_owned() };
        assert_eq!(store.begin_status_change("a", 1, "ACTIVE", 4000).await.unwrap(), refused);
    }

    #[tokio::test]
    async fn tags_are_merged_and_counted() {
        let (_dir, store) = built().await;
        assert!(store.change_image_tags("a", r#"{"k": "v", "l": "w"}"#, 2).await.unwrap());
        assert!(!store.change_image_tags("a", r#"{"m": "x"}"#, 2).await.unwrap());
        assert!(store.change_image_tags("a", r#"{"k": null, "m": "x"}"#, 2).await.unwrap());
        assert_eq!(store.image_by_id("a").await.unwrap().unwrap().tags, r#"{"l":"w","m":"x"}"#);
    }

    #[tokio::test]
    async fn a_scope_has_only_so_many_images() {
        let (_dir, store) = store().await;
        let limited = |name| NewImage { limit: 1, ..new_image(name) };
        assert_eq!(store.create_image(&limited("a"), None).await.unwrap(), CreateImage::Created);
        assert_eq!(store.create_image(&limited("b"), None).await.unwrap(), CreateImage::LimitReached);
        assert!(store.image_by_id("b").await.unwrap().is_none());
        assert_eq!(store.create_image(&limited("a"), None).await.unwrap(), CreateImage::NameTaken);
    }
}
