//! The tokens that questions must bring: whoever can only make the app send a GET somewhere has none.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Tokens that are known at once; the oldest go first.
const MOST: usize = 1024;
/// Bytes of a token.
const LENGTH: usize = 28;

/// All tokens that are good, oldest first.
#[derive(Debug, Default)]
pub struct Tokens(Mutex<VecDeque<(String, SystemTime)>>);

impl Tokens {
    /// A new token, good for a while.
    pub fn issue(&self, lifetime: Duration, now: SystemTime) -> io::Result<String> {
        let mut bytes = [0; LENGTH];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut tokens = self.lock();
        tokens.retain(|(_, end)| *end > now);
        if tokens.len() >= MOST {
            tokens.pop_front();
        }
        tokens.push_back((token.clone(), now + lifetime));
        Ok(token)
    }

    /// Whether a token is good.
    pub fn accept(&self, token: &str, now: SystemTime) -> bool {
        self.lock().iter().any(|(known, end)| known == token && *end > now)
    }

    /// From now on none is.
    pub fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(String, SystemTime)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_time_unless_it_is_forgotten() {
        let (tokens, now) = (Tokens::default(), SystemTime::now());
        let minute = Duration::from_secs(60);
        let (short, long) = (tokens.issue(minute, now).unwrap(), tokens.issue(minute * 2, now).unwrap());
        assert_ne!(short, long);
        assert_eq!(short.len(), 2 * LENGTH);
        assert!(tokens.accept(&short, now) && tokens.accept(&long, now) && !tokens.accept("", now));
        assert!(!tokens.accept(&short, now + minute) && tokens.accept(&long, now + minute));
        tokens.forget();
        assert!(!tokens.accept(&long, now));
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let (tokens, now) = (Tokens::default(), SystemTime::now());
        let first = tokens.issue(Duration::from_secs(60), now).unwrap();
        for _ in 1..MOST {
            tokens.issue(Duration::from_secs(60), now).unwrap();
        }
        assert!(tokens.accept(&first, now));
        let last = tokens.issue(Duration::from_secs(60), now).unwrap();
        assert!(!tokens.accept(&first, now) && tokens.accept(&last, now));
    }
}
