use std::convert::Infallible;

use proptest::prelude::*;

use super::*;

fn ignored(patterns: &str, path: &str) -> bool {
    let ignore = Ignore::parse(patterns.as_bytes()).unwrap_or_else(|error| panic!("{patterns:?}: {error}"));
    let Ok(ignored) = Judge::new(&ignore).ignores(path, || Ok::<_, Infallible>(()));
    ignored
}

#[test]
fn ignores_one_pattern_matches_as_buildkit_does() {
    for (pattern, path, expected) in [
        ("file", "file", true),
        ("file", "dir/file", false),
        ("dir", "dir/deep/file", true),
        ("dir/", "dir/file", true),
        ("/dir/./x/../file", "dir/file", true),
        ("./file", "file", true),
        (".", "file", false),
        ("/", "file", false),
        ("..", "file", false),
        ("../file", "file", false),
        ("*", "dir/file", true),
        ("*.py", "a.py", true),
        ("*.py", "dir/a.py", false),
        ("*/*.py", "dir/a.py", true),
        ("*/*.py", "dir/dir/a.py", false),
        ("dir/*", "dir", false),
        ("dir/*", "dir/a/b", true),
        (".*", ".env", true),
        (".*", "env", false),
        ("a?c", "abc", true),
        ("a?c", "a/c", false),
        ("a?c", "a☺c", true),
        ("a*c", "a/c", false),
        ("a*b?c*x", "abxbbxdbxebxczzx", true),
        ("a*b?c*x", "abxbbxdbxebxczzy", false),
        ("**", "dir/file", true),
        ("**/", "file", true),
        ("**/**", "dir/file", true),
        ("dir/**", "dir", false),
        ("dir/**", "dir/a/b", true),
        ("**/.venv", ".venv/bin/python", true),
        ("**/.venv", "a/b/.venv", true),
        ("**/.venv", "my.venv", false),
        ("**.log", "a.log", true),
        ("**.log", "dir/a.log", true),
        ("**.log", "dir/a.log.gz", false),
        // With a wildcard after it, `**` stands for whole directories.
        ("**a*", "ba", false),
        ("**/*.txt", "file.txt", true),
        ("**/**/*.txt", "a/b/file.txt", true),
        ("**/dir/*", "a/dir/file", true),
        ("**/dir/**", "a/dir/b/file", true),
        ("**/dir/**", "a/dir", false),
        ("a**/*.txt", "a/b/c.txt", true),
        ("a**/*.txt", "a/c.txt", true),
        ("a**b", "ab", true),
        ("a**b", "axb", false),
        ("a**b", "ax/b", true),
        ("a/**/b", "a/b", true),
        ("a/**/b", "a/x/y/b", true),
        ("a***b", "a/x/cb", true),
        ("a***b", "a/x/c", false),
        ("a[b-d]e", "ace", true),
        ("a[b-d]e", "aae", false),
        ("a[^b-d]e", "aze", true),
        ("a[^b-d]e", "ace", false),
        ("[a-ζ]*", "α", true),
        ("[\\]a]", "]", true),
        ("[x\\-]", "-", true),
        ("a\\*b", "a*b", true),
        ("a\\*b", "axb", false),
        ("\\#file", "#file", true),
        ("\\!file", "!file", true),
        ("a(b)|c.{d}+$^", "a(b)|c.{d}+$^", true),
        ("a.c", "abc", false),
        ("node_modules", "NODE_MODULES", false),
    ] {
        assert_eq!(ignored(pattern, path), expected, "{pattern:?} {path:?}");
    }
}

#[test]
fn ignores_several_patterns_the_last_match_decides() {
    for (patterns, path, expected) in [
        ("", "file", false),
        ("*.md\n!README.md", "README.md", false),
        ("*.md\n!README.md", "other.md", true),
        ("!README.md\n*.md", "README.md", true),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", true),
        ("docs\n!docs/README.md", "docs/README.md", false),
        ("docs\n!docs/README.md", "docs/other.md", true),
        ("docs/\n ! docs/README.md ", "docs/README.md", false),
        ("*\n!src", "src/deep/file", false),
        ("*\n!src\nsrc/deep", "src/deep/file", true),
        ("**\n!util/docker/web", "util/docker/web/file", false),
        ("**\n!util/docker/web", "util/docker", true),
        ("*\n!/src/", "src/file", false),
        ("\u{feff}dir\r\n# dir/kept\r\n\r\n!dir/kept\r\n", "dir/kept", false),
        ("\u{feff}dir\r\n# dir/kept\r\n\r\n!dir/kept\r\n", "dir/other", true),
        (" # file", "# file", true),
        // As BuildKit has it: what kept a directory that nothing had ignored does not count below it.
        ("dir/file\n!dir", "dir/file", true),
        ("dir\ndir/file\n!dir", "dir/file", false),
    ] {
        assert_eq!(ignored(patterns, path), expected, "{patterns:?} {path:?}");
    }
}

