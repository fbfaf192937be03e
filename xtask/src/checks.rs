//! `cargo xtask test`: formatting, lints, unit tests, whole-system tests. The last line sums all of them up.

use std::{
    ops::AddAssign,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{
    host,
    leftovers::Host,
    process::{self, Output, Process},
    workspace::{BUILD_LIMIT, Tools, Workspace},
};

const UNIT_LIMIT: Duration = Duration::from_secs(20 * 60);
const SYSTEM_LIMIT: Duration = Duration::from_secs(45 * 60);
const LONG_LIMIT: Duration = Duration::from_secs(3 * 60 * 60);

/// A part of the whole-system tests that has long ones.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Part {
    /// Images of servers that people run, built from their Dockerfiles.
    Images,
}

impl Part {
    const fn file(self) -> &'static str {
        match self {
            Self::Images => "test_images.py",
        }
    }
}

/// Whether tests that take minutes each are run too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    Short,
    Long,
}

/// How tests ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Everything. A failed check does not keep the later ones from running.
pub fn run(workspace: &Workspace) -> Result<()> {
    let mut counts = Counts::default();
    let mut problems = Vec::new();
    let mut note = |what: &str, result: Result<Counts>| match result {
        Ok(found) => counts += found,
        Err(error) => {
            counts.failed += 1;
            problems.push(format!("{what}: {error:#}"));
        }
    };
    let tools = set_up(workspace);
    note("formatting", formatting(workspace));
    note("lints", lints(workspace));
    let unit = unit_tests(workspace);
    // The build of the tests made the server too; another build, without what only tests need, would compile most of it again.
    let hearth = if unit.is_ok() { Ok(workspace.hearth()) } else { workspace.build_hearth() };
    note("unit tests", unit);
    note("whole-system tests", tools.and_then(|tools| system_tests(workspace, &tools, &hearth?, &[], Length::Short)));
    conclude(counts, &problems)
}

/// Only the whole-system tests, with arguments for pytest.
pub fn run_system(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let tools = set_up(workspace)?;
    let hearth = workspace.build_hearth()?;
    conclude(system_tests(workspace, &tools, &hearth, arguments, Length::Short)?, &[])
}

/// A part of the whole-system tests with its long ones, with more arguments for pytest.
pub fn run_part(workspace: &Workspace, part: Part, arguments: &[String]) -> Result<()> {
    let tools = set_up(workspace)?;
    let hearth = workspace.build_hearth()?;
    // A line for each test, because they take minutes.
    let own = [part.file().to_owned(), "--verbose".to_owned()];
    let arguments: Vec<String> = own.into_iter().chain(arguments.iter().cloned()).collect();
    conclude(system_tests(workspace, &tools, &hearth, &arguments, Length::Long)?, &[])
}

fn set_up(workspace: &Workspace) -> Result<Tools> {
    let tools = workspace.set_up()?;
    host::ensure_clients()?;
    Ok(tools)
}

fn conclude(counts: Counts, problems: &[String]) -> Result<()> {
    for problem in problems {
        eprintln!("{problem}");
    }
    if counts.failed > 0 {
        // The caller's word comes first, so that the summary stays last.
        eprintln!("cargo xtask: tests failed");
        println!("{counts}");
        std::process::exit(1);
    }
    println!("{counts}");
    Ok(())
}

fn formatting(workspace: &Workspace) -> Result<Counts> {
    stage("formatting");
    process::run("cargo fmt --check", workspace.cargo().args(["fmt", "--all", "--check"]), Duration::from_secs(120))?;
    Ok(Counts::default())
}

fn lints(workspace: &Workspace) -> Result<Counts> {
    stage("lints");
    let mut command = workspace.cargo();
    command.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    process::run("cargo clippy", &mut command, BUILD_LIMIT)?;
    Ok(Counts::default())
}

fn unit_tests(workspace: &Workspace) -> Result<Counts> {
    stage("unit tests");
    let nextest = process::capture("cargo nextest", workspace.cargo().args(["nextest", "--version"]), Duration::from_secs(60));
    let mut command = workspace.cargo();
    if nextest.is_ok_and(|(status, _)| status.success()) {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "slow"]);
    } else {
        println!("cargo-nextest is not installed; running the same tests with `cargo test`");
        command.args(["test", "--workspace", "--all-targets", "--no-fail-fast"]);
    }
    let mut counts = Counts::default();
    let status = Process::start("the unit tests", &mut command, Output::Lines)?.finish(UNIT_LIMIT, |line| {
        println!("{line}");
        counts += unit_summary(line).unwrap_or_default();
    })?;
    accept("the unit tests", status, counts)
}

