//! The server's principals: those of the configuration, and those that `hearth iam` makes, kept in `keys/iam.json`. Also the routes for the latter,
//! on the administrator's socket only.
//!
//! | route | answer |
//! |---|---|
//! | `GET users`, `GET roles` | what there is, without secrets |
//! | `POST users` `{account, name, policy, administrator}` | `{arn, accessKeyId, secretAccessKey}` |
//! | `POST users/<account>/<name>/keys` | another key pair |
//! | `POST roles` `{account, name, trust, policy}` | `{arn}` |
//! | `DELETE users/<account>/<name>`, `DELETE keys/<id>`, `DELETE roles/<account>/<name>` | nothing |
//!
//! An account that is `-` is the server's default one.

use std::{fs, io, path::Path, sync::Arc, time::SystemTime};

use anyhow::Context as _;
use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use hearth_identity::{
    Account, Book, ChangeError, CredentialError, Directory, Key, Policy, PolicyError, Request, Role, Sealer, TrustPolicy, User,
    configured_id,
};
use hearth_objects::{Principals, Refused};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    config::{AccountConfig, ServeConfig},
    credentials::Credentials,
    data_dir::{DataDir, write_secret},
};

/// Reads the principals of a server whose administrator has these keys.
pub fn directory(config: &ServeConfig, dir: &DataDir, administrator: &[Credentials]) -> anyhow::Result<Directory> {
    let keys = administrator.iter().map(key).collect();
    let roots = vec![Account { id: config.account.clone(), keys }];
    let path = dir.keys().join("iam.json");
    let kept = read(&path)?;
    let kept: Book = match kept {
        Some(text) => serde_json::from_slice(&text).with_context(|| format!("reading the principals in {}", path.display()))?,
        None => Book::default(),
    };
    let sealer = sealer(&dir.keys().join("session.key"))?;
    let save = Box::new(move |book: &Book| write_secret(&path, &serde_json::to_vec_pretty(book)?));
    Directory::new(roots, configured(&config.accounts)?, kept, sealer, save).context("the principals contradict each other")
}

/// The users and roles of the configuration.
pub fn configured(accounts: &[AccountConfig]) -> Result<Book, PolicyError> {
    let mut book = Book::default();
    for account in accounts {
        for user in &account.users {
            book.users.push(User {
                account: account.id.clone(),
                name: user.name.clone(),
                id: configured_id("AIDA", &account.id, &user.name),
                administrator: user.administrator,
                policy: user.policy.as_deref().map(Policy::parse).transpose()?,
                keys: user.keys.iter().map(key).collect(),
            });
        }
        for role in &account.roles {
            book.roles.push(Role {
                account: account.id.clone(),
                name: role.name.clone(),
                id: configured_id("AROA", &account.id, &role.name),
                trust: TrustPolicy::parse(&role.trust)?,
                policy: Policy::parse(&role.policy)?,
            });
        }
    }
    Ok(book)
}

fn key(pair: &Credentials) -> Key {
    Key { access_key_id: pair.access_key_id.clone(), secret_access_key: pair.secret_access_key.clone() }
}

/// The key behind temporary credentials, made at the first start.
fn sealer(path: &Path) -> anyhow::Result<Sealer> {
    let key = match read(path)? {
        Some(key) => key.try_into().map_err(|_| {
            anyhow::anyhow!(
                "{} is not a key of {} bytes; delete it to have a new one made (sessions end)",
                path.display(),
                Sealer::KEY_LENGTH
            )
        })?,
        None => {
            let key = Sealer::random_key().context("the system gave no random numbers for a new key")?;
            write_secret(path, &key).with_context(|| format!("writing {}", path.display()))?;
            key
        }
    };
    Ok(Sealer::new(&key))
}

