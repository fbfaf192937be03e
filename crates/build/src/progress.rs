//! What BuildKit says of a build (`docker buildx build --progress=rawjson`), as lines for people.
//!
//! Each line of its output is a JSON document of vertices (steps and what BuildKit does around them), transfers, and the output of steps.
//! What is no JSON is its last word: the error, and the part of the Dockerfile that it is about.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::lines::LineSplitter;

/// Lines of the last word that are kept.
const MAX_WORDS: usize = 64;
/// Longest line that is shown of it, and longest name of a step, in bytes: both hold instructions, which may be as long as a Dockerfile.
const MAX_SHOWN: usize = 8 << 10;

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailedStep {
    /// The instruction, without its position.
    pub(crate) instruction: String,
    pub(crate) error: String,
}

/// Turns BuildKit's reports into lines.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Names of the steps that are shown.
    steps: HashMap<String, String>,
    begun: HashSet<String>,
    output: HashMap<String, LineSplitter>,
    failed: Option<FailedStep>,
    words: Vec<String>,
}

#[derive(Deserialize)]
struct Report<'a> {
    #[serde(default)]
    vertexes: Option<Vec<Vertex>>,
    #[serde(default)]
    logs: Option<Vec<Log>>,
    #[serde(default, borrow)]
    warnings: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct Vertex {
    digest: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    started: Option<String>,
    #[serde(default)]
    completed: Option<String>,
    #[serde(default)]
    cached: bool,
    #[serde(default)]
    error: String,
}

#[derive(Deserialize)]
struct Log {
    vertex: String,
    /// In base64.
    data: String,
}

#[derive(Deserialize)]
struct Warning {
    /// In base64.
    short: String,
}

impl Progress {
    /// Takes one line of BuildKit's output and returns the lines to show.
    pub(crate) fn take(&mut self, line: &str) -> Vec<String> {
        let mut shown = Vec::new();
        match serde_json::from_str::<Report<'_>>(line) {
            Ok(report) => self.report(report, &mut shown),
            Err(_) => self.last_word(line),
        }
        shown
    }

    /// What is still to be shown when the output has ended: unfinished lines of steps, and the part of the Dockerfile that failed.
    pub(crate) fn finish(mut self) -> (Vec<String>, Option<FailedStep>) {
        let mut shown: Vec<String> = self.output.values_mut().filter_map(LineSplitter::finish).collect();
        shown.append(&mut self.words);
        (shown, self.failed)
    }

    fn report(&mut self, report: Report<'_>, shown: &mut Vec<String>) {
        let vertices = report.vertexes.unwrap_or_default();
        for vertex in &vertices {
            self.begin(vertex, shown);
        }
        for log in report.logs.unwrap_or_default() {
            let Some(data) = decode(&log.data) else { continue };
            shown.extend(self.output.entry(log.vertex).or_default().push(&data));
        }
        for vertex in vertices {
            self.end(vertex, shown);
        }
        for warning in report.warnings.unwrap_or_default() {
            let text = serde_json::from_str::<Warning>(warning.get()).ok().and_then(|warning| decode(&warning.short));
            shown.extend(text.map(|text| format!("WARNING: {}", String::from_utf8_lossy(&text))));
        }
    }

    fn begin(&mut self, vertex: &Vertex, shown: &mut Vec<String>) {
        if !is_step(&vertex.name) {
            return;
        }
        let name = one_line(&vertex.name);
        if (vertex.started.is_some() || vertex.cached) && self.begun.insert(vertex.digest.clone()) {
            shown.push(if vertex.cached { format!("CACHED {name}") } else { format!("STEP {name}") });
        }
        self.steps.insert(vertex.digest.clone(), name);
    }

    fn end(&mut self, vertex: Vertex, shown: &mut Vec<String>) {
        if vertex.completed.is_none() && vertex.error.is_empty() {
            return;
        }
        shown.extend(self.output.remove(&vertex.digest).and_then(|mut rest| rest.finish()));
        // Steps that are given up because another one failed say so too, later.
        if vertex.error.is_empty() || vertex.error.contains("context canceled") || self.failed.is_some() {
            return;
        }
        let name = self.steps.get(&vertex.digest).cloned().unwrap_or_else(|| one_line(&vertex.name));
        let instruction = name.split_once("] ").map_or(name.as_str(), |(_, instruction)| instruction).to_owned();
        self.failed = Some(FailedStep { instruction, error: plain(&vertex.error) });
    }

    fn last_word(&mut self, line: &str) {
        let line = match line.strip_prefix("ERROR: ") {
            Some(error) => {
                let error = error.trim_start_matches("failed to build: ").trim_start_matches("failed to solve: ");
                format!("ERROR: {}", plain(error))
            }
            None => line.to_owned(),
        };
        if self.words.len() < MAX_WORDS && !line.trim().is_empty() {
            self.words.push(line[..line.floor_char_boundary(MAX_SHOWN)].to_owned());
        }
    }
}

/// Steps are numbered, `[2/6] RUN …` or `[stage 2/6] RUN …`; BuildKit's own work is `[internal] …`, or has no brackets.
fn is_step(name: &str) -> bool {
    let position = name.strip_prefix('[').and_then(|name| name.split_once(']')).map(|(position, _)| position);
    position.is_some_and(|position| {
        let number = position.rsplit(' ').next().unwrap_or_default();
        number.split_once('/').is_some_and(|(step, of)| [step, of].iter().all(|part| part.trim().parse::<u32>().is_ok()))
    })
}

