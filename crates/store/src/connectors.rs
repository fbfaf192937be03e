//! Network connectors and their versions.

use sqlx::{FromRow, SqliteConnection};

use crate::{
    ClientToken, Keyset, Made, Scope, Store, StoreError,
    tokens::{self, Seen},
};

/// A row of `connectors`, with the newest version's specification.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct ConnectorRow {
    pub seq: i64,
    /// `nc-<uuid>`.
    pub id: String,
    pub account: String,
    pub region: String,
    pub name: String,
    /// Number of the newest version.
    pub number: i64,
    /// What the last update came to; nothing before the first.
    pub update_status: Option<String>,
    pub update_reason: Option<String>,
    /// JSON object.
    pub tags: String,
    pub modified_ms: i64,
    /// JSON object.
    pub spec: String,
}

/// A row of `connector_versions`.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct ConnectorVersionRow {
    pub seq: i64,
    pub number: i64,
    /// JSON object.
    pub spec: String,
    pub created_ms: i64,
}

/// A connector to be made, with its first version.
#[derive(Debug, Clone)]
pub struct NewConnector<'a> {
    pub scope: Scope<'a>,
    /// `nc-<uuid>`.
    pub id: &'a str,
    pub name: &'a str,
    pub spec: &'a str,
    pub tags: &'a str,
    /// Connectors that the scope may have.
    pub limit: u32,
    pub now_ms: i64,
}

/// What became of a [`NewConnector`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateConnector {
    Created,
    /// The token made this connector before, with the same parameters.
    Replayed(Made),
    /// The token was used with other parameters.
    TokenReused,
    NameTaken,
    /// The scope has as many connectors as it may.
    LimitReached,
}

/// What became of a changed specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateConnector {
    /// There is a new version, or nothing to change.
    Updated,
    /// The token updated it before, with the same parameters.
    Replayed(Made),
    /// The token was used with other parameters.
    TokenReused,
    /// MicroVMs that are not terminated use it.
    InUse,
    Gone,
}

/// What became of the wish to delete a connector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteConnector {
    Deleted,
    /// MicroVMs that are not terminated use it.
    InUse,
    Gone,
}

impl Store {
    /// Records a connector with version 1.
    pub async fn create_connector(
        &self,
        connector: &NewConnector<'_>,
        token: Option<ClientToken<'_>>,
    ) -> Result<CreateConnector, StoreError> {
        let failed = self.failed("recording a new connector");
        let mut tx = self.begin().await?;
        if let Some(token) = token {
            match tokens::look_up(&mut tx, connector.scope, token).await.map_err(&failed)? {
                Seen::Never => {}
                Seen::Same(made) => return Ok(CreateConnector::Replayed(made)),
                Seen::Different => return Ok(CreateConnector::TokenReused),
            }
        }
        let inserted = sqlx::query(
            "INSERT INTO connectors (id, account, region, name, number, tags, modified_ms)
             VALUES (?1, ?2, ?3, ?4, 1, ?5, ?6) ON CONFLICT (account, region, name) DO NOTHING",
        )
        .bind(connector.id)
        .bind(connector.scope.account)
        .bind(connector.scope.region)
        .bind(connector.name)
        .bind(connector.tags)
        .bind(connector.now_ms)
        .execute(&mut *tx)
        .await
        .map_err(&failed)?;
        if inserted.rows_affected() == 0 {
            return Ok(CreateConnector::NameTaken);
        }
        let (connectors,): (i64,) = sqlx::query_as("SELECT count(*) FROM connectors WHERE account = ?1 AND region = ?2")
            .bind(connector.scope.account)
            .bind(connector.scope.region)
            .fetch_one(&mut *tx)
            .await
            .map_err(&failed)?;
        if connectors > i64::from(connector.limit) {
            return Ok(CreateConnector::LimitReached);
        }
        insert_version(&mut tx, connector.id, 1, connector.spec, connector.now_ms).await.map_err(&failed)?;
        if let Some(token) = token {
            tokens::remember(&mut tx, connector.scope, token, connector.id, 1).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(CreateConnector::Created)
    }

    /// The connector of this id or, if there is none, of this name.
    pub async fn connector(&self, scope: Scope<'_>, id_or_name: &str) -> Result<Option<ConnectorRow>, StoreError> {
        sqlx::query_as(
            "SELECT * FROM newest_connectors WHERE account = ?1 AND region = ?2 AND (id = ?3 OR name = ?3) ORDER BY id = ?3 DESC LIMIT 1",
        )
        .bind(scope.account)
        .bind(scope.region)
        .bind(id_or_name)
        .fetch_optional(&self.readers)
        .await
        .map_err(self.failed("reading a connector"))
    }

    pub async fn list_connectors(&self, scope: Scope<'_>, keys: Keyset) -> Result<Vec<ConnectorRow>, StoreError> {
        sqlx::query_as("SELECT * FROM newest_connectors WHERE account = ?1 AND region = ?2 AND seq < ?3 ORDER BY seq DESC LIMIT ?4")
            .bind(scope.account)
            .bind(scope.region)
            .bind(keys.before.unwrap_or(i64::MAX))
            .bind(keys.limit)
            .fetch_all(&self.readers)
            .await
            .map_err(self.failed("listing connectors"))
    }

    pub async fn connector_version(&self, id: &str, number: i64) -> Result<Option<ConnectorVersionRow>, StoreError> {
        sqlx::query_as("SELECT seq, number, spec, created_ms FROM connector_versions WHERE connector_id = ?1 AND number = ?2")
            .bind(id)
            .bind(number)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.failed("reading a connector's version"))
    }

