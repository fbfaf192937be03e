//! The keys of tokens on disk: JSON Web Keys (RFC 7517) in a directory, a new one each day, the old ones for as long as a token that they
//! sealed may live.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::{
    aead::{AES_256_GCM, LessSafeKey, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::LONGEST_LIFETIME;

/// A key seals for this long.
pub(super) const SEALS_FOR: Duration = Duration::from_secs(24 * 3600);

/// A key opens for this long after its successor was made: the life of the last token that it sealed, and as much again for clocks that
/// were set back meanwhile.
pub(super) const OPENS_AFTER: Duration = Duration::from_secs(2 * LONGEST_LIFETIME.as_secs());

const KEY_LENGTH: usize = 32;

/// The keyring could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// a file cannot be read or written
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// a key file is not what this server writes
    #[error("{} is not a 256-bit A256GCM key; move it away to have a new one made (tokens already issued become void)", .0.display())]
    NotAKey(PathBuf),
    /// the operating system has no randomness
    #[error("the operating system's random number generator failed")]
    Random,
}

/// A key in memory.
pub(super) struct Key {
    pub(super) id: String,
    pub(super) cipher: LessSafeKey,
    /// Milliseconds since the epoch.
    pub(super) created_at: u64,
}

/// Every key in a directory, oldest first.
pub(super) fn read_all(dir: &Path) -> Result<Vec<Key>, KeyringError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("create", dir))?;
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = entry.map_err(failed("list", dir))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jwk") => files.push(KeyFile::read(&path)?),
            // What a crash left of a key that was never used.
            Some("draft") => fs::remove_file(&path).map_err(failed("remove", &path))?,
            _ => {}
        }
    }
    files.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
    Ok(files.iter().map(KeyFile::key).collect())
}

/// Makes a key in a directory, where it stays.
pub(super) fn create(dir: &Path, now: SystemTime) -> Result<Key, KeyringError> {
    let mut secret = [0; KEY_LENGTH];
    SystemRandom::new().fill(&mut secret).map_err(|_| KeyringError::Random)?;
    let file = KeyFile { kty: "oct".into(), alg: "A256GCM".into(), id: Uuid::new_v4().to_string(), secret, created_at: epoch_millis(now) };
    file.write(dir)?;
    Ok(file.key())
}

/// Removes a key's file; its tokens are void with the next start.
pub(super) fn remove(dir: &Path, id: &str) -> Result<(), KeyringError> {
    let path = KeyFile::path(dir, id);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn epoch_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A key on disk.
#[derive(Serialize, Deserialize)]
struct KeyFile {
    kty: String,
    alg: String,
    #[serde(rename = "kid")]
    id: String,
    #[serde(rename = "k", with = "secret")]
    secret: [u8; KEY_LENGTH],
    /// Milliseconds since the epoch: the newest key seals.
    #[serde(rename = "created")]
    created_at: u64,
}

impl KeyFile {
    fn path(dir: &Path, id: &str) -> PathBuf {
        dir.join(format!("{id}.jwk"))
    }

    fn read(path: &Path) -> Result<Self, KeyringError> {
        let text = fs::read(path).map_err(failed("read", path))?;
        serde_json::from_slice(&text)
            .ok()
            .filter(|file: &Self| file.kty == "oct" && file.alg == "A256GCM" && Uuid::parse_str(&file.id).is_ok())
            .ok_or_else(|| KeyringError::NotAKey(path.to_owned()))
    }

    fn write(&self, dir: &Path) -> Result<(), KeyringError> {
        let path = Self::path(dir, &self.id);
        // Renamed last, so that a crash leaves no half a key.
        let draft = path.with_extension("draft");
        let write = || {
            let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            out.write_all(&serde_json::to_vec(self)?)?;
            out.sync_all()?;
            fs::rename(&draft, &path)?;
            // A token that outlives a crash needs its key to do so too.
            fs::File::open(dir)?.sync_all()
        };
        write().map_err(failed("write", &path))
    }

    fn key(&self) -> Key {
        let key = UnboundKey::new(&AES_256_GCM, &self.secret).expect("the key is as long as the cipher wants it");
        Key { id: self.id.clone(), cipher: LessSafeKey::new(key), created_at: self.created_at }
    }
}

mod secret {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{BASE64, Engine, KEY_LENGTH};

    pub fn serialize<S: Serializer>(secret: &[u8; KEY_LENGTH], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(secret))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; KEY_LENGTH], D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| D::Error::custom("not 256 bits of base64url"))
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyringError {
    let path = path.to_owned();
    move |source| KeyringError::Io { action, path, source }
}
