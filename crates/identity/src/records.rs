//! What is written down: users with their keys, and roles. One [`Book`] comes from the configuration, one is kept by the server.

use ring::{
    digest,
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};

use crate::policy::{Policy, TrustPolicy};

/// Users and roles.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Book {
    #[serde(default)]
    pub users: Vec<User>,
    #[serde(default)]
    pub roles: Vec<Role>,
}

/// Somebody with keys of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Twelve digits.
    pub account: String,
    /// 1–64 letters, digits and `_+=,.@-`, one of its kind in the account.
    pub name: String,
    /// For example `AIDAQKQ2LCXXYBQK4GVZ`.
    pub id: String,
    /// May do everything in the account.
    #[serde(default)]
    pub administrator: bool,
    /// What the user may do. Without one, and without being an administrator: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    #[serde(default)]
    pub keys: Vec<Key>,
}

/// Something that principals and the service assume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    /// Twelve digits.
    pub account: String,
    /// As for users.
    pub name: String,
    /// For example `AROAQKQ2LCXXYBQK4GVZ`. A role that is made again under the same name has another.
    pub id: String,
    /// Who may assume it.
    pub trust: TrustPolicy,
    /// What its sessions may do.
    pub policy: Policy,
}

/// An access key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// For example `AKIAIOSFODNN7EXAMPLE`.
    pub access_key_id: String,
    /// What requests are signed with.
    pub secret_access_key: String,
}

/// The secret stays out of logs.
impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

impl User {
    /// For example `arn:aws:iam::000000000000:user/ann`.
    pub fn arn(&self) -> String {
        format!("arn:aws:iam::{}:user/{}", self.account, self.name)
    }
}

impl Role {
    /// For example `arn:aws:iam::000000000000:role/worker`.
    pub fn arn(&self) -> String {
        format!("arn:aws:iam::{}:role/{}", self.account, self.name)
    }
}

impl Key {
    /// A new pair of AWS's shape, by which clients recognise it. `None`: the system has no random numbers.
    pub(crate) fn random(random: &SystemRandom) -> Option<Self> {
        let mut secret = [0; 30];
        random.fill(&mut secret).ok()?;
        Some(Self { access_key_id: random_id(random, "AKIA")?, secret_access_key: secret_text(&secret) })
    }
}

/// Forty characters, as AWS's secrets have.
pub(crate) fn secret_text(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes.get(..30).unwrap_or(bytes))
}

/// A prefix and sixteen random characters.
pub(crate) fn random_id(random: &SystemRandom, prefix: &str) -> Option<String> {
    let mut bytes = [0; 16];
    random.fill(&mut bytes).ok()?;
    Some(id(prefix, &bytes))
}

/// The id of what the configuration names: the same at every start.
pub fn configured_id(prefix: &str, account: &str, name: &str) -> String {
    let digest = digest::digest(&digest::SHA256, format!("{prefix}/{account}/{name}").as_bytes());
    id(prefix, &digest.as_ref()[..16])
}

fn id(prefix: &str, bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let id = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
    prefix.chars().chain(id).collect()
}

/// Whether a text may be a user's, a role's or (from two characters on) a session's name.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte))
}

pub(crate) fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}