fn read(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// The directory, as the embedded S3 asks it.
pub struct ObjectPrincipals(pub Arc<Directory>);

impl Principals for ObjectPrincipals {
    fn secret(&self, access_key_id: &str) -> Option<String> {
        self.0.secret(access_key_id)
    }

    fn account(&self, access_key_id: &str, token: Option<&str>) -> Result<String, Refused> {
        let principal = self.0.identify(access_key_id, token, SystemTime::now()).map_err(refused)?;
        Ok(principal.account.clone())
    }

    fn allow(&self, access_key_id: &str, token: Option<&str>, action: &str, resource: &str) -> Result<(), Refused> {
        let principal = self.0.identify(access_key_id, token, SystemTime::now()).map_err(refused)?;
        let context = principal.context();
        let asked = principal.authorize(Request { action, resource, context: &context });
        asked.map_err(|denied| Refused::Denied(denied.to_string()))
    }
}

fn refused(error: CredentialError) -> Refused {
    match error {
        CredentialError::Unknown => Refused::Unknown,
        CredentialError::Expired => Refused::Expired,
    }
}

#[derive(Clone)]
struct Iam {
    directory: Arc<Directory>,
    default_account: String,
}

/// The routes.
pub fn router(directory: Arc<Directory>, default_account: String) -> Router {
    Router::new()
        .route("/hearth/v1/iam/users", get(list_users).post(create_user))
        .route("/hearth/v1/iam/users/{account}/{name}", delete(delete_user))
        .route("/hearth/v1/iam/users/{account}/{name}/keys", post(create_key))
        .route("/hearth/v1/iam/keys/{id}", delete(delete_key))
        .route("/hearth/v1/iam/roles", get(list_roles).post(create_role))
        .route("/hearth/v1/iam/roles/{account}/{name}", delete(delete_role))
        .with_state(Iam { directory, default_account })
}

/// A call that cannot be answered.
#[derive(Debug, thiserror::Error)]
enum IamError {
    /// the directory refuses
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// a document is not a policy
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// the change was cut off
    #[error("the change was not made: {0}")]
    Cut(#[from] tokio::task::JoinError),
}

impl IntoResponse for IamError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Policy(_) | Self::Change(ChangeError::Name(_)) => StatusCode::BAD_REQUEST,
            Self::Change(ChangeError::NotFound(_)) => StatusCode::NOT_FOUND,
            Self::Change(ChangeError::Exists(_) | ChangeError::Configured(_) | ChangeError::TooManyKeys(_)) => StatusCode::CONFLICT,
            Self::Change(ChangeError::Random | ChangeError::Save(_)) | Self::Cut(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(json!({"message": self.to_string()}))).into_response()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewUser {
    account: String,
    name: String,
    policy: Option<Value>,
    administrator: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRole {
    account: String,
    name: String,
    trust: Value,
    policy: Value,
}

impl Iam {
    fn account(&self, named: String) -> String {
        if named == "-" { self.default_account.clone() } else { named }
    }

    /// Changes wait for the disk.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Directory) -> Result<T, ChangeError> + Send + 'static,
    ) -> Result<T, IamError> {
        let directory = Arc::clone(&self.directory);
        Ok(tokio::task::spawn_blocking(move || change(&directory)).await??)
    }
}

async fn list_users(State(iam): State<Iam>) -> Json<Value> {
    let users = iam.directory.users().into_iter().map(|known| {
        let user = known.record;
        let keys: Vec<&String> = user.keys.iter().map(|key| &key.access_key_id).collect();
        json!({
            "arn": user.arn(), "account": user.account, "name": user.name, "administrator": user.administrator, "policy": user.policy,
            "accessKeyIds": keys, "configured": known.configured,
        })
    });
    Json(users.collect())
}

async fn create_user(State(iam): State<Iam>, Json(new): Json<NewUser>) -> Result<Json<Value>, IamError> {
    let account = iam.account(new.account);
    let policy = new.policy.map(Policy::try_from).transpose()?;
    let user = iam.change(move |directory| directory.create_user(&account, &new.name, policy, new.administrator)).await?;
    Ok(Json(match user.keys.first() {
        Some(key) => pair(&user.arn(), key),
        None => json!({"arn": user.arn()}),
    }))
}

async fn delete_user(State(iam): State<Iam>, UrlPath((account, name)): UrlPath<(String, String)>) -> Result<StatusCode, IamError> {
    let account = iam.account(account);
    iam.change(move |directory| directory.delete_user(&account, &name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn create_key(State(iam): State<Iam>, UrlPath((account, name)): UrlPath<(String, String)>) -> Result<Json<Value>, IamError> {
    let account = iam.account(account);
    let arn = format!("arn:aws:iam::{account}:user/{name}");
    let key = iam.change(move |directory| directory.create_key(&account, &name)).await?;
    Ok(Json(pair(&arn, &key)))
}

async fn delete_key(State(iam): State<Iam>, UrlPath(id): UrlPath<String>) -> Result<StatusCode, IamError> {
    iam.change(move |directory| directory.delete_key(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list_roles(State(iam): State<Iam>) -> Json<Value> {
    let roles = iam.directory.roles().into_iter().map(|known| {
        let role = known.record;
        json!({
            "arn": role.arn(), "account": role.account, "name": role.name, "trust": role.trust, "policy": role.policy,
            "configured": known.configured,
        })
    });
    Json(roles.collect())
}

async fn create_role(State(iam): State<Iam>, Json(new): Json<NewRole>) -> Result<Json<Value>, IamError> {
    let account = iam.account(new.account);
    let (trust, policy) = (TrustPolicy::try_from(new.trust)?, Policy::try_from(new.policy)?);
    let role = iam.change(move |directory| directory.create_role(&account, &new.name, trust, policy)).await?;
    Ok(Json(json!({"arn": role.arn()})))
}

async fn delete_role(State(iam): State<Iam>, UrlPath((account, name)): UrlPath<(String, String)>) -> Result<StatusCode, IamError> {
    let account = iam.account(account);
    iam.change(move |directory| directory.delete_role(&account, &name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn pair(arn: &str, key: &Key) -> Value {
    json!({"arn": arn, "accessKeyId": key.access_key_id, "secretAccessKey": key.secret_access_key})
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_made_outlives_a_restart_and_is_private() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        dir.prepare().unwrap();
        let config = ServeConfig::default();
        let first = directory(&config, &dir, &[]).unwrap();
        let user = first.create_user(&config.account, "ann", None, true).unwrap();
        let trust = r#"{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"}}"#;
        let allow = r#"{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}"#;
        first.create_role(&config.account, "worker", TrustPolicy::parse(trust).unwrap(), Policy::parse(allow).unwrap()).unwrap();
        let ask = hearth_identity::AssumeRole {
            role_arn: "arn:aws:iam::000000000000:role/worker",
            session_name: "one",
            duration: std::time::Duration::from_secs(900),
            external_id: None,
            policy: None,
        };
        let now = SystemTime::now();
        let caller = first.identify(&user.keys[0].access_key_id, None, now).unwrap();
        let session = first.assume_role(&caller, ask, now).unwrap();

        let second = directory(&config, &dir, &[]).unwrap();
        assert_eq!(second.identify(&user.keys[0].access_key_id, None, now).unwrap().arn, user.arn());
        let session_again = second.identify(&session.access_key_id, Some(&session.session_token), now).unwrap();
        assert_eq!(session_again.arn, "arn:aws:sts::000000000000:assumed-role/worker/one");
        for name in ["iam.json", "session.key"] {
            assert_eq!(fs::metadata(dir.keys().join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn damaged_files_are_named_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        dir.prepare().unwrap();
        for name in ["iam.json", "session.key"] {
            let path = dir.keys().join(name);
            fs::write(&path, "{").unwrap();
            let error = format!("{:#}", directory(&ServeConfig::default(), &dir, &[]).unwrap_err());
            assert!(error.contains(name), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"{");
            fs::remove_file(path).unwrap();
        }
    }
}
