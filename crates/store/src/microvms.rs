//! MicroVMs.

use sqlx::{FromRow, SqliteConnection};

use crate::{
    ClientToken, Keyset, Made, Scope, Store, StoreError, connectors,
    tokens::{self, Seen},
};

/// A row of `microvms`.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct MicrovmRow {
    pub seq: i64,
    /// `microvm-<uuid>`.
    pub id: String,
    pub account: String,
    pub region: String,
    /// UUID; the image may be gone.
    pub image_id: String,
    pub image_name: String,
    /// Number of the image's version.
    pub number: i64,
    pub state: String,
    pub state_reason: Option<String>,
    /// Host name.
    pub endpoint: String,
    /// JSON object: what the caller asked for.
    pub spec: String,
    /// What it counts for in the memory quota, in MiB.
    pub memory_mib: i64,
    /// Launches and resumes so far.
    pub generation: i64,
    pub started_ms: i64,
    pub suspended_ms: Option<i64>,
    /// Who suspended it.
    pub suspended_by: Option<String>,
    pub terminated_ms: Option<i64>,
}

/// A MicroVM to be recorded in state `PENDING`.
#[derive(Debug, Clone)]
pub struct NewMicrovm<'a> {
    pub scope: Scope<'a>,
    pub id: &'a str,
    pub image_id: &'a str,
    pub image_name: &'a str,
    pub number: i64,
    pub endpoint: &'a str,
    pub spec: &'a str,
    pub memory_mib: u32,
    /// Id of the user's connector that it is launched with.
    pub connector: Option<&'a str>,
    /// Nothing is recorded when the scope's MicroVMs and running builds have this much memory already, in MiB.
    pub memory_limit_mib: u64,
    pub now_ms: i64,
}

/// What became of a [`NewMicrovm`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateMicrovm {
    Created,
    /// The token made this MicroVM before, with the same parameters.
    Replayed(Made),
    /// The token was used with other parameters.
    TokenReused,
    /// The scope has as much memory as it may.
    LimitReached,
    /// The connector is deleted.
    NoConnector,
    /// The version is not `ACTIVE`, or its image is being deleted.
    NoActiveVersion,
}

/// Everything about a MicroVM that changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicrovmChange {
    pub state: String,
    pub state_reason: Option<String>,
    pub generation: i64,
    pub suspended_ms: Option<i64>,
    pub suspended_by: Option<String>,
    pub terminated_ms: Option<i64>,
}

