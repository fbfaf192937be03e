//! Patterns of policy documents: `*` for any run of characters, `?` for one, `${key}` and `${key, 'default'}` for a value of the request.
//!
//! A variable's value stands for itself: wildcards and colons in it mean nothing.

use crate::condition::Context;

/// A compiled pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Char(char),
    One,
    Many,
    Variable { key: String, default: Option<String> },
}

impl Pattern {
    /// Compiles a pattern. `variables` is false for documents of before 2012, in which `$` is a character like any other.
    pub fn parse(text: &str, variables: bool) -> Result<Self, String> {
        let mut pieces = Vec::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            if variables && let Some(inside) = rest.strip_prefix("${") {
                let (inside, after) = inside.split_once('}').ok_or_else(|| format!("the variable in '{text}' has no end"))?;
                pieces.push(variable(inside).ok_or_else(|| format!("'${{{inside}}}' is not a policy variable"))?);
                rest = after;
                continue;
            }
            pieces.push(match first {
                '*' => Piece::Many,
                '?' => Piece::One,
                other => Piece::Char(other),
            });
            rest = &rest[first.len_utf8()..];
        }
        Ok(Self(pieces))
    }

    /// Whether it matches all of a text, wildcards included.
    pub fn matches(&self, text: &str, context: &Context) -> bool {
        self.expand(context).is_some_and(|pieces| glob(&pieces, &text.chars().collect::<Vec<_>>()))
    }

    /// The same, without regard to case.
    pub fn matches_ignoring_case(&self, text: &str, context: &Context) -> bool {
        let lower = |piece: Piece| match piece {
            Piece::Char(c) => Piece::Char(c.to_ascii_lowercase()),
            other => other,
        };
        let text: Vec<char> = text.chars().map(|c| c.to_ascii_lowercase()).collect();
        self.expand(context).is_some_and(|pieces| glob(&pieces.into_iter().map(lower).collect::<Vec<_>>(), &text))
    }

    /// The text that the pattern is when its variables have their values and wildcards are taken for themselves.
    pub fn text(&self, context: &Context) -> Option<String> {
        let pieces = self.expand(context)?;
        let text = pieces.iter().map(|piece| match piece {
            Piece::Char(c) => *c,
            Piece::One => '?',
            Piece::Many | Piece::Variable { .. } => '*',
        });
        Some(text.collect())
    }

    /// The pattern with its variables replaced, or `None` if one of them has no value: nothing matches then.
    fn expand(&self, context: &Context) -> Option<Vec<Piece>> {
        let mut expanded = Vec::with_capacity(self.0.len());
        for piece in &self.0 {
            match piece {
                Piece::Variable { key, default } => {
                    let value = context.single(key).or(default.as_deref())?;
                    expanded.extend(value.chars().map(Piece::Char));
                }
                other => expanded.push(other.clone()),
            }
        }
        Some(expanded)
    }

    /// Cuts the pattern at its first five colons, as ARNs are.
    fn segments(&self) -> Vec<Self> {
        let parts = self.0.splitn(6, |piece| *piece == Piece::Char(':'));
        parts.map(|part| Self(part.to_vec())).collect()
    }
}

/// What stands in `${…}`. `${*}`, `${?}` and `${$}` are the characters themselves.
fn variable(inside: &str) -> Option<Piece> {
    if let "*" | "?" | "$" = inside {
        return inside.chars().next().map(Piece::Char);
    }
    let (key, default) = match inside.split_once(',') {
        Some((key, default)) => {
            let default = default.trim().strip_prefix('\'').and_then(|text| text.strip_suffix('\''))?;
            (key.trim(), Some(default.to_owned()))
        }
        None => (inside.trim(), None),
    };
    let known = |c: char| c.is_ascii_alphanumeric() || ":/-_.+=@".contains(c);
    (key.contains(':') && key.chars().all(known)).then(|| Piece::Variable { key: key.to_owned(), default })
}