fn system_tests(workspace: &Workspace, tools: &Tools, hearth: &Path, arguments: &[String], length: Length) -> Result<Counts> {
    stage("whole-system tests");
    let before = Host::look()?;
    let path = std::env::join_paths(
        [tools.aws_dir.clone()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )?;
    let mut command = Command::new(&tools.python);
    command
        .current_dir(workspace.root.join("tests"))
        .args(["-m", "pytest"])
        .args(arguments)
        .env("PATH", path)
        .env("PYTHONUNBUFFERED", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HEARTH", hearth)
        .env("HEARTH_TEST_NODE", &tools.node)
        .env("HEARTH_TEST_BUILD_CACHE", workspace.target.join("build-cache"));
    let limit = match length {
        Length::Short => SYSTEM_LIMIT,
        Length::Long => {
            command.env("HEARTH_TEST_LONG", "1");
            LONG_LIMIT
        }
    };
    let mut counts = Counts::default();
    let status = Process::start("pytest", &mut command, Output::Lines)?.finish(limit, |line| {
        println!("{line}");
        if let Some(found) = pytest_summary(line) {
            counts = found;
        }
    })?;
    let mut counts = accept("pytest", status, counts)?;
    let left = Host::look()?.since(&before);
    if !left.is_empty() {
        eprintln!("the whole-system tests left these behind:\n  {}", left.join("\n  "));
        counts.failed += 1;
    }
    Ok(counts)
}

/// A run that failed must have counted a failure, and one that passed must have run something.
fn accept(what: &str, status: std::process::ExitStatus, counts: Counts) -> Result<Counts> {
    if counts.failed == 0 && !status.success() {
        bail!("{what} did not run to the end: {status}");
    }
    if counts == Counts::default() {
        bail!("{what} ran nothing");
    }
    Ok(counts)
}

fn stage(name: &str) {
    thread_local!(static STARTED: Instant = Instant::now());
    println!("\n== {name} ({:.0} s after the start)", STARTED.with(Instant::elapsed).as_secs_f64());
}

/// nextest: `Summary [ 1.2s] 12 tests run: 11 passed, 1 failed, 2 skipped`; cargo test: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn unit_summary(line: &str) -> Option<Counts> {
    let line = plain(line);
    let line = line.trim();
    if let Some((_, rest)) = line.strip_prefix("Summary [").and_then(|rest| rest.split_once("run:")) {
        return Some(tally(rest));
    }
    line.strip_prefix("test result:").map(tally)
}

/// pytest: `=== 3 failed, 20 passed, 1 skipped, 2 errors in 12.34s (0:01:02) ===`.
fn pytest_summary(line: &str) -> Option<Counts> {
    let line = plain(line);
    let line = line.trim().trim_matches('=').trim();
    let (counts, time) = line.rsplit_once(" in ")?;
    let seconds = time.split_once('s')?.0;
    seconds.parse::<f64>().ok()?;
    Some(tally(counts))
}

/// Adds up every "number word" pair of a summary.
fn tally(text: &str) -> Counts {
    let mut counts = Counts::default();
    let words: Vec<&str> = text.split([' ', ',', ';', '(', ')', ':']).filter(|word| !word.is_empty()).collect();
    for pair in words.windows(2) {
        let Ok(number) = pair[0].parse::<u64>() else { continue };
        match pair[1].trim_end_matches('.') {
            "passed" | "xpassed" => counts.passed += number,
            "failed" | "timed" | "exec" | "error" | "errors" => counts.failed += number,
            "skipped" | "ignored" | "xfailed" => counts.skipped += number,
            _ => {}
        }
    }
    counts
}

/// The line without colours.
fn plain(line: &str) -> String {
    let mut text = String::new();
    let mut parts = line.split('\x1b');
    text.push_str(parts.next().unwrap_or_default());
    for part in parts {
        text.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
    }
    text
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts { passed, failed, skipped }
    }

    #[test]
    fn nextest_s_summary_is_read() {
        let line = "     Summary [   0.123s] 125 tests run: 120 passed (2 slow, 1 leaky), 4 failed, 1 timed out, 3 skipped";
        assert_eq!(unit_summary(line), Some(counts(120, 5, 3)));
        let coloured = "\x1b[32;1m     Summary\x1b[0m [   0.1s] \x1b[1m2\x1b[0m tests run: \x1b[1m2\x1b[0m \x1b[32;1mpassed\x1b[0m, \x1b[1m0\x1b[0m skipped";
        assert_eq!(unit_summary(coloured), Some(counts(2, 0, 0)));
        assert_eq!(unit_summary("        PASS [   0.1s] xtask a_summary"), None);
    }

    #[test]
    fn cargo_test_s_summary_is_read() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(unit_summary(line), Some(counts(3, 1, 2)));
    }

    #[test]
    fn pytest_s_summary_is_read() {
        let line = "====== 3 failed, 20 passed, 1 skipped, 2 errors in 512.34s (0:08:32) ======";
        assert_eq!(pytest_summary(line), Some(counts(20, 5, 1)));
        assert_eq!(pytest_summary("20 passed in 3.2s"), Some(counts(20, 0, 0)));
        assert_eq!(pytest_summary("a MicroVM that was 3 failed in between"), None);
    }

    #[test]
    fn the_last_line_has_the_agreed_form() {
        assert_eq!(counts(1, 2, 3).to_string(), "1 passed, 2 failed, 3 skipped");
    }

    #[test]
    fn a_run_of_nothing_and_a_crash_are_failures() {
        use std::os::unix::process::ExitStatusExt;
        let status = std::process::ExitStatus::from_raw;
        assert!(accept("tests", status(0), counts(0, 0, 0)).is_err());
        assert!(accept("tests", status(0x100), counts(5, 0, 0)).is_err());
        assert!(accept("tests", status(0x100), counts(5, 1, 0)).is_ok());
    }
}
