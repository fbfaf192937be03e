//! Endpoint tokens: compact JWE as the service issues them, opaque to clients (SPEC 10.2). A token opens some ports of one MicroVM
//! until it expires; nothing is stored, so there is nothing to revoke and the keyring is all that a restart needs.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{plane::Refusal, types::PortSpec};

/// The header's value is a token of at most this many characters (SPEC 10.2); longer ones are not looked at.
const MAX_TOKEN_LENGTH: usize = 8000;

/// Claims are padded to a multiple of this many bytes. One block makes a token of 824 characters, within the 761–868 that the
/// service's have, and hides how many ports are listed.
const BLOCK: usize = 512;

const KEY_LENGTH: usize = 32;

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
    /// Claims for the ports of a MicroVM, from now for `lifetime`.
    pub fn http(microvm_id: impl Into<String>, ports: Vec<PortSpec>, now: SystemTime, lifetime: Duration) -> Self {
        Self {
            kind: TokenKind::Http,
            microvm_id: microvm_id.into(),
            ports,
            expires_at: epoch_seconds(now).saturating_add(lifetime.as_secs()),
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

/// The keys that seal and open tokens: the newest seals, all of them open, so that adding one never voids a token in use.
pub struct Keyring {
    /// Oldest first; never empty.
    keys: Vec<Key>,
    random: SystemRandom,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").field("keys", &self.keys.iter().map(|key| &key.id).collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads every key in a directory; makes the directory and a first key if there is none.
    pub fn load_or_create(dir: &Path) -> Result<Self, KeyringError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("create", dir))?;
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
            let path = entry.map_err(failed("list", dir))?.path();
            if path.extension().is_some_and(|extension| extension == "jwk") {
                files.push(KeyFile::read(&path)?);
            }
        }
        if files.is_empty() {
            files.push(KeyFile::create(dir)?);
        }
        files.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let keys = files.iter().map(KeyFile::key).collect();
        Ok(Self { keys, random: SystemRandom::new() })
    }

    /// Seals claims into a token.
    pub fn mint(&self, claims: Claims) -> String {
        let mut text = serde_json::to_vec(&claims).expect("claims are strings, numbers and lists");
        // JSON ignores the blanks when it is read back.
        text.resize(text.len().next_multiple_of(BLOCK), b' ');

        let key = self.keys.last().expect("a keyring has a key");
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

    /// What a token says, if one of our keys sealed it. Expiry and scope are the caller's to check, or [`Keyring::admit`]'s.
    pub fn open(&self, token: &str) -> Option<Claims> {
        self.unseal(&Envelope::parse(token)?)
    }

    /// Decides on a request for a port, which means nothing to a shell's token, and says which kind of token it came with. `microvm_id` is the MicroVM that the host name stands for; without one the answer takes
    /// just as long, so that it tells nobody which names exist.
    pub fn admit(&self, token: &str, microvm_id: Option<&str>, port: u16, now: SystemTime) -> Result<TokenKind, Refusal> {
        let envelope = Envelope::parse(token).ok_or(Refusal::MissingAuthentication)?;
        let claims = self.unseal(&envelope).ok_or(Refusal::AuthenticationFailed)?;
        if microvm_id != Some(claims.microvm_id.as_str()) || claims.is_expired(now) {
            return Err(Refusal::AuthenticationFailed);
        }
        if claims.kind == TokenKind::Shell || claims.allows(port) { Ok(claims.kind) } else { Err(Refusal::PortDenied) }
    }

    fn unseal(&self, envelope: &Envelope) -> Option<Claims> {
        let key = self.keys.iter().find(|key| key.id == envelope.key_id)?;
        let mut sealed = envelope.sealed.clone();
        let nonce = Nonce::assume_unique_for_key(envelope.nonce);
        let text = key.cipher.open_in_place(nonce, Aad::from(&envelope.header), &mut sealed).ok()?;
        serde_json::from_slice(text).ok()
    }
}

struct Key {
    id: String,
    cipher: LessSafeKey,
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

/// A key on disk: a JSON Web Key (RFC 7517) with the time it was made.
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
    fn read(path: &Path) -> Result<Self, KeyringError> {
        let text = fs::read(path).map_err(failed("read", path))?;
        serde_json::from_slice(&text)
            .ok()
            .filter(|file: &Self| file.kty == "oct" && file.alg == "A256GCM" && Uuid::parse_str(&file.id).is_ok())
            .ok_or_else(|| KeyringError::NotAKey(path.to_owned()))
    }