/// Matches with one point to go back to: a later `*` makes earlier ones settled. At most the product of the lengths.
fn glob(pattern: &[Piece], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(Piece::Many) => {
                back = Some((p, t));
                p += 1;
            }
            Some(Piece::One) => (p, t) = (p + 1, t + 1),
            Some(Piece::Char(c)) if *c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match back {
                Some((star, from)) => {
                    back = Some((star, from + 1));
                    (p, t) = (star + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|piece| *piece == Piece::Many)
}

/// A pattern for ARNs: wildcards stay within one of the first five parts, or within the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ArnPattern {
    /// `*`: every resource, also where an action has none.
    Any,
    /// Parts that are missing at the end are `*`.
    Parts(Vec<Pattern>),
}

impl ArnPattern {
    /// Compiles `*` or the pattern of an ARN.
    pub fn parse(text: &str, variables: bool) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if !text.starts_with("arn:") {
            return Err(format!("'{text}' is neither '*' nor the ARN of a resource"));
        }
        Ok(Self::Parts(Pattern::parse(text, variables)?.segments()))
    }

    /// Whether it matches a resource.
    pub fn matches(&self, arn: &str, context: &Context) -> bool {
        let Self::Parts(patterns) = self else { return true };
        let parts: Vec<&str> = arn.splitn(6, ':').collect();
        parts.len() == 6 && parts.iter().enumerate().all(|(at, part)| patterns.get(at).is_none_or(|pattern| pattern.matches(part, context)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Pattern::parse(pattern, true).unwrap().matches(text, &Context::default())
    }

    #[test]
    fn wildcards_match_runs_and_single_characters() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("a*c", "abbbc", true),
            ("a*c", "ac", true),
            ("a*c", "abcd", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("**", "anything", true),
            ("", "", true),
            ("", "a", false),
            ("a.c", "abc", false),
            ("A", "a", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_variable_s_value_stands_for_itself() {
        let pattern = Pattern::parse("home/${aws:username}/*", true).unwrap();
        let of = |name: &str| Context::default().with("aws:username", name);
        assert!(pattern.matches("home/ann/file", &of("ann")));
        assert!(!pattern.matches("home/ann/file", &of("*")), "no wildcards come with a value");
        assert!(pattern.matches("home/*/file", &of("*")));
        assert!(!pattern.matches("home//file", &Context::default()), "without a value nothing matches");
        let pattern = Pattern::parse("team-${aws:PrincipalTag/team, 'none'}", true).unwrap();
        assert!(pattern.matches("team-none", &Context::default()));
        assert!(Pattern::parse("${*}", true).unwrap().matches("*", &Context::default()));
        assert!(!Pattern::parse("${*}", true).unwrap().matches("x", &Context::default()));
        assert!(Pattern::parse("${aws:username}", false).unwrap().matches("${aws:username}", &of("ann")));
    }

    #[test]
    fn malformed_variables_are_refused() {
        for text in ["${aws:username", "${}", "${user}", "${aws:username, default}", "${aws:user name}"] {
            assert!(Pattern::parse(text, true).is_err(), "{text}");
        }
    }

    #[test]
    fn wildcards_stay_within_a_part_of_an_arn() {
        let image = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
        for (pattern, expected) in [
            ("*", true),
            ("arn:aws:lambda:us-east-1:000000000000:microvm-image:demo", true),
            ("arn:aws:lambda:*:*:microvm-image:de*", true),
            ("arn:aws:lambda:*", true),
            ("arn:*:*:*:*:*", true),
            ("arn:aws:lambda:*:microvm-image:demo", false),
            ("arn:aws:lambda:*:111111111111:*", false),
            ("arn:aws:*demo", false),
            ("arn:aws:s3:*", false),
        ] {
            assert_eq!(ArnPattern::parse(pattern, true).unwrap().matches(image, &Context::default()), expected, "{pattern}");
        }
        assert!(ArnPattern::parse("demo", true).is_err());
        assert!(!ArnPattern::parse("arn:aws:lambda:*", true).unwrap().matches("*", &Context::default()), "an action without a resource");
    }

    /// The definition of a glob, without the haste.
    fn slow(pattern: &[char], text: &[char]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some('*'), _) => slow(&pattern[1..], text) || (!text.is_empty() && slow(pattern, &text[1..])),
            (Some('?'), Some(_)) => slow(&pattern[1..], &text[1..]),
            (Some(a), Some(b)) if a == b => slow(&pattern[1..], &text[1..]),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_match_as_they_are_defined(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(matches(&pattern, &text), slow(&chars(&pattern), &chars(&text)));
        }

        #[test]
        fn any_text_compiles_or_is_refused(text: String) {
            let _ = Pattern::parse(&text, true);
        }
    }
}
