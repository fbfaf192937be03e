//! Logins of registries, as Docker's `config.json` has them.

use std::{
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::BuildError;

/// A login that is good for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// `host` or `host:port`.
    pub registry: String,
    /// User name.
    pub user: String,
    /// Password or token.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("registry", &self.registry).field("user", &self.user).finish_non_exhaustive()
    }
}

/// Who may know a login for a registry.
#[async_trait]
pub trait Logins: std::fmt::Debug + Send + Sync {
    /// A login for a registry that a Dockerfile names (`host` or `host:port`), if there is one.
    async fn login(&self, registry: &str) -> Result<Option<Login>, LoginError>;
}

/// A login was not to be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LoginError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// The registries of images by their names, each once. Names without one are Docker Hub's.
pub(crate) fn registries(images: &[String]) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for image in images {
        let Some((registry, _)) = image.split_once('/') else { continue };
        let is_host = registry.contains(['.', ':']) || registry == "localhost";
        if is_host && !found.contains(&registry) {
            found.push(registry);
        }
    }
    found
}

/// The operator's file cannot be used.
#[derive(Debug, thiserror::Error)]
enum AuthFileError {
    #[error("reading the registry logins in {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the registry logins in {path} are not of the form of Docker's config.json: {source}")]
    Malformed { path: PathBuf, source: serde_json::Error },
}

/// Docker's `config.json` with the logins of the operator's file and further ones, which win. Credential helpers are left out: they are programs
/// of the host.
pub(crate) async fn auths(file: Option<&Path>, logins: &[Login]) -> Result<String, BuildError> {
    let mut auths = match file {
        Some(path) => read(path).await.map_err(|error| BuildError::Platform(Box::new(error)))?,
        None => json!({}),
    };
    for login in logins {
        auths[&login.registry] = json!({ "auth": STANDARD.encode(format!("{}:{}", login.user, login.password)) });
    }
    Ok(json!({ "auths": auths }).to_string())
}

async fn read(path: &Path) -> Result<Value, AuthFileError> {
    let text = tokio::fs::read(path).await.map_err(|source| AuthFileError::Read { path: path.to_owned(), source })?;
    let document: Value = serde_json::from_slice(&text).map_err(|source| AuthFileError::Malformed { path: path.to_owned(), source })?;
    Ok(document.get("auths").filter(|auths| auths.is_object()).cloned().unwrap_or_else(|| json!({})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_of_images_are_hosts() {
        let images = ["debian:12", "library/debian", "a.example/b/c:1", "a.example/d@sha256:0", "localhost/x", "localhost:5000/x"]
            .map(str::to_owned);
        assert_eq!(registries(&images), ["a.example", "localhost", "localhost:5000"]);
    }

    #[tokio::test]
    async fn auths_of_the_operator_and_of_the_role_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, r#"{"auths":{"a":{"auth":"eA=="},"b":{"auth":"eQ=="}},"credsStore":"desktop"}"#).unwrap();
        let login = Login { registry: "b".to_owned(), user: "AWS".to_owned(), password: "token".to_owned() };
        assert!(!format!("{login:?}").contains("token"));
        let auths: Value = serde_json::from_str(&auths(Some(&file), &[login]).await.unwrap()).unwrap();
        assert_eq!(auths, json!({"auths": {"a": {"auth": "eA=="}, "b": {"auth": STANDARD.encode("AWS:token")}}}));
    }

    #[tokio::test]
    async fn auths_of_a_broken_file_fail_the_build() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, "nothing").unwrap();
        assert!(auths(Some(&file), &[]).await.unwrap_err().to_string().contains("config.json"));
    }
}