impl Store {
    /// Records a MicroVM in state `PENDING`, generation 1.
    pub async fn create_microvm(&self, vm: &NewMicrovm<'_>, token: Option<ClientToken<'_>>) -> Result<CreateMicrovm, StoreError> {
        let failed = self.failed("recording a new MicroVM");
        let mut tx = self.begin().await?;
        if let Some(token) = token {
            match tokens::look_up(&mut tx, vm.scope, token).await.map_err(&failed)? {
                Seen::Never => {}
                Seen::Same(made) => return Ok(CreateMicrovm::Replayed(made)),
                Seen::Different => return Ok(CreateMicrovm::TokenReused),
            }
        }
        if allocated_mib(&mut tx, vm.scope).await.map_err(&failed)? >= i64::try_from(vm.memory_limit_mib).unwrap_or(i64::MAX) {
            return Ok(CreateMicrovm::LimitReached);
        }
        if let Some(connector) = vm.connector
            && !connectors::exists(&mut tx, connector).await.map_err(&failed)?
        {
            return Ok(CreateMicrovm::NoConnector);
        }
        let inserted = sqlx::query(
            "INSERT INTO microvms (id, account, region, image_id, image_name, number, state, endpoint, spec, memory_mib, generation, started_ms)
             SELECT ?1, ?2, ?3, ?4, ?5, ?6, 'PENDING', ?7, ?8, ?9, 1, ?10
             FROM versions JOIN images ON images.id = versions.image_id
             WHERE versions.image_id = ?4 AND versions.number = ?6 AND versions.status = 'ACTIVE' AND images.state <> 'DELETING'",
        )
        .bind(vm.id)
        .bind(vm.scope.account)
        .bind(vm.scope.region)
        .bind(vm.image_id)
        .bind(vm.image_name)
        .bind(vm.number)
        .bind(vm.endpoint)
        .bind(vm.spec)
        .bind(vm.memory_mib)
        .bind(vm.now_ms)
        .execute(&mut *tx)
        .await
        .map_err(&failed)?;
        if inserted.rows_affected() == 0 {
            return Ok(CreateMicrovm::NoActiveVersion);
        }
        if let Some(token) = token {
            tokens::remember(&mut tx, vm.scope, token, vm.id, 1).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(CreateMicrovm::Created)
    }

    /// What a token that was used before says about a new MicroVM; nothing for a new token.
    pub async fn replay_microvm(&self, scope: Scope<'_>, token: ClientToken<'_>) -> Result<Option<CreateMicrovm>, StoreError> {
        let failed = self.failed("looking up a client token");
        let mut connection = self.readers.acquire().await.map_err(&failed)?;
        Ok(match tokens::look_up(&mut connection, scope, token).await.map_err(&failed)? {
            Seen::Never => None,
            Seen::Same(made) => Some(CreateMicrovm::Replayed(made)),
            Seen::Different => Some(CreateMicrovm::TokenReused),
        })
    }

    pub async fn save_microvm(&self, id: &str, change: &MicrovmChange) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE microvms SET state = ?2, state_reason = ?3, generation = ?4, suspended_ms = ?5, suspended_by = ?6, terminated_ms = ?7
             WHERE id = ?1",
        )
        .bind(id)
        .bind(&change.state)
        .bind(&change.state_reason)
        .bind(change.generation)
        .bind(change.suspended_ms)
        .bind(&change.suspended_by)
        .bind(change.terminated_ms)
        .execute(&self.writer)
        .await
        .map_err(self.failed("recording a MicroVM's state"))?;
        Ok(())
    }

    pub async fn microvm(&self, id: &str) -> Result<Option<MicrovmRow>, StoreError> {
        sqlx::query_as("SELECT * FROM microvms WHERE id = ?1")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading a MicroVM"))
    }

    /// MicroVMs of a scope, of one image name and one version if given.
    pub async fn list_microvms(
        &self,
        scope: Scope<'_>,
        image_name: Option<&str>,
        number: Option<i64>,
        keys: Keyset,
    ) -> Result<Vec<MicrovmRow>, StoreError> {
        sqlx::query_as(
            "SELECT * FROM microvms WHERE account = ?1 AND region = ?2 AND seq < ?3
             AND (?4 IS NULL OR image_name = ?4) AND (?5 IS NULL OR number = ?5) ORDER BY seq DESC LIMIT ?6",
        )
        .bind(scope.account)
        .bind(scope.region)
        .bind(keys.before.unwrap_or(i64::MAX))
        .bind(image_name)
        .bind(number)
        .bind(keys.limit)
        .fetch_all(&self.readers)
        .await
        .map_err(self.failed("listing MicroVMs"))
    }

    /// Every MicroVM of every account, oldest first.
    pub async fn all_microvms(&self) -> Result<Vec<MicrovmRow>, StoreError> {
        sqlx::query_as("SELECT * FROM microvms ORDER BY seq").fetch_all(&self.readers).await.map_err(self.failed("listing all MicroVMs"))
    }

    /// When the MicroVM that has been terminated for longest was terminated.
    pub async fn oldest_termination(&self) -> Result<Option<i64>, StoreError> {
        let (oldest,): (Option<i64>,) = sqlx::query_as("SELECT min(terminated_ms) FROM microvms")
            .fetch_one(&self.readers)
            .await
            .map_err(self.failed("looking for terminated MicroVMs"))?;
        Ok(oldest)
    }

    /// MicroVMs that were terminated at `until_ms` or before.
    pub async fn terminated_until(&self, until_ms: i64) -> Result<Vec<MicrovmRow>, StoreError> {
        sqlx::query_as("SELECT * FROM microvms WHERE terminated_ms <= ?1 ORDER BY terminated_ms LIMIT 1000")
            .bind(until_ms)
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing terminated MicroVMs"))
    }

    /// Forgets a MicroVM and its token.
    pub async fn delete_microvm(&self, id: &str) -> Result<(), StoreError> {
        let failed = self.failed("removing a MicroVM");
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM microvms WHERE id = ?1").bind(id).execute(&mut *tx).await.map_err(&failed)?;
        tokens::free(&mut tx, id).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)
    }
}

