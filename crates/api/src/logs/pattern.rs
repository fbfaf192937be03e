//! Filter patterns of unstructured text: terms and quoted phrases that a message has to have, `-` before what it must not have, `?` before what
//! will do (CloudWatch Logs user guide, "Filter pattern syntax"). Upper and lower case are different.

/// A pattern that is not understood. The text goes to the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PatternError {
    /// `{ $.member = … }`
    #[error("Invalid filter pattern: JSON patterns are not supported by Hearth; use terms such as \"a phrase\" -without ?either ?or")]
    Json,
    /// `[a, b, …]`
    #[error(
        "Invalid filter pattern: space-delimited patterns are not supported by Hearth; use terms such as \"a phrase\" -without ?either ?or"
    )]
    Columns,
    /// `%expression%`
    #[error("Invalid filter pattern: regular expressions are not supported by Hearth; use terms such as \"a phrase\" -without ?either ?or")]
    Expression,
    /// a quote is left open
    #[error("Invalid filter pattern: a double quote is not closed")]
    Unclosed,
    /// a term that should be quoted, or nothing where one should be
    #[error("Invalid character(s) in term '{0}'")]
    Term(String),
}

/// What a message is held against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pattern {
    all: Vec<String>,
    none: Vec<String>,
    /// Counts only when there is nothing else, as on AWS.
    any: Vec<String>,
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        match text.trim_start().chars().next() {
            Some('{') => return Err(PatternError::Json),
            Some('[') => return Err(PatternError::Columns),
            Some('%') => return Err(PatternError::Expression),
            _ => {}
        }
        let mut pattern = Self::default();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let (terms, after) = match rest.chars().next() {
                Some('-') => (&mut pattern.none, &rest[1..]),
                Some('?') => (&mut pattern.any, &rest[1..]),
                _ => (&mut pattern.all, rest),
            };
            let (term, after) = term(after)?;
            terms.push(term);
            rest = after.trim_start();
        }
        Ok(pattern)
    }

    pub fn matches(&self, message: &str) -> bool {
        let has = |term: &String| message.contains(term.as_str());
        if self.all.is_empty() && self.none.is_empty() && !self.any.is_empty() {
            return self.any.iter().any(has);
        }
        self.all.iter().all(has) && !self.none.iter().any(has)
    }
}

/// Takes one term off the front.
fn term(text: &str) -> Result<(String, &str), PatternError> {
    if let Some(quoted) = text.strip_prefix('"') {
        let mut term = String::new();
        let mut chars = quoted.char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                '"' => return Ok((term, &quoted[at + 1..])),
                '\\' => match chars.next() {
                    Some((_, escaped @ ('"' | '\\'))) => term.push(escaped),
                    Some((_, other)) => term.extend(['\\', other]),
                    None => break,
                },
                char => term.push(char),
            }
        }
        return Err(PatternError::Unclosed);
    }
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let (term, rest) = text.split_at(end);
    if term.is_empty() || !term.chars().all(|char| char.is_alphanumeric() || char == '_') {
        return Err(PatternError::Term(term.to_owned()));
    }
    Ok((term.to_owned(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_held_against_terms() {
        for (pattern, matching, other) in [
            ("", &["", "anything"][..], &[][..]),
            ("  ", &["anything"], &[]),
            ("ERROR", &["an ERROR", "ERRORS"], &["error"]),
            ("ERROR disk", &["disk ERROR"], &["ERROR", "disk"]),
            ("\"disk full\"", &["the disk full"], &["full disk"]),
            ("ERROR -retry", &["ERROR"], &["ERROR retry", "fine"]),
            ("-\"a b\"", &["ab"], &["a b"]),
            ("?ERROR ?WARN", &["ERROR", "WARN"], &["INFO"]),
            ("?ERROR INFO", &["INFO"], &["ERROR"]),
            (r#""say \"hi\" \\ \n""#, &[r#"say "hi" \ \n"#], &["say hi"]),
            ("\"a\"\"b\"", &["b a"], &["a"]),
            ("ü_1", &["ü_1"], &["u_1"]),
        ] {
            let parsed = Pattern::parse(pattern).unwrap();
            assert!(matching.iter().all(|message| parsed.matches(message)), "{pattern}");
            assert!(!other.iter().any(|message| parsed.matches(message)), "{pattern}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (pattern, error) in [
            ("{ $.level = \"error\" }", PatternError::Json),
            (" [ip, user]", PatternError::Columns),
            ("%a+%", PatternError::Expression),
            ("a \"b", PatternError::Unclosed),
            ("\"b\\", PatternError::Unclosed),
            ("a:b", PatternError::Term("a:b".to_owned())),
            ("- a", PatternError::Term(String::new())),
            ("?", PatternError::Term(String::new())),
        ] {
            assert_eq!(Pattern::parse(pattern), Err(error), "{pattern}");
        }
    }
}
