//! `.dockerignore`: the paths that a build context leaves out.
//!
//! Patterns mean what they mean to BuildKit, which is not what they mean to git: each is anchored at the root of the context, `**` stands
//! for any number of directories, and the last pattern that matches a path or a directory above it decides. The matcher is written here
//! because no crate has these rules. It is no regular expression: patterns come from a tenant, and a match must cost no more than the
//! pattern's length times the path's.

use std::str;

/// Files of patterns. The first that is there counts.
pub const IGNORE_FILES: [&str; 2] = ["Dockerfile.dockerignore", ".dockerignore"];
/// Most bytes of a file of patterns.
pub const MAX_BYTES: usize = 256 << 10;
/// Most patterns of one file.
pub const MAX_PATTERNS: usize = 10_000;

/// A file of patterns cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IgnoreError {
    /// the file is too large
    #[error("it is larger than {} KiB", MAX_BYTES >> 10)]
    TooLarge,
    /// the file has too many lines
    #[error("it has more than {MAX_PATTERNS} patterns")]
    TooMany,
    /// the file is not text
    #[error("line {line} is not UTF-8")]
    NotText {
        /// Counted from 1.
        line: usize,
    },
    /// a pattern is not one
    #[error("line {line}: the pattern \"{}\" is malformed", pattern.escape_debug())]
    Malformed {
        /// Counted from 1.
        line: usize,
        /// As it was written.
        pattern: String,
    },
}

/// The patterns of one file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Ignore {
    patterns: Vec<Pattern>,
}

impl Ignore {
    /// Reads a `.dockerignore`.
    pub fn parse(bytes: &[u8]) -> Result<Self, IgnoreError> {
        if bytes.len() > MAX_BYTES {
            return Err(IgnoreError::TooLarge);
        }
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut patterns = Vec::new();
        for (index, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = index + 1;
            let text = str::from_utf8(bytes).map_err(|_| IgnoreError::NotText { line })?;
            let written = text.trim();
            // A comment begins in the first column; elsewhere the sign belongs to a name.
            if text.starts_with('#') || written.is_empty() {
                continue;
            }
            let pattern = Pattern::parse(written).ok_or_else(|| IgnoreError::Malformed { line, pattern: written.to_owned() })?;
            if patterns.len() == MAX_PATTERNS {
                return Err(IgnoreError::TooMany);
            }
            patterns.push(pattern);
        }
        Ok(Self { patterns })
    }

    /// Whether a directory that is ignored may hold paths that an exception keeps.
    pub fn may_keep_below(&self, directory: &str) -> bool {
        self.patterns.iter().filter(|pattern| pattern.exception).any(|pattern| pattern.may_match_below(directory))
    }

    /// The patterns' word on one path, given their word on its parent directory.
    fn verdict(&self, parent: &Verdict, path: &str) -> Verdict {
        let mut verdict = Verdict { matches: vec![false; self.patterns.len()], ignored: false };
        for (index, pattern) in self.patterns.iter().enumerate() {
            let inherited = parent.matches.get(index).copied().unwrap_or(false);
            // BuildKit does not try a pattern that could change nothing, nor does it remember for the paths below that it might have matched.
            if !inherited && pattern.exception != verdict.ignored {
                continue;
            }
            if inherited || pattern.matches(path) {
                verdict.matches[index] = true;
                verdict.ignored = !pattern.exception;
            }
        }
        verdict
    }
}

/// What the patterns say of a path.
#[derive(Debug, Default, Clone)]
struct Verdict {
    /// For each pattern, whether it matches the path or a directory above it.
    matches: Vec<bool>,
    ignored: bool,
}

/// Answers for one path after another. Neighbours cost least, because what was found about the directories above the last path is kept.
#[derive(Debug)]
pub struct Judge<'a> {
    ignore: &'a Ignore,
    /// The directories above the last path, outermost first.
    above: Vec<(String, Verdict)>,
}

impl<'a> Judge<'a> {
    /// Judges by these patterns.
    pub fn new(ignore: &'a Ignore) -> Self {
        Self { ignore, above: Vec::new() }
    }

    /// Whether a path is left out. It is relative to the context, with slashes, and has neither `.` nor `..`. `go_on` is asked before each
    /// directory of the path, because many patterns and long paths take a while.
    pub fn ignores<E>(&mut self, path: &str, mut go_on: impl FnMut() -> Result<(), E>) -> Result<bool, E> {
        if self.ignore.patterns.is_empty() {
            return Ok(false);
        }
        let is_above = |directory: &str| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
        while self.above.last().is_some_and(|(directory, _)| !is_above(directory)) {
            self.above.pop();
        }
        let known = self.above.last().map_or(0, |(directory, _)| directory.len() + 1);
        for (slash, _) in path.match_indices('/').filter(|(slash, _)| *slash >= known) {
            go_on()?;
            let directory = &path[..slash];
            let verdict = self.ignore.verdict(self.parent(), directory);
            self.above.push((directory.to_owned(), verdict));
        }
        go_on()?;
        Ok(self.ignore.verdict(self.parent(), path).ignored)
    }

