//! A terminal session played back: each command is printed as a user would type it, run by bash, and followed by its answer and its time.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    process::{self, Output, Process},
    server::Server,
};

const COMMAND_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(500);
/// Lines of an answer that are shown.
const SHOWN_LINES: usize = 24;
/// Characters of a line that are shown where many lines pass by.
const SHOWN_COLUMNS: usize = 120;

/// The session: a directory, variables, and the server it talks to.
pub struct Shell {
    dir: PathBuf,
    variables: BTreeMap<String, OsString>,
    prelude: String,
}

impl Shell {
    /// A session in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, variables: BTreeMap::new(), prelude: String::new() }
    }

    /// Sets a variable for the commands that follow, without showing it.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// Shows a command whose effect on the session's variables lasts: it runs before each command that follows.
    pub fn source(&mut self, script: &str) {
        println!("$ {script}");
        self.prelude.push_str(script);
        self.prelude.push('\n');
    }

    /// Sets a variable the way a user would, by typing what an answer said.
    pub fn assign(&mut self, name: &str, value: &str) {
        println!("$ {name}={}", if value.len() > 120 { format!("{}…", &value[..60]) } else { value.to_owned() });
        self.set(name, value);
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn run(&self, script: &str) -> Result<String> {
        println!("$ {script}");
        let started = Instant::now();
        let text = self.quietly(script)?;
        show(&text, started.elapsed());
        Ok(text)
    }

    /// Runs a command whose answer is JSON.
    pub fn json(&self, script: &str) -> Result<Value> {
        let text = self.run(script)?;
        serde_json::from_str(&text).with_context(|| format!("`{script}` did not answer JSON"))
    }

    /// Runs a command that must answer exactly `expected`.
    pub fn expect(&self, script: &str, expected: &str) -> Result<()> {
        let text = self.run(script)?;
        if text.trim() == expected { Ok(()) } else { bail!("expected {expected:?}, the answer was {:?}", text.trim()) }
    }

    /// Runs a command again and again until it answers `wanted`, showing each new answer once.
    pub fn until(&self, server: &mut Server, script: &str, wanted: &str, limit: Duration) -> Result<()> {
        println!("$ {script}");
        let started = Instant::now();
        let mut last = String::new();
        loop {
            let answer = self.quietly(script)?.trim().to_owned();
            if answer != last {
                print!("{answer} ({:.1} s)  ", started.elapsed().as_secs_f64());
                io::stdout().flush().context("writing to the terminal")?;
            }
            let failed = answer.contains("FAILED") || (answer == "TERMINATED" && wanted != answer);
            if answer == wanted || failed || started.elapsed() > limit {
                println!();
                return if answer == wanted {
                    Ok(())
                } else {
                    bail!("expected {wanted} within {} s, after {:.0} s it was {answer}", limit.as_secs(), started.elapsed().as_secs_f64())
                };
            }
            last = answer;
            server.pause(POLL)?;
        }
    }

    /// Runs a command that prints as it goes, and shows each line as it comes.
    pub fn follow(&self, script: &str, limit: Duration) -> Result<()> {
        println!("$ {script}");
        let started = Instant::now();
        let status = Process::start(&format!("`{script}`"), &mut self.command(script), Output::Lines)?.finish(limit, |line| {
            let line: String = line.chars().take(SHOWN_COLUMNS).collect();
            println!("  {:>5.1} s | {line}", started.elapsed().as_secs_f64());
        })?;
        if status.success() { Ok(()) } else { bail!("`{script}` failed: {status}") }
    }

    /// Runs a command without showing it; fails, with what it printed, unless it succeeds.
    pub fn quietly(&self, script: &str) -> Result<String> {
        process::output(&format!("`{script}`"), &mut self.command(script), COMMAND_LIMIT)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-c"]).arg(format!("{}{script}", self.prelude)).current_dir(&self.dir).envs(&self.variables);
        command
    }
}

fn show(text: &str, took: Duration) {
    let text = text.trim_end();
    for line in text.lines().take(SHOWN_LINES) {
        println!("{line}");
    }
    if text.lines().count() > SHOWN_LINES {
        println!("… {} more lines", text.lines().count() - SHOWN_LINES);
    }
    println!("  ({:.2} s)", took.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_see_the_variables_and_failures_carry_the_answer() {
        let mut shell = Shell::new(std::env::temp_dir());
        shell.set("NAME", "value");
        assert_eq!(shell.quietly("echo $NAME").unwrap(), "value\n");
        let error = shell.quietly("echo why; false").unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
        assert!(shell.quietly("false | true").is_err(), "a failure inside a pipe counts");
    }

    #[test]
    fn what_is_sourced_lasts() {
        let mut shell = Shell::new(std::env::temp_dir());
        shell.source("GREETING='it is'; export GREETING");
        assert_eq!(shell.quietly("sh -c 'echo $GREETING'").unwrap(), "it is\n");
    }

    #[test]
    fn an_unexpected_answer_is_an_error() {
        let shell = Shell::new(std::env::temp_dir());
        assert!(shell.expect("echo 200", "200").is_ok());
        assert!(shell.expect("echo 502", "200").is_err());
    }
}
