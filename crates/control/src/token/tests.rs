use std::{fs, os::unix::fs::PermissionsExt};

use proptest::prelude::*;

use super::*;

const VM: &str = "microvm-0d2b7a54-5f0a-4f1c-9a53-0a3f3f6f2a11";

fn keyring() -> Keyring {
    Keyring::load_at(tempfile::tempdir().unwrap().path(), now()).unwrap()
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
    assert_eq!(header, format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, keyring.keys()[0].id));
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
    assert_eq!(ours.verify(&token, now()), Err(Refusal::AuthenticationFailed));

    // Nor is one that names our key but was sealed with another.
    let impostor = keyring();
    let named = Key { id: ours.keys()[0].id.clone(), cipher: impostor.keys()[0].cipher.clone(), created_at: 0 };
    *impostor.keys.write().unwrap() = vec![Arc::new(named)];
    let forged = impostor.mint(self::claims(vec![PortSpec::All]));
    assert_eq!(ours.verify(&forged, now()), Err(Refusal::AuthenticationFailed));
}

#[test]
fn requests_are_refused_as_the_service_does() {
    let keyring = keyring();
    let token = keyring.mint(claims(vec![PortSpec::Port(8080), PortSpec::Range(9000, 9010)]));
    let verify = |token: &str, seconds| keyring.verify(token, now() + Duration::from_secs(seconds));
    let claims = verify(&token, 59).unwrap();
    assert_eq!(claims.microvm_id, VM);
    assert_eq!([8080, 9000, 9010, 8079, 9011].map(|port| claims.allows(port)), [true, true, true, false, false]);
    assert_eq!(verify(&token, 60), Err(Refusal::AuthenticationFailed));

    for garbage in ["", "x", "....", "a.b.c.d.e", "Bearer abc", &token[1..], &token.replace("..", ".a."), &format!("{token}.x")] {
        assert_eq!(verify(garbage, 0), Err(Refusal::MissingAuthentication), "{garbage}");
    }
    let long = format!("{token}{}", "A".repeat(MAX_TOKEN_LENGTH));
    assert_eq!(verify(&long, 0), Err(Refusal::MissingAuthentication));
}

#[test]
fn a_shell_token_is_told_from_one_for_ports() {
    let keyring = keyring();
    let token = keyring.mint(Claims { kind: TokenKind::Shell, ..claims(vec![PortSpec::All]) });
    let opened = keyring.verify(&token, now()).unwrap();
    assert_eq!(opened.kind, TokenKind::Shell);
    assert!(!opened.allows(8080));
    assert_eq!(keyring.verify(&token, now() + Duration::from_secs(60)), Err(Refusal::AuthenticationFailed));
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
}

fn key_files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_new_key_seals_each_day_and_an_old_one_opens_as_long_as_its_last_token_lives() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let keyring = Keyring::load_at(dir, now()).unwrap();
    let sealed_at = |at| keyring.mint(Claims::http(VM, vec![PortSpec::All], at, LONGEST_LIFETIME));
    let just_before = now() + SEALS_FOR - Duration::from_secs(1);
    keyring.rotate(just_before).unwrap();
    assert_eq!(key_files(dir), 1, "it is not due");
    let last = sealed_at(just_before);

    let due = now() + SEALS_FOR;
    keyring.rotate(due).unwrap();
    let next = sealed_at(due);
    assert_ne!(last.split('.').next(), next.split('.').next(), "another key seals");
    assert!(keyring.verify(&last, due).is_ok());
    let restarted = Keyring::load_at(dir, due + LONGEST_LIFETIME - Duration::from_secs(2)).unwrap();
    for token in [&last, &next] {
        assert!(restarted.verify(token, due + LONGEST_LIFETIME - Duration::from_secs(2)).is_ok());
    }

    keyring.rotate(due + OPENS_AFTER + Duration::from_secs(1)).unwrap();
    assert_eq!(key_files(dir), 1, "what nothing needs any more is gone");
    assert_eq!(keyring.open(&last), None);
    assert!(keyring.open(&next).is_some());
}

#[test]
fn a_start_after_a_long_rest_seals_with_a_new_key() {
    let temp = tempfile::tempdir().unwrap();
    let old = Keyring::load_at(temp.path(), now()).unwrap().keys()[0].id.clone();
    let later = Keyring::load_at(temp.path(), now() + 3 * SEALS_FOR).unwrap();
    assert_eq!(later.keys().len(), 2);
    assert_ne!(later.keys()[1].id, old);
}

#[test]
fn a_clock_that_was_set_back_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let keyring = Keyring::load_at(temp.path(), now()).unwrap();
    keyring.rotate(now() - 2 * SEALS_FOR).unwrap();
    assert_eq!(key_files(temp.path()), 1);
}

#[test]
fn a_disk_that_refuses_the_next_key_leaves_the_old_one_at_work() {
    let temp = tempfile::tempdir().unwrap();
    let keyring = Keyring::load_at(&temp.path().join("keys"), now()).unwrap();
    fs::rename(temp.path().join("keys"), temp.path().join("elsewhere")).unwrap();
    assert!(matches!(keyring.rotate(now() + SEALS_FOR), Err(KeyringError::Io { .. })));
    assert!(keyring.open(&keyring.mint(claims(vec![PortSpec::All]))).is_some());
}

#[tokio::test(start_paused = true)]
async fn rotation_waits_for_its_time() {
    let temp = tempfile::tempdir().unwrap();
    let keyring = Arc::new(Keyring::load_at(temp.path(), SystemTime::now() - SEALS_FOR + Duration::from_secs(30)).unwrap());
    // tokio's clock is stopped and jumps ahead; the system's stays where it is, so nothing becomes due.
    let rotating = tokio::time::timeout(Duration::from_secs(3 * 3600), Arc::clone(&keyring).keep_rotating());
    assert!(rotating.await.is_err(), "it goes on for ever");
    assert_eq!(keyring.keys().len(), 1);
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
