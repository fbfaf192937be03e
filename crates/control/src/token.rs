//! Endpoint tokens: compact JWE as the service issues them, opaque to clients (SPEC 10.2). A token opens some ports of one MicroVM
//! until it expires; nothing is stored, so there is nothing to revoke and the keyring is all that a restart needs.
//!
//! What a token is good for is decided from its claims alone, and only once its seal has been checked. The name that a request is for is
//! compared, in constant time, with the name of the MicroVM in the claims, and never looked up: a name that nobody has and the name of
//! another's MicroVM take the same steps, so neither answers nor their timing tell which names exist.

mod keys;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce},
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};

use self::keys::{Key, OPENS_AFTER, SEALS_FOR};
use crate::{plane::Refusal, types::PortSpec};

pub use self::keys::KeyringError;

/// No token lives longer (SPEC 10.2).
pub const LONGEST_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// The header's value is a token of at most this many characters (SPEC 10.2); longer ones are not looked at.
const MAX_TOKEN_LENGTH: usize = 8000;

/// Claims are padded to a multiple of this many bytes. One block makes a token of 824 characters, within the 761–868 that the
/// service's have, and hides how many ports are listed.
const BLOCK: usize = 512;

/// A rotation that failed is tried again after this long, and none is waited for longer: clocks are set.
const ROTATION_LOOK: Duration = Duration::from_secs(3600);

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenKind {
    /// Traffic to the application's ports.
    #[serde(rename = "http")]
    Http,
    /// A shell in the application's container.
    #[serde(rename = "shell")]
    Shell,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub kind: TokenKind,
    /// `microvm-<uuid>`.
    pub microvm_id: String,
    /// The union of these ports is open. Means nothing for [`TokenKind::Shell`].
    pub ports: Vec<PortSpec>,
    /// Seconds since the epoch; the token is void from this second on.
    pub expires_at: u64,
}

impl Claims {
    /// Claims for the ports of a MicroVM, from now for `lifetime`, at most [`LONGEST_LIFETIME`].
    pub fn http(microvm_id: impl Into<String>, ports: Vec<PortSpec>, now: SystemTime, lifetime: Duration) -> Self {
        Self {
            kind: TokenKind::Http,
            microvm_id: microvm_id.into(),
            ports,
            expires_at: epoch_seconds(now).saturating_add(lifetime.min(LONGEST_LIFETIME).as_secs()),
        }
    }

    /// Claims for a shell in a MicroVM, from now for `lifetime`.
    pub fn shell(microvm_id: impl Into<String>, now: SystemTime, lifetime: Duration) -> Self {
        Self { kind: TokenKind::Shell, ..Self::http(microvm_id, Vec::new(), now, lifetime) }
    }

    /// Whether the token is void at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        epoch_seconds(now) >= self.expires_at
    }

    /// Whether the token opens a port, going by kind and scope alone.
    pub fn allows(&self, port: u16) -> bool {
        self.kind == TokenKind::Http && self.ports.iter().any(|ports| ports.allows(port))
    }
}

impl PortSpec {
    /// Whether a port is among these.
    pub fn allows(&self, port: u16) -> bool {
        match *self {
            Self::Port(only) => port == only,
            Self::Range(first, last) => (first..=last).contains(&port),
            Self::All => true,
        }
    }
}

/// The keys that seal and open tokens: the newest seals, all of them open, so that a new one voids no token in use.
pub struct Keyring {
    dir: PathBuf,
    /// Oldest first; never empty.
    keys: RwLock<Vec<Arc<Key>>>,
    /// One rotation at a time. Not the lock above: requests must not wait for the disk.
    rotation: Mutex<()>,
    random: SystemRandom,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids: Vec<String> = self.keys().iter().map(|key| key.id.clone()).collect();
        f.debug_struct("Keyring").field("keys", &ids).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads every key in a directory; makes the directory and a first key if there is none, and the next one if the newest is old.
    pub fn load_or_create(dir: &Path) -> Result<Self, KeyringError> {
        Self::load_at(dir, SystemTime::now())
    }

    fn load_at(dir: &Path, now: SystemTime) -> Result<Self, KeyringError> {
        let mut keys = keys::read_all(dir)?;
        if keys.is_empty() {
            keys.push(keys::create(dir, now)?);
        }
        let keys = RwLock::new(keys.into_iter().map(Arc::new).collect());
        let keyring = Self { dir: dir.to_owned(), keys, rotation: Mutex::new(()), random: SystemRandom::new() };
        keyring.rotate(now)?;
        Ok(keyring)
    }

    /// Makes a new key each day and drops those that no token needs any more. Never returns.
    pub async fn keep_rotating(self: Arc<Self>) {
        loop {
            let wait = self.rests_for(SystemTime::now());
            tokio::time::sleep(wait.clamp(Duration::from_secs(1), ROTATION_LOOK)).await;
            let keyring = Arc::clone(&self);
            let rotated = tokio::task::spawn_blocking(move || keyring.rotate(SystemTime::now())).await;
            // The old key goes on sealing.
            match rotated {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => tracing::warn!(%error, "the key of tokens was not changed"),
                Err(error) => tracing::error!(%error, "changing the key of tokens failed"),
            }
            tokio::time::sleep(ROTATION_LOOK).await;
        }
    }