    pub async fn list_connector_versions(&self, id: &str, keys: Keyset) -> Result<Vec<ConnectorVersionRow>, StoreError> {
        sqlx::query_as(
            "SELECT seq, number, spec, created_ms FROM connector_versions WHERE connector_id = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3",
        )
        .bind(id)
        .bind(keys.before.unwrap_or(i64::MAX))
        .bind(keys.limit)
        .fetch_all(&self.readers)
        .await
        .map_err(self.failed("listing a connector's versions"))
    }

    /// Gives a connector its next version if the specification is another one. `unchanged` is recorded as the reason if it is not.
    pub async fn update_connector(
        &self,
        id: &str,
        spec: &str,
        unchanged: &str,
        now_ms: i64,
        token: Option<ClientToken<'_>>,
    ) -> Result<UpdateConnector, StoreError> {
        let failed = self.failed("recording a connector's update");
        let mut tx = self.begin().await?;
        let Some(row) = newest(&mut tx, id).await.map_err(&failed)? else { return Ok(UpdateConnector::Gone) };
        let scope = Scope { account: &row.account, region: &row.region };
        if let Some(token) = token {
            match tokens::look_up(&mut tx, scope, token).await.map_err(&failed)? {
                Seen::Never => {}
                Seen::Same(made) => return Ok(UpdateConnector::Replayed(made)),
                Seen::Different => return Ok(UpdateConnector::TokenReused),
            }
        }
        if is_used(&mut tx, &row).await.map_err(&failed)? {
            return Ok(UpdateConnector::InUse);
        }
        let changed = row.spec != spec;
        let number = row.number + i64::from(changed);
        if changed {
            insert_version(&mut tx, id, number, spec, now_ms).await.map_err(&failed)?;
        }
        sqlx::query("UPDATE connectors SET number = ?2, update_status = 'Successful', update_reason = ?3, modified_ms = ?4 WHERE id = ?1")
            .bind(id)
            .bind(number)
            .bind(Some(unchanged).filter(|_| !changed))
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
        if let Some(token) = token {
            tokens::remember(&mut tx, scope, token, id, number).await.map_err(&failed)?;
        }
        tx.commit().await.map_err(&failed)?;
        Ok(UpdateConnector::Updated)
    }