/// Here-documents and continued lines make names of several lines.
fn one_line(name: &str) -> String {
    let (name, rest) = name.split_at(name.floor_char_boundary(MAX_SHOWN));
    let mut line = name.split_whitespace().collect::<Vec<_>>().join(" ");
    if !rest.is_empty() {
        line.push('…');
    }
    line
}

/// The error without BuildKit's own identifiers.
fn plain(error: &str) -> String {
    let mut text = error.trim();
    for internal in ["failed to compute cache key: ", "failed to calculate checksum of ref "] {
        if let Some(rest) = text.strip_prefix(internal) {
            text = rest;
        }
    }
    // "<session>::<reference>: " is left of the checksum's error.
    if let Some((reference, rest)) = text.split_once(": ")
        && reference.contains("::")
        && !reference.contains(' ')
    {
        text = rest;
    }
    let text = text.replace(" did not complete successfully: exit code: ", " ended with exit code ");
    text.replace(" did not complete successfully: ", " failed: ")
}

fn decode(base64: &str) -> Option<Vec<u8>> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(base64).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base64(text: &str) -> String {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    #[test]
    fn take_reports_shows_steps_and_their_output() {
        let mut progress = Progress::default();
        let mut take = |value: serde_json::Value| progress.take(&value.to_string());
        let vertex = |digest: &str, name: &str| json!({"digest": digest, "name": name});
        assert!(take(json!({"vertexes": [vertex("i", "[internal] load metadata"), vertex("a", "[1/3] FROM docker.io/x")]})).is_empty());
        let started = json!({"digest": "b", "name": "[2/3] RUN <<EOF (echo  one)", "started": "2026"});
        let cached = json!({"digest": "a", "name": "[1/3] FROM docker.io/x", "cached": true, "started": "2026", "completed": "2026"});
        assert_eq!(take(json!({"vertexes": [cached, started]})), ["CACHED [1/3] FROM docker.io/x", "STEP [2/3] RUN <<EOF (echo one)"]);
        assert_eq!(take(json!({"logs": [{"vertex": "b", "stream": 1, "data": base64("one\ntw")}]})), ["one"]);
        assert_eq!(take(json!({"vertexes": [{"digest": "b", "name": "", "completed": "2026"}]})), ["tw"]);
        assert_eq!(take(json!({"warnings": [{"vertex": "b", "short": base64("JSONArgsRecommended")}]})), ["WARNING: JSONArgsRecommended"]);
        assert_eq!(progress.finish(), (Vec::new(), None));
    }

    #[test]
    fn take_error_names_the_first_step_that_failed() {
        let mut progress = Progress::default();
        let failed = json!({"digest": "b", "name": "[app 2/3] RUN false", "started": "1", "completed": "1",
            "error": "process \"/bin/sh -c false\" did not complete successfully: exit code: 1"});
        let given_up = json!({"digest": "c", "name": "[1/2] RUN sleep", "error": "context canceled"});
        assert_eq!(progress.take(&json!({"vertexes": [given_up, failed]}).to_string()), ["STEP [app 2/3] RUN false"]);
        for line in ["Dockerfile:3", "", "ERROR: failed to build: failed to solve: process x did not complete successfully: exit code: 1"] {
            assert!(progress.take(line).is_empty());
        }
        let (shown, failed) = progress.finish();
        assert_eq!(shown, ["Dockerfile:3", "ERROR: process x ended with exit code 1"]);
        let error = "process \"/bin/sh -c false\" ended with exit code 1".to_owned();
        assert_eq!(failed, Some(FailedStep { instruction: "RUN false".to_owned(), error }));
    }

    #[test]
    fn take_long_names_and_words_are_cut() {
        let mut progress = Progress::default();
        let long = format!("[2/3] RUN {}é", "x".repeat(1 << 20));
        let shown = progress.take(&json!({"vertexes": [{"digest": "a", "name": long, "started": "1"}]}).to_string());
        progress.take(&"é".repeat(1 << 20));
        let (words, _) = progress.finish();
        assert!(shown.iter().chain(&words).all(|line| line.len() < MAX_SHOWN + 16));
        assert_eq!((shown.len(), words.len()), (1, 1));
    }

    #[test]
    fn plain_error_has_no_internal_references() {
        let error = "failed to compute cache key: failed to calculate checksum of ref 9ea-b::1ju: \"/nope\": not found";
        assert_eq!(plain(error), "\"/nope\": not found");
        assert_eq!(plain("dockerfile parse error on line 5: unknown flag: --x"), "dockerfile parse error on line 5: unknown flag: --x");
    }

    #[test]
    fn step_names_are_told_from_internal_work() {
        for name in ["[1/2] FROM x", "[ 1/12] RUN a", "[build-env  3/4] COPY a b", "[linux/amd64 stage-1 2/3] RUN x"] {
            assert!(is_step(name), "{name}");
        }
        for name in ["[internal] load build context", "exporting to image", "[auth] pull token", "[a/b] x"] {
            assert!(!is_step(name), "{name}");
        }
    }
}
