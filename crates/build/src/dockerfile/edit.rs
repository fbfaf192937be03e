//! Changes to a Dockerfile's text.

use std::{
    collections::BTreeMap,
    fmt::Write,
    ops::Range,
    path::{Component, Path},
};

use super::{
    Problem,
    scan::{self, Instruction},
};

/// Text that takes the place of other text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Edit {
    pub(super) span: Range<usize>,
    pub(super) text: String,
}

/// Makes the edits. Where two overlap, the larger one counts. Each keeps at least the number of lines that it replaces.
pub(super) fn apply(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|edit| (edit.span.start, std::cmp::Reverse(edit.span.end)));
    let mut edited = String::with_capacity(text.len());
    let mut done = 0;
    for edit in edits {
        if edit.span.start < done {
            continue;
        }
        edited.push_str(&text[done..edit.span.start]);
        edited.push_str(&edit.text);
        let lines = |text: &str| text.matches('\n').count();
        for _ in lines(&edit.text)..lines(&text[edit.span.clone()]) {
            edited.push('\n');
        }
        done = edit.span.end;
    }
    edited.push_str(&text[done..]);
    edited
}

/// `COPY --parents` in the words of BuildKits that do not know it: everything is left out except what matches, which keeps its path.
/// One instruction for each directory that paths are relative to (the part before `/./`).
pub(super) fn parents(instruction: &Instruction, context: &Path) -> Result<Edit, Problem> {
    let name = &instruction.name;
    if instruction.has_heredoc {
        return Err(Problem::ParentsOfHeredoc(name.clone()));
    }
    let mut flags = String::new();
    for flag in instruction.flags() {
        if !flag.text.starts_with("--parents") {
            let octal = flag.text.strip_prefix("--chmod=0o").map(|mode| format!("--chmod={mode}"));
            let _ = write!(flags, "{} ", octal.as_deref().unwrap_or(&flag.text));
        }
    }
    let written: Vec<&str> = instruction.arguments().iter().map(|word| word.text.as_str()).collect();
    let joined = written.join(" ");
    // The form for paths with spaces.
    let listed: Option<Vec<String>> = serde_json::from_str(&joined).ok();
    let mut paths = listed.unwrap_or_else(|| written.iter().map(|word| scan::unquote(word)).collect());
    let Some(destination) = paths.pop().filter(|_| !paths.is_empty()) else {
        // BuildKit says what is missing.
        return Ok(Edit { span: instruction.span.clone(), text: format!("{name} {flags}{joined}") });
    };
    let destination = if destination.ends_with('/') { destination } else { format!("{destination}/") };
    let from_context = !instruction.flags().iter().any(|flag| flag.text.starts_with("--from="));
    let mut patterns: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in &paths {
        let (base, pattern) = path.split_once("/./").unwrap_or((".", path));
        let pattern = clean(pattern);
        if from_context && !path.contains(['*', '?', '[', '$']) && !exists(context, &format!("{base}/{pattern}")) {
            return Err(Problem::Missing { instruction: name.clone(), path: path.clone() });
        }
        patterns.entry(if base.is_empty() { "/".to_owned() } else { base.to_owned() }).or_default().push(pattern);
    }
    let mut text = String::new();
    for (base, patterns) in patterns {
        let separator = if text.is_empty() { "" } else { "\n" };
        let _ = write!(text, "{separator}{name} --exclude=** ");
        for pattern in patterns {
            let _ = write!(text, "--exclude={} ", quoted(&format!("!{pattern}")));
        }
        // Exclusions of its author's come last, because the last pattern that matches decides.
        let _ = write!(text, "{flags}{}", serde_json::json!([base, destination]));
    }
    Ok(Edit { span: instruction.span.clone(), text })
}

/// A pattern relative to its directory: without `./` and `/` at its start, and without `/` at its end.
fn clean(pattern: &str) -> String {
    let mut pattern = pattern;
    while let Some(rest) = pattern.strip_prefix("./").or_else(|| pattern.strip_prefix('/')) {
        pattern = rest;
    }
    let pattern = pattern.trim_end_matches('/');
    // All of the directory.
    if pattern.is_empty() || pattern == "." { "**".to_owned() } else { pattern.to_owned() }
}

/// Flags are split at white space, and quotes inside them are taken off.
fn quoted(value: &str) -> String {
    if value.contains(char::is_whitespace) { format!("\"{value}\"") } else { value.to_owned() }
}

/// Whether a path without wildcards is below the context. Links are not followed: they may lead anywhere on the host, and BuildKit says what
/// is missing behind them.
fn exists(context: &Path, path: &str) -> bool {
    let mut found = context.to_owned();
    for component in Path::new(path).components() {
        let Component::Normal(name) = component else { continue };
        if name == "**" {
            return true;
        }
        found.push(name);
        match found.symlink_metadata() {
            Ok(metadata) if metadata.is_symlink() => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
    true
}