    /// Forgets a connector, its versions and its tokens, unless a MicroVM uses it.
    pub async fn delete_connector(&self, id: &str) -> Result<DeleteConnector, StoreError> {
        let failed = self.failed("deleting a connector");
        let mut tx = self.begin().await?;
        let Some(row) = newest(&mut tx, id).await.map_err(&failed)? else { return Ok(DeleteConnector::Gone) };
        if is_used(&mut tx, &row).await.map_err(&failed)? {
            return Ok(DeleteConnector::InUse);
        }
        sqlx::query("DELETE FROM connectors WHERE id = ?1").bind(id).execute(&mut *tx).await.map_err(&failed)?;
        tokens::free(&mut tx, id).await.map_err(&failed)?;
        tx.commit().await.map_err(&failed)?;
        Ok(DeleteConnector::Deleted)
    }

    /// Merges a JSON object into a connector's tags; see [`Store::change_image_tags`].
    pub async fn change_connector_tags(&self, id: &str, changes: &str, limit: u32) -> Result<bool, StoreError> {
        let changed = sqlx::query(
            "UPDATE connectors SET tags = json_patch(tags, ?2)
             WHERE id = ?1 AND (SELECT count(*) FROM json_each(json_patch(tags, ?2))) <= ?3",
        )
        .bind(id)
        .bind(changes)
        .bind(limit)
        .execute(&self.writer)
        .await
        .map_err(self.failed("changing a connector's tags"))?;
        Ok(changed.rows_affected() == 1)
    }
}

async fn newest(connection: &mut SqliteConnection, id: &str) -> sqlx::Result<Option<ConnectorRow>> {
    sqlx::query_as("SELECT * FROM newest_connectors WHERE id = ?1").bind(id).fetch_optional(connection).await
}

pub(crate) async fn exists(connection: &mut SqliteConnection, id: &str) -> sqlx::Result<bool> {
    let (exists,) = sqlx::query_as("SELECT EXISTS (SELECT 1 FROM connectors WHERE id = ?1)").bind(id).fetch_one(connection).await?;
    Ok(exists)
}

/// Whether a MicroVM that is not terminated names the connector, with or without a version.
async fn is_used(connection: &mut SqliteConnection, row: &ConnectorRow) -> sqlx::Result<bool> {
    let (used,) = sqlx::query_as(
        "SELECT EXISTS (SELECT 1 FROM microvms, json_each(microvms.spec, '$.egress_network_connectors') AS connector
         WHERE account = ?1 AND region = ?2 AND state <> 'TERMINATED'
         AND connector.value || ':' LIKE '%:network-connector:' || ?3 || ':%')",
    )
    .bind(&row.account)
    .bind(&row.region)
    .bind(&row.id)
    .fetch_one(connection)
    .await?;
    Ok(used)
}