    /// How long the newest key goes on sealing. A clock that was set back delays the next one by as much.
    fn rests_for(&self, now: SystemTime) -> Duration {
        let keys = self.keys();
        let newest = keys.last().expect("a keyring has a key");
        SEALS_FOR.saturating_sub(Duration::from_millis(keys::epoch_millis(now).saturating_sub(newest.created_at)))
    }

    /// Does what is due at `now`.
    fn rotate(&self, now: SystemTime) -> Result<(), KeyringError> {
        let _one = self.rotation.lock().unwrap_or_else(PoisonError::into_inner);
        if self.rests_for(now).is_zero() {
            let key = Arc::new(keys::create(&self.dir, now)?);
            tracing::info!(kid = key.id, "tokens have a new key");
            self.keys.write().unwrap_or_else(PoisonError::into_inner).push(key);
        }
        for key in self.outlived(now) {
            keys::remove(&self.dir, &key.id)?;
            self.keys.write().unwrap_or_else(PoisonError::into_inner).retain(|kept| kept.id != key.id);
        }
        Ok(())
    }

    /// The keys whose successors are so old that nothing they sealed is still good.
    fn outlived(&self, now: SystemTime) -> Vec<Arc<Key>> {
        let before = keys::epoch_millis(now).saturating_sub(u64::try_from(OPENS_AFTER.as_millis()).unwrap_or(u64::MAX));
        let keys = self.keys();
        keys.windows(2).filter(|pair| pair[1].created_at < before).map(|pair| Arc::clone(&pair[0])).collect()
    }

    fn keys(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Key>>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seals claims into a token.
    pub fn mint(&self, claims: Claims) -> String {
        let mut text = serde_json::to_vec(&claims).expect("claims are strings, numbers and lists");
        // JSON ignores the blanks when it is read back.
        text.resize(text.len().next_multiple_of(BLOCK), b' ');

        let key = Arc::clone(self.keys().last().expect("a keyring has a key"));
        // Random nonces are safe for 2^32 tokens of one key (NIST SP 800-38D, 8.3).
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).expect("the random number generator has worked since the start");
        let header = BASE64.encode(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, key.id));
        let tag = key
            .cipher
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(&header), &mut text)
            .expect("claims are far below the cipher's limit of 64 GiB");
        format!("{header}..{}.{}.{}", BASE64.encode(nonce), BASE64.encode(text), BASE64.encode(tag))
    }

    /// What a token says, if one of our keys sealed it. Everything else is [`Keyring::verify`]'s, or the caller's, to check.
    pub fn open(&self, token: &str) -> Option<Claims> {
        self.unseal(&Envelope::parse(token)?)
    }

    /// What a token says, if it is good at `now`. Which MicroVM and ports it opens is the caller's to check, in this order: the scope is nobody's
    /// business until the rest is right.
    pub fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, Refusal> {
        let envelope = Envelope::parse(token).ok_or(Refusal::MissingAuthentication)?;
        let claims = self.unseal(&envelope).ok_or(Refusal::AuthenticationFailed)?;
        if claims.is_expired(now) {
            return Err(Refusal::AuthenticationFailed);
        }
        Ok(claims)
    }

    fn unseal(&self, envelope: &Envelope) -> Option<Claims> {
        // Which keys there are is no secret: every token names its own.
        let key = self.keys().iter().find(|key| key.id == envelope.key_id).cloned()?;
        let mut sealed = envelope.sealed.clone();
        let nonce = Nonce::assume_unique_for_key(envelope.nonce);
        let text = key.cipher.open_in_place(nonce, Aad::from(&envelope.header), &mut sealed).ok()?;
        serde_json::from_slice(text).ok()
    }
}

/// A token taken apart, before any key has looked at it.
struct Envelope {
    /// As sent: it is authenticated in this form (RFC 7516, 5.1 step 14).
    header: String,
    key_id: String,
    nonce: [u8; NONCE_LEN],
    /// Ciphertext and tag.
    sealed: Vec<u8>,
}

#[derive(Deserialize)]
struct Header {
    kid: String,
    alg: String,
    enc: String,
}

impl Envelope {
    fn parse(token: &str) -> Option<Self> {
        if token.len() > MAX_TOKEN_LENGTH {
            return None;
        }
        let parts: Vec<&str> = token.split('.').collect();
        let [header, "", nonce, text, tag] = parts.as_slice() else { return None };
        let Header { kid, alg, enc } = serde_json::from_slice(&BASE64.decode(header).ok()?).ok()?;
        if alg != "dir" || enc != "A256GCM" {
            return None;
        }
        let tag = BASE64.decode(tag).ok().filter(|tag| tag.len() == AES_256_GCM.tag_len())?;
        let mut sealed = BASE64.decode(text).ok()?;
        sealed.extend(tag);
        Some(Self { header: (*header).to_owned(), key_id: kid, nonce: BASE64.decode(nonce).ok()?.try_into().ok()?, sealed })
    }
}

fn epoch_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
