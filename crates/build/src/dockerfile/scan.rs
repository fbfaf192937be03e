//! Instructions and their words, with where they stand in the text. Follows BuildKit's rules for comments, continued lines and
//! here-documents, so that nothing inside a here-document is taken for an instruction.

use std::ops::Range;

/// A word of an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    /// As it is written, quotes included, without line continuations.
    pub(super) text: String,
    /// Bytes of the Dockerfile.
    pub(super) span: Range<usize>,
}

/// One instruction.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// In upper case.
    pub(super) name: String,
    /// Number of its first line, from 1.
    pub(super) line: usize,
    /// From its name to the end of its last continued line, here-documents left out.
    pub(super) span: Range<usize>,
    /// Behind the name.
    words: Vec<Word>,
    flags: usize,
    pub(super) has_heredoc: bool,
}

impl Instruction {
    /// The words that begin with `--`, up to the first that does not.
    pub(super) fn flags(&self) -> &[Word] {
        &self.words[..self.flags]
    }

    pub(super) fn arguments(&self) -> &[Word] {
        &self.words[self.flags..]
    }
}

/// A parser directive, `# name=value` before anything else.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Directive {
    pub(super) value: String,
    pub(super) line: usize,
    pub(super) span: Range<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Directives {
    pub(super) syntax: Option<Directive>,
}

/// A line without its end.
struct Line<'a> {
    text: &'a str,
    start: usize,
}

pub(super) fn scan(text: &str) -> (Directives, Vec<Instruction>) {
    let mut directives = Directives::default();
    let mut escape = '\\';
    let lines = lines(text);
    // BuildKit looks for a frontend behind the name of an interpreter too. For its parser that is a comment, which ends the directives.
    if lines.first().is_some_and(|line| without_mark(line.text).starts_with("#!")) {
        for (number, line) in lines.iter().enumerate().skip(1) {
            match directive(line.text) {
                Some((name, value)) if name == "syntax" => {
                    directives.syntax = Some(Directive { value, line: number + 1, span: line.start..line.start + line.text.len() });
                    break;
                }
                Some(_) => {}
                None => break,
            }
        }
    }
    let mut next = 0;
    while let Some((name, value)) = lines.get(next).and_then(|line| directive(line.text)) {
        let line = &lines[next];
        match name.as_str() {
            "escape" => escape = value.chars().next().filter(|escape| matches!(escape, '\\' | '`')).unwrap_or('\\'),
            "syntax" if directives.syntax.is_none() => {
                let span = line.start..line.start + line.text.len();
                directives.syntax = Some(Directive { value, line: next + 1, span });
            }
            _ => {}
        }
        next += 1;
    }
    let mut instructions = Vec::new();
    while next < lines.len() {
        if is_blank(lines[next].text) {
            next += 1;
            continue;
        }
        let (instruction, end) = instruction(&lines, next, escape);
        instructions.push(instruction);
        next = end;
    }
    (directives, instructions)
}

fn lines(text: &str) -> Vec<Line<'_>> {
    let mut start = 0;
    let mut lines = Vec::new();
    for line in text.split_inclusive('\n') {
        lines.push(Line { text: line.trim_end_matches(['\n', '\r']), start });
        start += line.len();
    }
    lines
}

/// A byte order mark may come first.
fn without_mark(line: &str) -> &str {
    line.trim_start_matches('\u{feff}')
}

/// The beginning of a file that names its frontend in another way than a Dockerfile does: `// syntax=` or `{"syntax": `. BuildKit obeys that.
pub(super) fn foreign(text: &str) -> Option<(usize, &'static str)> {
    let mut lines = lines(text).into_iter().enumerate().skip_while(|(number, line)| {
        let line = without_mark(line.text);
        line.trim().is_empty() || *number == 0 && line.starts_with("#!")
    });
    let (number, line) = lines.next()?;
    let start = without_mark(line.text).trim_start();
    ["//", "{"].into_iter().find(|sign| start.starts_with(sign)).map(|sign| (number + 1, sign))
}