    /// Makes a new key in a directory.
    fn create(dir: &Path) -> Result<Self, KeyringError> {
        let mut secret = [0; KEY_LENGTH];
        SystemRandom::new().fill(&mut secret).map_err(|_| KeyringError::Random)?;
        let created_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        let file = Self {
            kty: "oct".into(),
            alg: "A256GCM".into(),
            id: Uuid::new_v4().to_string(),
            secret,
            created_at: u64::try_from(created_at).unwrap_or(u64::MAX),
        };
        let path = dir.join(format!("{}.jwk", file.id));
        // Renamed last, so that a crash leaves no half a key; other names than *.jwk are ignored.
        let draft = path.with_extension("draft");
        let write = || {
            let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            out.write_all(&serde_json::to_vec(&file)?)?;
            out.sync_all()?;
            fs::rename(&draft, &path)
        };
        write().map_err(failed("write", &path))?;
        Ok(file)
    }

    fn key(&self) -> Key {
        let key = UnboundKey::new(&AES_256_GCM, &self.secret).expect("the key is as long as the cipher wants it");
        Key { id: self.id.clone(), cipher: LessSafeKey::new(key) }
    }
}

mod secret {
    use super::{BASE64, Engine, KEY_LENGTH};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

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

fn epoch_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const VM: &str = "microvm-0d2b7a54-5f0a-4f1c-9a53-0a3f3f6f2a11";

    fn keyring() -> Keyring {
        Keyring { keys: vec![new_key()], random: SystemRandom::new() }
    }

