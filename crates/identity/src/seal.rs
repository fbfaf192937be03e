//! The secrets behind temporary credentials. A session token is sealed (AES-256-GCM), the secret access key follows from the access key id
//! (HMAC-SHA256): nothing is stored, so that sessions outlive a restart for as long as the key does.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use crate::records::secret_text;

/// Longest token that is looked at, in characters.
const MAX_TOKEN_LENGTH: usize = 16_384;

/// Seals and opens session tokens.
pub struct Sealer {
    tokens: LessSafeKey,
    secrets: hmac::Key,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

impl Sealer {
    /// Length of the key that everything follows from, in bytes.
    pub const KEY_LENGTH: usize = 32;

    /// A key for [`Sealer::new`]. `None`: the system has no random numbers.
    pub fn random_key() -> Option<[u8; Self::KEY_LENGTH]> {
        let mut key = [0; Self::KEY_LENGTH];
        SystemRandom::new().fill(&mut key).ok()?;
        Some(key)
    }

    /// Works with a key.
    pub fn new(key: &[u8; Self::KEY_LENGTH]) -> Self {
        let master = hmac::Key::new(hmac::HMAC_SHA256, key);
        let tokens = hmac::sign(&master, b"session tokens");
        let tokens = UnboundKey::new(&AES_256_GCM, tokens.as_ref()).expect("a SHA-256 is as long as the cipher's key");
        let secrets = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&master, b"secret access keys").as_ref());
        Self { tokens: LessSafeKey::new(tokens), secrets }
    }

    /// The secret of a temporary access key.
    pub(crate) fn secret(&self, access_key_id: &str) -> String {
        secret_text(hmac::sign(&self.secrets, access_key_id.as_bytes()).as_ref())
    }

    /// Seals a text. `None`: the system has no random numbers.
    pub(crate) fn seal(&self, mut text: Vec<u8>, random: &SystemRandom) -> Option<String> {
        // Random nonces are safe for 2^32 tokens of one key (NIST SP 800-38D, 8.3).
        let mut nonce = [0; NONCE_LEN];
        random.fill(&mut nonce).ok()?;
        self.tokens.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut text).ok()?;
        Some(BASE64.encode([nonce.as_slice(), &text].concat()))
    }

    /// Opens what this key sealed.
    pub(crate) fn open(&self, token: &str) -> Option<Vec<u8>> {
        if token.len() > MAX_TOKEN_LENGTH {
            return None;
        }
        let bytes = BASE64.decode(token).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>()?;
        let mut sealed = sealed.to_vec();
        let text = self.tokens.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut sealed).ok()?;
        Some(text.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealer(byte: u8) -> Sealer {
        Sealer::new(&[byte; Sealer::KEY_LENGTH])
    }

    #[test]
    fn secrets_look_like_aws_s_and_follow_from_key_and_id() {
        let secret = sealer(1).secret("ASIAEXAMPLE");
        assert_eq!(secret.len(), 40);
        assert_eq!(secret, sealer(1).secret("ASIAEXAMPLE"));
        assert_ne!(secret, sealer(1).secret("ASIAEXAMPLF"));
        assert_ne!(secret, sealer(2).secret("ASIAEXAMPLE"));
    }

    proptest! {
        #[test]
        fn only_what_this_key_sealed_is_opened(text: Vec<u8>, at: prop::sample::Index) {
            let token = sealer(1).seal(text.clone(), &SystemRandom::new()).unwrap();
            prop_assert_eq!(sealer(1).open(&token), Some(text));
            prop_assert_eq!(sealer(2).open(&token), None);
            prop_assert_eq!(sealer(1).open(&token[..at.index(token.len())]), None);
        }

        #[test]
        fn garbage_is_refused(token: String) {
            prop_assert_eq!(sealer(1).open(&token), None);
        }
    }
}
