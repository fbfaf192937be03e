//! `hearth iam`: users with their keys, and roles.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, Subcommand};
use hearth_identity::{Policy, TrustPolicy};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::env::quote;
use crate::client::Client;

/// The account that the server takes for its default one.
const DEFAULT: &str = "-";

#[derive(Debug, Subcommand)]
pub enum IamVerb {
    /// Make, list and remove users.
    #[command(subcommand)]
    User(UserVerb),
    /// Make and remove access keys.
    #[command(subcommand)]
    Key(KeyVerb),
    /// Make, list and remove roles.
    #[command(subcommand)]
    Role(RoleVerb),
    /// Check policy documents.
    #[command(subcommand)]
    Policy(PolicyVerb),
}

#[derive(Debug, Subcommand)]
pub enum UserVerb {
    /// Make a user and print a key pair for it, as `export` lines for `eval`. Without a policy it may do nothing.
    Create {
        #[command(flatten)]
        name: Name,
        /// What the user may do: a policy document in JSON.
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// Let the user do everything in the account.
        #[arg(long, conflicts_with = "policy")]
        admin: bool,
    },
    /// List users.
    Ls,
    /// Remove a user and its keys.
    Rm(Name),
}

#[derive(Debug, Subcommand)]
pub enum KeyVerb {
    /// Make another key pair for a user, and print it.
    Create(Name),
    /// Remove a key.
    Rm {
        /// Access key id.
        #[arg(value_name = "KEY")]
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum RoleVerb {
    /// Make a role and print its ARN.
    Create {
        #[command(flatten)]
        name: Name,
        /// Who may assume it: a trust policy in JSON. MicroVMs and builds need "Service": "lambda.amazonaws.com" in it.
        #[arg(long, value_name = "FILE")]
        trust: PathBuf,
        /// What its sessions may do: a policy document in JSON.
        #[arg(long, value_name = "FILE")]
        policy: PathBuf,
    },
    /// List roles.
    Ls,
    /// Remove a role; its sessions end.
    Rm(Name),
}

#[derive(Debug, Subcommand)]
pub enum PolicyVerb {
    /// Say whether a document is a policy that this server understands, and where not.
    Validate {
        /// The document, in JSON.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// It is a role's trust policy.
        #[arg(long)]
        trust: bool,
    },
}

#[derive(Debug, Args)]
pub struct Name {
    /// 1 to 64 letters, digits and _+=,.@-
    #[arg(value_name = "NAME")]
    name: String,
    /// Account, twelve digits [default: the server's].
    #[arg(long, value_name = "DIGITS")]
    account: Option<String>,
}

impl Name {
    fn account(&self) -> &str {
        self.account.as_deref().unwrap_or(DEFAULT)
    }

    fn path(&self, kind: &str) -> String {
        let encode = |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
        let account = if self.account() == DEFAULT { DEFAULT.to_owned() } else { encode(self.account()) };
        format!("/hearth/v1/iam/{kind}/{account}/{}", encode(&self.name))
    }
}

/// A key pair as the server answers it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    arn: String,
    access_key_id: String,
    secret_access_key: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct UserLine {
    arn: String,
    administrator: bool,
    policy: Option<Value>,
    access_key_ids: Vec<String>,
    configured: bool,
}

#[derive(Debug, Deserialize)]
struct RoleLine {
    arn: String,
    configured: bool,
}

/// Runs a verb that needs the server.
pub async fn run(client: Client, verb: IamVerb) -> anyhow::Result<ExitCode> {
    let text = match verb {
        IamVerb::User(UserVerb::Create { name, policy, admin }) => {
            let policy = policy.map(|path| document(&path)).transpose()?;
            let body = json!({"account": name.account(), "name": name.name, "policy": policy, "administrator": admin});
            exports(&client.call(Method::POST, "/hearth/v1/iam/users", Some(body)).await?)
        }
        IamVerb::User(UserVerb::Ls) => users(client.call(Method::GET, "/hearth/v1/iam/users", None).await?),
        IamVerb::User(UserVerb::Rm(name)) => removed(client.call(Method::DELETE, &name.path("users"), None).await?),
        IamVerb::Key(KeyVerb::Create(name)) => exports(&client.call(Method::POST, &format!("{}/keys", name.path("users")), None).await?),
        IamVerb::Key(KeyVerb::Rm { id }) => {
            let id = percent_encoding::utf8_percent_encode(&id, percent_encoding::NON_ALPHANUMERIC);
            removed(client.call(Method::DELETE, &format!("/hearth/v1/iam/keys/{id}"), None).await?)
        }
        IamVerb::Role(RoleVerb::Create { name, trust, policy }) => {
            let (trust, policy) = (document(&trust)?, document(&policy)?);
            let body = json!({"account": name.account(), "name": name.name, "trust": trust, "policy": policy});
            let made: Value = client.call(Method::POST, "/hearth/v1/iam/roles", Some(body)).await?;
            format!("{}\n", made["arn"].as_str().unwrap_or_default())
        }
        IamVerb::Role(RoleVerb::Ls) => roles(client.call(Method::GET, "/hearth/v1/iam/roles", None).await?),
        IamVerb::Role(RoleVerb::Rm(name)) => removed(client.call(Method::DELETE, &name.path("roles"), None).await?),
        IamVerb::Policy(PolicyVerb::Validate { file, trust }) => validate(&file, trust)?,
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn validate(file: &Path, trust: bool) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let read = if trust { TrustPolicy::parse(&text).map(drop) } else { Policy::parse(&text).map(drop) };
    read.with_context(|| format!("{} is not a {}", file.display(), if trust { "trust policy" } else { "policy" }))?;
    Ok(format!("{} is understood\n", file.display()))
}

fn document(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// A key pair for a shell. Whatever session the shell had ends with it.
fn exports(pair: &Pair) -> String {
    format!(
        "# {}\nunset AWS_SESSION_TOKEN AWS_PROFILE\nexport AWS_ACCESS_KEY_ID={}\nexport AWS_SECRET_ACCESS_KEY={}\n",
        pair.arn,
        quote(&pair.access_key_id),
        quote(&pair.secret_access_key)
    )
}

fn users(users: Vec<UserLine>) -> String {
    let line = |user: UserLine| {
        let may = match (user.administrator, &user.policy) {
            (true, _) => "administrator",
            (false, Some(_)) => "policy",
            (false, None) => "nothing",
        };
        format!("{}\t{may}\t{}\t{}\n", user.arn, user.access_key_ids.join(","), origin(user.configured))
    };
    users.into_iter().map(line).collect()
}

fn roles(roles: Vec<RoleLine>) -> String {
    roles.into_iter().map(|role| format!("{}\t{}\n", role.arn, origin(role.configured))).collect()
}

fn origin(configured: bool) -> &'static str {
    if configured { "configuration" } else { "iam" }
}

fn removed(_: Value) -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_pair_is_printed_for_a_shell() {
        let pair = Pair { arn: "arn".to_owned(), access_key_id: "AKIA".to_owned(), secret_access_key: "a/b+c".to_owned() };
        let text = exports(&pair);
        assert!(text.contains("export AWS_ACCESS_KEY_ID=AKIA\n") && text.contains("export AWS_SECRET_ACCESS_KEY=a/b+c\n"), "{text}");
    }

    #[test]
    fn names_are_encoded_in_paths() {
        let name = Name { name: "a@b".to_owned(), account: None };
        assert_eq!(name.path("users"), "/hearth/v1/iam/users/-/a%40b");
        let name = Name { name: "a/../b".to_owned(), account: Some("111111111111".to_owned()) };
        assert_eq!(name.path("roles"), "/hearth/v1/iam/roles/111111111111/a%2F%2E%2E%2Fb");
    }

    #[test]
    fn a_document_that_is_not_a_policy_is_named_with_the_place() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("p.json");
        std::fs::write(&path, r#"{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "x", "Resource": "*"}]}"#).unwrap();
        let error = format!("{:#}", validate(&path, false).unwrap_err());
        assert!(error.contains("p.json is not a policy") && error.contains("Statement[0]"), "{error}");
    }
}