async fn insert_version(connection: &mut SqliteConnection, id: &str, number: i64, spec: &str, now_ms: i64) -> sqlx::Result<()> {
    sqlx::query("INSERT INTO connector_versions (connector_id, number, spec, created_ms) VALUES (?1, ?2, ?3, ?4)")
        .bind(id)
        .bind(number)
        .bind(spec)
        .bind(now_ms)
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BuildBytes, CreateMicrovm, MicrovmChange, NewMicrovm,
        images::tests::{SCOPE, new_image},
    };

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("hearth.db")).await.unwrap();
        (dir, store)
    }

    fn new_connector(id: &'static str) -> NewConnector<'static> {
        NewConnector { scope: SCOPE, id, name: id, spec: r#"{"a":1}"#, tags: "{}", limit: 2, now_ms: 1 }
    }

    #[tokio::test]
    async fn names_are_unique_and_ids_come_first() {
        let (_dir, store) = store().await;
        assert_eq!(store.create_connector(&new_connector("nc-1"), None).await.unwrap(), CreateConnector::Created);
        let named = NewConnector { id: "nc-2", ..new_connector("nc-1") };
        assert_eq!(store.create_connector(&named, None).await.unwrap(), CreateConnector::NameTaken);
        assert_eq!(store.create_connector(&new_connector("nc-2"), None).await.unwrap(), CreateConnector::Created);
        assert_eq!(store.create_connector(&new_connector("nc-3"), None).await.unwrap(), CreateConnector::LimitReached);
        assert_eq!(store.connector(SCOPE, "nc-1").await.unwrap().unwrap().id, "nc-1");
        let elsewhere = Scope { account: "111111111111", ..SCOPE };
        assert_eq!(store.connector(elsewhere, "nc-1").await.unwrap(), None);
        assert_eq!(store.list_connectors(SCOPE, Keyset { before: None, limit: 10 }).await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_changed_specification_is_a_new_version() {
        let (_dir, store) = store().await;
        store.create_connector(&new_connector("nc-1"), None).await.unwrap();
        let token = ClientToken { operation: "UpdateNetworkConnector", token: "t", fingerprint: "f" };
        assert_eq!(store.update_connector("nc-1", r#"{"a":1}"#, "same", 2, None).await.unwrap(), UpdateConnector::Updated);
        let row = store.connector(SCOPE, "nc-1").await.unwrap().unwrap();
        assert_eq!((row.number, row.update_reason.as_deref()), (1, Some("same")));
        assert_eq!(store.update_connector("nc-1", r#"{"a":2}"#, "same", 3, Some(token)).await.unwrap(), UpdateConnector::Updated);
        let replayed = UpdateConnector::Replayed(Made { id: "nc-1".to_owned(), number: 2 });
        assert_eq!(store.update_connector("nc-1", r#"{"a":2}"#, "same", 4, Some(token)).await.unwrap(), replayed);
        let row = store.connector(SCOPE, "nc-1").await.unwrap().unwrap();
        assert_eq!((row.number, row.update_reason, row.spec.as_str(), row.modified_ms), (2, None, r#"{"a":2}"#, 3));
        assert_eq!(store.connector_version("nc-1", 1).await.unwrap().unwrap().spec, r#"{"a":1}"#, "versions do not change");
        let versions = store.list_connector_versions("nc-1", Keyset { before: None, limit: 10 }).await.unwrap();
        assert_eq!(versions.iter().map(|version| version.number).collect::<Vec<_>>(), [2, 1]);
    }

    #[tokio::test]
    async fn a_connector_in_use_is_neither_changed_nor_deleted() {
        let (_dir, store) = store().await;
        for id in ["nc-1", "nc-11"] {
            store.create_connector(&new_connector(id), None).await.unwrap();
        }
        store.create_image(&new_image("image"), None).await.unwrap();
        store.build_succeeded("image", 1, "image", BuildBytes::default(), "CREATED", 2).await.unwrap();
        let vm = |id, connector| NewMicrovm {
            scope: SCOPE,
            id,
            image_id: "image",
            image_name: "image",
            number: 1,
            endpoint: id,
            spec: r#"{"egress_network_connectors":["arn:aws:lambda:us-east-1:000000000000:network-connector:nc-11:2"]}"#,
            memory_mib: 512,
            connector,
            memory_limit_mib: 1 << 20,
            now_ms: 5,
        };
        assert_eq!(store.create_microvm(&vm("a", Some("nc-0")), None).await.unwrap(), CreateMicrovm::NoConnector);
        assert_eq!(store.create_microvm(&vm("a", Some("nc-11")), None).await.unwrap(), CreateMicrovm::Created);
        assert_eq!(store.update_connector("nc-11", "{}", "same", 6, None).await.unwrap(), UpdateConnector::InUse);
        assert_eq!(store.delete_connector("nc-11").await.unwrap(), DeleteConnector::InUse);
        assert_eq!(store.delete_connector("nc-1").await.unwrap(), DeleteConnector::Deleted, "a prefix is another connector");
        let over = MicrovmChange {
            state: "TERMINATED".to_owned(),
            state_reason: None,
            generation: 1,
            suspended_ms: None,
            suspended_by: None,
            terminated_ms: Some(9),
        };
        store.save_microvm("a", &over).await.unwrap();
        assert_eq!(store.delete_connector("nc-11").await.unwrap(), DeleteConnector::Deleted);
        assert_eq!(store.delete_connector("nc-11").await.unwrap(), DeleteConnector::Gone);
    }
}