fn directive(line: &str) -> Option<(String, String)> {
    let line = without_mark(line).trim().strip_prefix('#')?;
    let (name, value) = line.split_once('=')?;
    let name = name.trim();
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_name.then(|| (name.to_ascii_lowercase(), value.trim().to_owned()))
}

/// Empty, or a comment.
fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// The instruction that begins in a line, and the number of the line behind it and its here-documents.
fn instruction(lines: &[Line<'_>], first: usize, escape: char) -> (Instruction, usize) {
    let mut parts = Vec::new();
    let mut next = first;
    let mut end = lines[first].start + lines[first].text.len();
    while let Some(line) = lines.get(next) {
        next += 1;
        // Comments and empty lines do not end an instruction that goes on.
        if next - 1 > first && is_blank(line.text) {
            continue;
        }
        end = line.start + line.text.len();
        match continued(line.text, escape) {
            Some(part) => parts.push((part, line.start)),
            None => {
                parts.push((line.text, line.start));
                break;
            }
        }
    }
    let mut words = words(&parts, escape);
    let name = if words.is_empty() { None } else { Some(words.remove(0)) };
    let start = name.as_ref().map_or(lines[first].start, |name| name.span.start);
    let mut name = name.map(|name| name.text.to_ascii_uppercase()).unwrap_or_default();
    if name == "ONBUILD" && words.first().is_some_and(|word| takes_heredocs(&word.text.to_ascii_uppercase())) {
        // Not carried out here, but its here-documents have to be passed over.
        name = format!("ONBUILD {}", words.remove(0).text.to_ascii_uppercase());
    }
    let mut has_heredoc = false;
    if takes_heredocs(name.trim_start_matches("ONBUILD ")) {
        for (terminator, chomp) in words.iter().filter_map(|word| heredoc(&word.text)) {
            has_heredoc = true;
            while let Some(line) = lines.get(next) {
                next += 1;
                let text = if chomp { line.text.trim_start_matches('\t') } else { line.text };
                if text == terminator {
                    break;
                }
            }
        }
    }
    let flags = words.iter().take_while(|word| word.text.starts_with("--") && word.text.len() > 2).count();
    (Instruction { name, line: first + 1, span: start..end, words, flags, has_heredoc }, next)
}

fn takes_heredocs(name: &str) -> bool {
    matches!(name, "RUN" | "COPY" | "ADD")
}

/// The line without its escape, if the next one continues it.
fn continued(line: &str, escape: char) -> Option<&str> {
    let part = line.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!part.ends_with(escape)).then_some(part)
}

/// Terminator of a here-document, and whether leading tabs are taken off its lines.
fn heredoc(word: &str) -> Option<(String, bool)> {
    let word = word.trim_start_matches(|character: char| character.is_ascii_digit()).strip_prefix("<<")?;
    let (word, chomp) = word.strip_prefix('-').map_or((word, false), |rest| (rest, true));
    if word.contains('<') {
        return None;
    }
    let name = unquote(word);
    (!name.is_empty()).then_some((name, chomp))
}

/// Splits at white space outside quotes.
fn words(parts: &[(&str, usize)], escape: char) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    let mut current: Option<Word> = None;
    let mut quote = None;
    let mut escaped = false;
    for (part, start) in parts {
        for (offset, character) in part.char_indices() {
            let at = start + offset;
            if quote.is_none() && !escaped && character.is_whitespace() {
                words.extend(current.take());
                continue;
            }
            let word = current.get_or_insert_with(|| Word { text: String::new(), span: at..at });
            word.text.push(character);
            word.span.end = at + character.len_utf8();
            match quote {
                _ if escaped => escaped = false,
                Some('\'') if character != '\'' => {}
                _ if character == escape => escaped = true,
                Some(open) if open == character => quote = None,
                None if matches!(character, '\'' | '"') => quote = Some(character),
                _ => {}
            }
        }
    }
    words.extend(current);
    words
}

/// The text without its quotes, as a shell would have it.
pub(super) fn unquote(text: &str) -> String {
    let mut plain = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (None, '\'' | '"') => quote = Some(character),
            (None | Some('"'), '\\') => plain.extend(characters.next()),
            _ => plain.push(character),
        }
    }
    plain
}
