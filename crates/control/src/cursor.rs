//! Cursors of lists: the position after a page, sealed with a key so that only this server's own come back, each to the list it came from.

use std::{fs, io, os::unix::fs::OpenOptionsExt, path::Path};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ring::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use crate::error::ControlError;

const KEY_BYTES: usize = 32;
const FILE: &str = "cursor.key";

/// Makes and reads cursors.
#[derive(Debug)]
pub(crate) struct Cursors {
    key: hmac::Key,
}

impl Cursors {
    /// Reads the key in a directory; makes both if they are missing.
    pub fn load_or_create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let secret = match fs::read(&path) {
            Ok(secret) if secret.len() == KEY_BYTES => secret,
            // A cursor lives as long as a listing does: losing the key costs nothing.
            Ok(_) => create(dir, &path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(dir, &path)?,
            Err(error) => return Err(error),
        };
        Ok(Self { key: hmac::Key::new(hmac::HMAC_SHA256, &secret) })
    }

    /// The cursor of a list after the record `seq`. `list` names the list, whose it is, and its filters.
    pub fn seal(&self, list: &[&str], seq: i64) -> String {
        let mut bytes = seq.to_be_bytes().to_vec();
        bytes.extend_from_slice(hmac::sign(&self.key, &message(list, seq)).as_ref());
        BASE64.encode(bytes)
    }

    /// The position that a cursor of this list stands for.
    pub fn open(&self, list: &[&str], cursor: &str) -> Result<i64, ControlError> {
        let bytes = BASE64.decode(cursor).map_err(|_| ControlError::BadCursor)?;
        let (seq, tag) = bytes.split_first_chunk::<8>().ok_or(ControlError::BadCursor)?;
        let seq = i64::from_be_bytes(*seq);
        hmac::verify(&self.key, &message(list, seq), tag).map_err(|_| ControlError::BadCursor)?;
        Ok(seq)
    }
}

/// Unambiguous, because each part carries its length.
fn message(list: &[&str], seq: i64) -> Vec<u8> {
    let mut message = seq.to_be_bytes().to_vec();
    for part in list {
        message.extend_from_slice(&(part.len() as u64).to_be_bytes());
        message.extend_from_slice(part.as_bytes());
    }
    message
}

fn create(dir: &Path, path: &Path) -> io::Result<Vec<u8>> {
    fs::create_dir_all(dir)?;
    let mut secret = vec![0; KEY_BYTES];
    SystemRandom::new().fill(&mut secret).map_err(|_| io::Error::other("the operating system's random number generator failed"))?;
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    io::Write::write_all(&mut file, &secret)?;
    file.sync_all()?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_to_its_own_list_only() {
        let dir = tempfile::tempdir().unwrap();
        let cursors = Cursors::load_or_create(dir.path()).unwrap();
        let cursor = cursors.seal(&["images", "a"], 7);
        assert_eq!(cursors.open(&["images", "a"], &cursor).unwrap(), 7);
        for other in [["images", "b"].as_slice(), &["imagesa"], &["images", "a", ""]] {
            assert!(matches!(cursors.open(other, &cursor), Err(ControlError::BadCursor)));
        }
        let again = Cursors::load_or_create(dir.path()).unwrap();
        assert_eq!(again.open(&["images", "a"], &cursor).unwrap(), 7, "it survives a restart");
    }

    #[test]
    fn a_changed_cursor_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cursors = Cursors::load_or_create(dir.path()).unwrap();
        let cursor = cursors.seal(&["images"], 7);
        for index in 0..cursor.len() {
            let mut changed = cursor.clone().into_bytes();
            changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(cursors.open(&["images"], &changed).is_err(), "{changed}");
        }
        for garbage in ["", "=", "AAAA", "1"] {
            assert!(cursors.open(&["images"], garbage).is_err());
        }
    }
}
