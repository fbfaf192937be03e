//! Idempotency tokens: which resource a token made, and with which parameters. A token is freed with its resource.

use sqlx::SqliteConnection;

use crate::Scope;

/// A caller's idempotency token.
#[derive(Debug, Clone, Copy)]
pub struct ClientToken<'a> {
    /// What the token is for; the same token may be used for different operations.
    pub operation: &'a str,
    /// As the caller sent it.
    pub token: &'a str,
    /// Digest of the parameters.
    pub fingerprint: &'a str,
}

/// What a token says about a request.
pub(crate) enum Seen {
    Never,
    /// Same parameters: the resource that it made.
    Same(Made),
    /// Other parameters.
    Different,
}

/// What a token made.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Made {
    /// The resource's id.
    #[sqlx(rename = "resource_id")]
    pub id: String,
    /// The resource's version, 1 for resources without versions.
    pub number: i64,
}

#[derive(sqlx::FromRow)]
struct Row {
    fingerprint: String,
    #[sqlx(flatten)]
    made: Made,
}

pub(crate) async fn look_up(connection: &mut SqliteConnection, scope: Scope<'_>, token: ClientToken<'_>) -> sqlx::Result<Seen> {
    let row: Option<Row> = sqlx::query_as(
        "SELECT fingerprint, resource_id, number FROM client_tokens
         WHERE account = ?1 AND region = ?2 AND operation = ?3 AND token = ?4",
    )
    .bind(scope.account)
    .bind(scope.region)
    .bind(token.operation)
    .bind(token.token)
    .fetch_optional(connection)
    .await?;
    Ok(match row {
        None => Seen::Never,
        Some(row) if row.fingerprint == token.fingerprint => Seen::Same(row.made),
        Some(_) => Seen::Different,
    })
}

/// `number` is the version that the token made, 1 for resources without versions.
pub(crate) async fn remember(
    connection: &mut SqliteConnection,
    scope: Scope<'_>,
    token: ClientToken<'_>,
    resource_id: &str,
    number: i64,
) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO client_tokens (account, region, operation, token, fingerprint, resource_id, number)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )
    .bind(scope.account)
    .bind(scope.region)
    .bind(token.operation)
    .bind(token.token)
    .bind(token.fingerprint)
    .bind(resource_id)
    .bind(number)
    .execute(connection)
    .await?;
    Ok(())
}

/// Frees the tokens of a resource.
pub(crate) async fn free(connection: &mut SqliteConnection, resource_id: &str) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM client_tokens WHERE resource_id = ?1").bind(resource_id).execute(connection).await?;
    Ok(())
}

/// Frees the tokens of one version of a resource. The token that made the resource itself stays with that.
pub(crate) async fn free_version(connection: &mut SqliteConnection, resource_id: &str, number: i64) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM client_tokens WHERE resource_id = ?1 AND number = ?2 AND operation LIKE 'Update%'")
        .bind(resource_id)
        .bind(number)
        .execute(connection)
        .await?;
    Ok(())
}
