//! Shell patterns as dnf takes them for package names: `*`, `?` and `[…]`.

/// Whether a name has a character that makes it a pattern.
pub fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

/// Whether the whole name matches the pattern. A `[` without its `]` stands for itself.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut seen) = (0, 0);
    // Where to go on after a mismatch: behind the last `*`, which then takes one more character.
    let mut star: Option<(usize, usize)> = None;
    while seen < name.len() {
        if pattern.get(at) == Some(&'*') {
            star = Some((at + 1, seen));
            at += 1;
        } else if let Some(next) = pattern.get(at..).and_then(|rest| one(rest, name[seen])) {
            at += next;
            seen += 1;
        } else if let Some((after, taken)) = star {
            star = Some((after, taken + 1));
            (at, seen) = (after, taken + 1);
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|&character| character == '*')
}

/// How long the first item of a pattern is, if it matches the character.
fn one(pattern: &[char], character: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '[' => {
            // The first member may be `]`.
            let Some(end) = pattern.iter().skip(2).position(|&member| member == ']').map(|found| found + 2) else {
                return (character == '[').then_some(1);
            };
            let (negated, members) = match &pattern[1..end] {
                ['!' | '^', members @ ..] if !members.is_empty() => (true, members),
                members => (false, members),
            };
            let mut found = false;
            let mut rest = members;
            while let [first, after @ ..] = rest {
                if let ['-', last, after @ ..] = after {
                    found |= (*first..=*last).contains(&character);
                    rest = after;
                } else {
                    found |= *first == character;
                    rest = after;
                }
            }
            (found != negated).then_some(end + 1)
        }
        first => (*first == character).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_patterns_take_whole_names() {
        for (pattern, name, expected) in [
            ("php8.2-*", "php8.2-cli", true),
            ("php8.2-*", "php8.2", false),
            ("*noto*mono*", "google-noto-sans-mono-fonts", true),
            ("a*b*c", "abxbc", true),
            ("a*b*c", "abxb", false),
            ("python3.?", "python3.9", true),
            ("python3.?", "python3.11", false),
            ("lib[xy]z", "libyz", true),
            ("lib[!xy]z", "libyz", false),
            ("python3.[0-9]*", "python3.11", true),
            ("[a", "[a", true),
            ("g++", "g++", true),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