#[test]
fn parse_malformed_pattern_is_named_with_its_line() {
    for pattern in ["[", "[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[^", "[^bc", "a[", "\\", "a\\", "[b-a]", "!", "! ", "![", "[\\"] {
        let refused = Ignore::parse(format!("# comment\n\n{pattern}\n").as_bytes());
        assert_eq!(refused, Err(IgnoreError::Malformed { line: 3, pattern: pattern.trim().to_owned() }), "{pattern:?}");
    }
    assert_eq!(Ignore::parse(b"ok\n\xff"), Err(IgnoreError::NotText { line: 2 }));
    assert_eq!(Ignore::parse(&vec![b'\n'; MAX_BYTES + 1]), Err(IgnoreError::TooLarge));
    assert!(Ignore::parse("a\n".repeat(MAX_PATTERNS).as_bytes()).is_ok());
    assert_eq!(Ignore::parse("a\n".repeat(MAX_PATTERNS + 1).as_bytes()), Err(IgnoreError::TooMany));
}

#[test]
fn may_keep_below_is_true_only_where_an_exception_could_match() {
    let ignore = Ignore::parse(b"*\n!src/app\n!**/*.md").unwrap();
    assert!(ignore.may_keep_below("anything"));
    let ignore = Ignore::parse(b"*\n!src/app").unwrap();
    let kept = ["src", "src/app", "src/app/deep", "source", "sr", "node_modules"].map(|directory| ignore.may_keep_below(directory));
    assert_eq!(kept, [true, true, true, false, false, false]);
    assert!(!Ignore::parse(b"*").unwrap().may_keep_below("src"));
}

#[test]
fn ignores_is_stopped_between_directories() {
    let ignore = Ignore::parse(b"x").unwrap();
    let mut asked = 0;
    let stopped = Judge::new(&ignore).ignores("a/b/c", || {
        asked += 1;
        if asked == 2 { Err("enough") } else { Ok(()) }
    });
    assert_eq!(stopped, Err("enough"));
}

#[test]
fn ignores_many_stars_takes_no_time() {
    let pattern = format!("{}x", "**/*a".repeat(100));
    assert!(!ignored(&pattern, &format!("{}b", "aa/".repeat(99))));
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[abc.]{1,3}", 1..4).prop_map(|components| components.join("/"))
}

fn pattern() -> impl Strategy<Value = String> {
    prop::collection::vec(prop_oneof!["[abc.]{1,2}", Just("*".to_owned()), Just("**".to_owned()), Just("?".to_owned())], 1..4)
        .prop_map(|components| components.join("/"))
}

/// The meaning of a pattern without quirks, told by trying every way to match.
fn reference(pattern: &[char], path: &[char]) -> bool {
    match pattern {
        [] => path.is_empty(),
        ['*', '*'] => true,
        ['*', '*', '/', rest @ ..] => {
            reference(rest, path) || path.iter().enumerate().any(|(at, char)| *char == '/' && reference(rest, &path[at + 1..]))
        }
        ['*', rest @ ..] => {
            let longest = path.iter().position(|char| *char == '/').unwrap_or(path.len());
            (0..=longest).any(|taken| reference(rest, &path[taken..]))
        }
        [wanted, rest @ ..] => {
            path.split_first().is_some_and(|(char, left)| (wanted == char || (*wanted == '?' && *char != '/')) && reference(rest, left))
        }
    }
}

proptest! {
    #[test]
    fn matches_agrees_with_trying_every_way(pattern in pattern(), path in path()) {
        let text = clean(&pattern);
        let parsed = Pattern::parse(&pattern).unwrap();
        let (chars, target): (Vec<char>, Vec<char>) = (text.chars().collect(), path.chars().collect());
        prop_assert_eq!(parsed.matches(&path), !text.is_empty() && reference(&chars, &target), "{} {}", pattern, path);
    }

    #[test]
    fn ignores_does_not_depend_on_the_order_of_questions(
        patterns in prop::collection::vec((any::<bool>(), pattern()), 0..6), paths in prop::collection::vec(path(), 1..8),
    ) {
        let text: String = patterns.iter().map(|(exception, pattern)| format!("{}{pattern}\n", if *exception { "!" } else { "" })).collect();
        let ignore = Ignore::parse(text.as_bytes()).unwrap();
        let mut judge = Judge::new(&ignore);
        for path in &paths {
            let Ok(found) = judge.ignores(path, || Ok::<_, Infallible>(()));
            prop_assert_eq!(found, ignored(&text, path), "{} of {:?}", path, paths);
        }
    }

    #[test]
    fn ignores_below_an_ignored_directory_everything_unless_an_exception_may_keep_it(
        patterns in prop::collection::vec((any::<bool>(), pattern()), 0..6), path in path(), below in path(),
    ) {
        let text: String = patterns.iter().map(|(exception, pattern)| format!("{}{pattern}\n", if *exception { "!" } else { "" })).collect();
        if ignored(&text, &path) && !Ignore::parse(text.as_bytes()).unwrap().may_keep_below(&path) {
            let below = format!("{path}/{below}");
            prop_assert!(ignored(&text, &below), "{} {}", text, below);
        }
    }

    #[test]
    fn parse_takes_any_bytes_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), path in "\\PC{1,20}") {
        if let Ok(ignore) = Ignore::parse(&bytes) {
            let _ = Judge::new(&ignore).ignores(&path, || Ok::<_, Infallible>(()));
        }
    }
}