    fn new_key() -> Key {
        let dir = tempfile::tempdir().unwrap();
        KeyFile::create(dir.path()).unwrap().key()
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_793_500_000)
    }

    fn claims(ports: Vec<PortSpec>) -> Claims {
        Claims::http(VM, ports, now(), Duration::from_secs(60))
    }

    #[test]
    fn the_shape_is_the_service_s() {
        let keyring = keyring();
        let token = keyring.mint(claims(vec![PortSpec::Port(8080), PortSpec::Range(9000, 9010)]));
        let parts: Vec<&str> = token.split('.').collect();
        assert_eq!(parts.len(), 5);
        assert_eq!(parts[1], "");
        let header = String::from_utf8(BASE64.decode(parts[0]).unwrap()).unwrap();
        assert_eq!(header, format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, keyring.keys[0].id));
        assert_eq!(BASE64.decode(parts[2]).unwrap().len(), 12);
        assert_eq!(BASE64.decode(parts[4]).unwrap().len(), 16);
        assert!((761..=868).contains(&token.len()), "{} characters", token.len());
    }

    #[test]
    fn the_length_does_not_tell_the_scope() {
        let keyring = keyring();
        let short = keyring.mint(claims(vec![PortSpec::All]));
        let long = keyring.mint(claims((1..=10).map(|n| PortSpec::Range(n, n + 20_000)).collect()));
        assert_eq!(short.len(), long.len());
        assert_ne!(short, keyring.mint(claims(vec![PortSpec::All])), "each has a nonce of its own");
    }

    #[test]
    fn another_key_s_token_is_not_opened() {
        let claims = claims(vec![PortSpec::All]);
        let (ours, theirs) = (keyring(), keyring());
        let token = theirs.mint(claims.clone());
        assert_eq!(theirs.open(&token), Some(claims));
        assert_eq!(ours.open(&token), None);
        assert_eq!(ours.admit(&token, Some(VM), 80, now()), Err(Refusal::AuthenticationFailed));

        // Nor is one that names our key but was sealed with another.
        let mut impostor = new_key();
        impostor.id.clone_from(&ours.keys[0].id);
        let forged = Keyring { keys: vec![impostor], random: SystemRandom::new() }.mint(self::claims(vec![PortSpec::All]));
        assert_eq!(ours.admit(&forged, Some(VM), 80, now()), Err(Refusal::AuthenticationFailed));
    }

    #[test]
    fn requests_are_refused_as_the_service_does() {
        let keyring = keyring();
        let token = keyring.mint(claims(vec![PortSpec::Port(8080), PortSpec::Range(9000, 9010)]));
        let admit = |vm, port, seconds| keyring.admit(&token, vm, port, now() + Duration::from_secs(seconds));
        assert_eq!(admit(Some(VM), 8080, 0), Ok(TokenKind::Http));
        assert_eq!(admit(Some(VM), 9010, 59), Ok(TokenKind::Http));
        assert_eq!(admit(Some(VM), 9011, 0), Err(Refusal::PortDenied));
        assert_eq!(admit(Some(VM), 8080, 60), Err(Refusal::AuthenticationFailed));
        assert_eq!(admit(Some("microvm-other"), 8080, 0), Err(Refusal::AuthenticationFailed));
        assert_eq!(admit(None, 8080, 0), Err(Refusal::AuthenticationFailed));
        assert_eq!(admit(None, 22, 0), Err(Refusal::AuthenticationFailed), "the scope is nobody's business until the rest is right");

        for garbage in ["", "x", "....", "a.b.c.d.e", "Bearer abc", &token[1..], &token.replace("..", ".a."), &format!("{token}.x")] {
            assert_eq!(keyring.admit(garbage, Some(VM), 8080, now()), Err(Refusal::MissingAuthentication), "{garbage}");
        }
        let long = format!("{token}{}", "A".repeat(MAX_TOKEN_LENGTH));
        assert_eq!(keyring.admit(&long, Some(VM), 8080, now()), Err(Refusal::MissingAuthentication));
    }

    #[test]
    fn a_shell_token_is_told_from_one_for_ports() {
        let keyring = keyring();
        let token = keyring.mint(Claims { kind: TokenKind::Shell, ..claims(vec![PortSpec::All]) });
        assert!(!keyring.open(&token).unwrap().allows(8080));
        assert_eq!(keyring.admit(&token, Some(VM), 8080, now()), Ok(TokenKind::Shell));
        assert_eq!(keyring.admit(&token, Some("microvm-other"), 8080, now()), Err(Refusal::AuthenticationFailed));
        assert_eq!(keyring.admit(&token, Some(VM), 8080, now() + Duration::from_secs(60)), Err(Refusal::AuthenticationFailed));
    }

    #[test]
    fn keys_survive_a_restart_and_the_newest_seals() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("keys");
        let first = Keyring::load_or_create(&dir).unwrap();
        let old = first.mint(claims(vec![PortSpec::All]));
        let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1);
        assert_eq!(fs::metadata(&files[0]).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(Keyring::load_or_create(&dir).unwrap().open(&old).is_some());

        let mut added = KeyFile::read(&files[0]).unwrap();
        added.id = Uuid::new_v4().to_string();
        added.secret = [7; KEY_LENGTH];
        added.created_at += 1;
        fs::write(dir.join("added.jwk"), serde_json::to_vec(&added).unwrap()).unwrap();
        let rotated = Keyring::load_or_create(&dir).unwrap();
        assert!(rotated.open(&old).is_some());
        assert!(first.open(&rotated.mint(claims(vec![PortSpec::All]))).is_none());
    }

    #[test]
    fn a_damaged_key_file_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("bad.jwk");
        fs::write(&path, "{}").unwrap();
        let error = Keyring::load_or_create(temp.path()).unwrap_err();
        assert!(error.to_string().contains("bad.jwk"), "{error}");
    }

    fn any_ports() -> impl Strategy<Value = Vec<PortSpec>> {
        let one = prop_oneof![
            any::<u16>().prop_map(PortSpec::Port),
            any::<(u16, u16)>().prop_map(|(a, b)| PortSpec::Range(a.min(b), a.max(b))),
            Just(PortSpec::All),
        ];
        proptest::collection::vec(one, 0..8)
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_opened(ports in any_ports(), expires_at: u64, microvm_id in "[ -~]{0,80}") {
            let keyring = keyring();
            let claims = Claims { kind: TokenKind::Http, microvm_id, ports, expires_at };
            prop_assert_eq!(keyring.open(&keyring.mint(claims.clone())), Some(claims));
        }

        #[test]
        fn a_changed_or_shortened_token_is_refused(at: prop::sample::Index, with in "[A-Za-z0-9_.-]") {
            let keyring = keyring();
            let token = keyring.mint(claims(vec![PortSpec::All]));
            let at = at.index(token.len());
            prop_assert_eq!(keyring.open(&token[..at]), None);
            let changed = format!("{}{with}{}", &token[..at], &token[at + 1..]);
            prop_assert!(changed == token || keyring.open(&changed).is_none());
        }

        #[test]
        fn garbage_is_refused(token: String) {
            prop_assert_eq!(keyring().open(&token), None);
        }

        #[test]
        fn scope_is_the_union(ports in any_ports(), port: u16) {
            let expected = ports.iter().any(|ports| match *ports {
                PortSpec::All => true,
                PortSpec::Port(only) => only == port,
                PortSpec::Range(first, last) => first <= port && port <= last,
            });
            prop_assert_eq!(claims(ports).allows(port), expected);
        }
    }
}