    fn parent(&self) -> &Verdict {
        const ROOT: &Verdict = &Verdict { matches: Vec::new(), ignored: false };
        self.above.last().map_or(ROOT, |(_, verdict)| verdict)
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    /// Keeps what it matches.
    exception: bool,
    tokens: Vec<Token>,
    /// The path itself, if the pattern has no wildcard.
    literal: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`: one character of a name.
    Any,
    /// `[a-z]`, `[^a-z]`: one character, which may be a slash.
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    /// `*`: any part of a name.
    Star,
    /// The next token and the step into it may be left out: the head of [`Token::Directories`].
    Optional,
    /// `**`: anything that ends with a slash.
    Directories,
    /// `**` at the end: anything.
    Rest,
}

impl Pattern {
    /// A line without space around it. `None` if it is malformed.
    fn parse(line: &str) -> Option<Self> {
        let (exception, text) = match line.strip_prefix('!') {
            Some(text) => (true, text.trim()),
            None => (false, line),
        };
        if text.is_empty() {
            return None;
        }
        let text = clean(text);
        let tokens = tokens(&text)?;
        let plain = tokens.iter().all(|token| matches!(token, Token::Char(_)));
        let literal =
            plain.then(|| tokens.iter().filter_map(|token| if let Token::Char(char) = token { Some(char) } else { None }).collect());
        Some(Self { exception, tokens, literal })
    }

    fn matches(&self, path: &str) -> bool {
        if let Some(literal) = &self.literal {
            return path == literal;
        }
        // The tokens that may come next. All are followed at once, so nothing is ever tried twice.
        let mut now = vec![false; self.tokens.len() + 1];
        let mut next = now.clone();
        now[0] = true;
        self.skip(&mut now);
        for char in path.chars() {
            next.fill(false);
            for (at, token) in self.tokens.iter().enumerate().filter(|(at, _)| now[*at]) {
                match token {
                    Token::Char(wanted) => next[at + 1] |= *wanted == char,
                    Token::Any => next[at + 1] |= char != '/',
                    Token::Class { negated, ranges } => {
                        let within = ranges.iter().any(|(low, high)| (*low..=*high).contains(&char));
                        next[at + 1] |= within != *negated;
                    }
                    Token::Star => next[at] |= char != '/',
                    Token::Rest => next[at] = true,
                    Token::Directories => {
                        next[at] = true;
                        next[at + 1] |= char == '/';
                    }
                    Token::Optional => {}
                }
            }
            self.skip(&mut next);
            std::mem::swap(&mut now, &mut next);
        }
        now[self.tokens.len()]
    }

    /// Adds the tokens that may come next because those before them may stand for nothing.
    fn skip(&self, reached: &mut [bool]) {
        for at in 0..self.tokens.len() {
            if reached[at] {
                match self.tokens[at] {
                    Token::Star | Token::Rest => reached[at + 1] = true,
                    Token::Optional => {
                        reached[at + 1] = true;
                        reached[at + 2] = true;
                    }
                    _ => {}
                }
            }
        }
    }

    fn may_match_below(&self, directory: &str) -> bool {
        let mut rest = directory.chars();
        for token in &self.tokens {
            let Token::Char(wanted) = token else { return true };
            match rest.next() {
                Some(char) if char == *wanted => {}
                Some(_) => return false,
                None => return *wanted == '/',
            }
        }
        // An exception that names the directory itself, or one above it, keeps all of it.
        rest.next().is_none_or(|char| char == '/')
    }
}

/// The shortest way to write a path: without `.`, empty components, a slash at either end, and `..` where there is something to go back to.
fn clean(path: &str) -> String {
    let mut components: Vec<&str> = Vec::new();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." if components.last().is_some_and(|last| *last != "..") => drop(components.pop()),
            ".." if path.starts_with('/') => {}
            component => components.push(component),
        }
    }
    components.join("/")
}

fn tokens(pattern: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '*' if chars.next_if_eq(&'*').is_some() => {
                let slash = chars.next_if_eq(&'/').is_some();
                let rest = chars.clone();
                let at_start = tokens.is_empty();
                if chars.peek().is_none() || (at_start && !slash && !rest.into_iter().any(|char| "*?[]\\".contains(char))) {
                    // At the end; or before nothing but a name's end, as in "**.txt".
                    tokens.push(Token::Rest);
                } else {
                    tokens.extend([Token::Optional, Token::Directories]);
                }
            }
            '*' => tokens.push(Token::Star),
            '?' => tokens.push(Token::Any),
            '[' => tokens.push(class(&mut chars)?),
            '\\' => tokens.push(Token::Char(chars.next()?)),
            char => tokens.push(Token::Char(char)),
        }
    }
    Some(tokens)
}

/// What follows a `[`, up to and with its `]`.
fn class(chars: &mut std::iter::Peekable<str::Chars<'_>>) -> Option<Token> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
        let low = class_char(chars)?;
        let high = if chars.next_if_eq(&'-').is_some() { class_char(chars)? } else { low };
        if high < low {
            return None;
        }
        ranges.push((low, high));
    }
    Some(Token::Class { negated, ranges })
}

fn class_char(chars: &mut std::iter::Peekable<str::Chars<'_>>) -> Option<char> {
    match chars.next()? {
        '-' | ']' => None,
        '\\' => chars.next(),
        char => Some(char),
    }
}

#[cfg(test)]
mod tests;