/// Memory of a scope's MicroVMs that are not terminated and of its builds that run, in MiB.
async fn allocated_mib(connection: &mut SqliteConnection, scope: Scope<'_>) -> sqlx::Result<i64> {
    let (allocated,) = sqlx::query_as(
        "SELECT (SELECT coalesce(sum(memory_mib), 0) FROM microvms WHERE account = ?1 AND region = ?2 AND state <> 'TERMINATED')
         + (SELECT coalesce(sum(json_extract(versions.spec, '$.memory_mib')), 0)
            FROM versions JOIN images ON images.id = versions.image_id
            WHERE images.account = ?1 AND images.region = ?2 AND versions.state = 'IN_PROGRESS')",
    )
    .bind(scope.account)
    .bind(scope.region)
    .fetch_one(connection)
    .await?;
    Ok(allocated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{
        BuildBytes, DeleteImage,
        tests::{SCOPE, new_image},
    };

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("hearth.db")).await.unwrap();
        store.create_image(&new_image("image"), None).await.unwrap();
        (dir, store)
    }

    async fn built() -> (tempfile::TempDir, Store) {
        let (dir, store) = store().await;
        store.build_succeeded("image", 1, "image", BuildBytes::default(), "CREATED", 2).await.unwrap();
        (dir, store)
    }

    fn new_vm(id: &str) -> NewMicrovm<'_> {
        NewMicrovm {
            scope: SCOPE,
            id,
            image_id: "image",
            image_name: "image",
            number: 1,
            endpoint: id,
            spec: "{}",
            memory_mib: 512,
            connector: None,
            memory_limit_mib: 1 << 20,
            now_ms: 5,
        }
    }

    fn terminated(at: i64) -> MicrovmChange {
        MicrovmChange {
            state: "TERMINATED".to_owned(),
            state_reason: Some("Success.".to_owned()),
            generation: 1,
            suspended_ms: None,
            suspended_by: None,
            terminated_ms: Some(at),
        }
    }

    #[tokio::test]
    async fn nothing_is_launched_from_a_version_that_is_not_active() {
        let (_dir, store) = store().await;
        assert_eq!(store.create_microvm(&new_vm("a"), None).await.unwrap(), CreateMicrovm::NoActiveVersion);
        store.build_succeeded("image", 1, "image", BuildBytes::default(), "CREATED", 2).await.unwrap();
        assert_eq!(store.create_microvm(&new_vm("a"), None).await.unwrap(), CreateMicrovm::Created);
    }

    #[tokio::test]
    async fn an_image_with_live_microvms_is_not_deleted_and_a_deleted_one_launches_nothing() {
        let (_dir, store) = built().await;
        store.create_microvm(&new_vm("a"), None).await.unwrap();
        assert_eq!(store.begin_image_delete("image", 3).await.unwrap(), DeleteImage::InUse);
        store.save_microvm("a", &terminated(9)).await.unwrap();
        assert_eq!(store.begin_image_delete("image", 3).await.unwrap(), DeleteImage::Started);
        assert_eq!(store.create_microvm(&new_vm("b"), None).await.unwrap(), CreateMicrovm::NoActiveVersion);
        store.finish_image_delete("image").await.unwrap();
        assert!(store.microvm("a").await.unwrap().is_some(), "terminated MicroVMs stay listed");
    }

    #[tokio::test]
    async fn pages_do_not_shift_when_rows_come_and_go() {
        let (_dir, store) = built().await;
        for id in ["a", "b", "c", "d", "e"] {
            store.create_microvm(&new_vm(id), None).await.unwrap();
        }
        let first = store.list_microvms(SCOPE, None, None, Keyset { before: None, limit: 2 }).await.unwrap();
        assert_eq!(first.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["e", "d"]);
        store.create_microvm(&new_vm("f"), None).await.unwrap();
        store.delete_microvm("d").await.unwrap();
        store.delete_microvm("c").await.unwrap();
        let rest = store.list_microvms(SCOPE, None, None, Keyset { before: Some(first[1].seq), limit: 50 }).await.unwrap();
        assert_eq!(rest.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    }

    #[tokio::test]
    async fn the_oldest_terminated_is_swept_first() {
        let (_dir, store) = built().await;
        for (id, at) in [("a", 30), ("b", 10)] {
            store.create_microvm(&new_vm(id), None).await.unwrap();
            store.save_microvm(id, &terminated(at)).await.unwrap();
        }
        assert_eq!(store.oldest_termination().await.unwrap(), Some(10));
        assert_eq!(store.terminated_until(20).await.unwrap().len(), 1);
        store.delete_microvm("b").await.unwrap();
        assert_eq!(store.oldest_termination().await.unwrap(), Some(30));
    }

    #[tokio::test]
    async fn a_token_is_freed_with_its_microvm() {
        let (_dir, store) = built().await;
        let token = ClientToken { operation: "run", token: "t", fingerprint: "f" };
        store.create_microvm(&new_vm("a"), Some(token)).await.unwrap();
        let replayed = CreateMicrovm::Replayed(Made { id: "a".to_owned(), number: 1 });
        assert_eq!(store.create_microvm(&new_vm("b"), Some(token)).await.unwrap(), replayed);
        store.delete_microvm("a").await.unwrap();
        assert_eq!(store.create_microvm(&new_vm("b"), Some(token)).await.unwrap(), CreateMicrovm::Created);
    }
    #[tokio::test]
    async fn memory_is_counted_until_the_termination() {
        let (_dir, store) = built().await;
        let limited = |id| NewMicrovm { memory_limit_mib: 1000, ..new_vm(id) };
        assert_eq!(store.create_microvm(&limited("a"), None).await.unwrap(), CreateMicrovm::Created);
        assert_eq!(store.create_microvm(&limited("b"), None).await.unwrap(), CreateMicrovm::Created, "512 of 1000 MiB are not all");
        assert_eq!(store.create_microvm(&limited("c"), None).await.unwrap(), CreateMicrovm::LimitReached);
        let elsewhere = Scope { region: "eu-west-1", ..SCOPE };
        let elsewhere = store.create_microvm(&NewMicrovm { scope: elsewhere, ..limited("d") }, None).await.unwrap();
        assert_eq!(elsewhere, CreateMicrovm::Created, "each scope has its own");
        store.save_microvm("a", &terminated(9)).await.unwrap();
        assert_eq!(store.create_microvm(&limited("c"), None).await.unwrap(), CreateMicrovm::Created);
    }
}
