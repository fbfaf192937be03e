//! What the server needs from its host, and how to get what is missing: the same checks for `hearth doctor` and for the start of the server.
//!
//! [`facts`] looks at the host and judges nothing; [`checks`] judges facts and looks at nothing.

mod checks;
mod facts;

use std::{fmt, process::ExitCode};

pub use checks::{accelerator, judge};
pub use facts::{Facts, find_kit, gather};

use crate::{config::ServeConfig, data_dir::DataDir};

/// How one prerequisite stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// The server cannot run.
    Fail,
}

/// What was found about one prerequisite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The prerequisite.
    pub name: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What is there.
    pub found: String,
    /// What it is needed for.
    pub why: &'static str,
    /// The command, or the setting, that puts it right. Empty if nothing has to be.
    pub fix: String,
}

/// The server cannot run on this host as it is.
#[derive(Debug, thiserror::Error)]
#[error("this host lacks what the server needs:\n{}`hearth doctor` shows every check", .0.iter().map(Finding::to_string).collect::<String>())]
pub struct Unfit(pub Vec<Finding>);

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        writeln!(f, "{word:<5} {:<18} {}", self.name, self.found)?;
        if self.verdict != Verdict::Ok {
            writeln!(f, "      why: {}", self.why)?;
            writeln!(f, "      fix: {}", self.fix)?;
        }
        Ok(())
    }
}

/// Fails with what is missing, if anything is.
pub fn require(findings: Vec<Finding>) -> Result<(), Unfit> {
    let missing: Vec<Finding> = findings.into_iter().filter(|finding| finding.verdict == Verdict::Fail).collect();
    if missing.is_empty() { Ok(()) } else { Err(Unfit(missing)) }
}

/// `hearth doctor`: prints every finding. Exit code 1 if the server could not run.
pub async fn run(config: ServeConfig, dir: DataDir) -> anyhow::Result<ExitCode> {
    let (mut facts, build_cache) = tokio::join!(gather(&config, &dir), facts::build_cache(&config, &dir));
    facts.build_cache = build_cache;
    let findings = judge(&facts, &config);
    for finding in &findings {
        print!("{finding}");
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failures, warnings) = (count(Verdict::Fail), count(Verdict::Warn));
    if failures > 0 {
        println!("\nhearth cannot run here yet: {failures} failed, {warnings} to know about");
        return Ok(ExitCode::FAILURE);
    }
    println!("\nhearth can run here; {warnings} to know about");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict) -> Finding {
        Finding { name: "runc", verdict, found: "not found".to_owned(), why: "it runs Dockerfiles", fix: "apt-get install runc".to_owned() }
    }

    #[test]
    fn only_failures_keep_the_server_from_starting_and_each_says_how_to_fix_it() {
        require(vec![finding(Verdict::Ok), finding(Verdict::Warn)]).unwrap();
        let unfit = require(vec![finding(Verdict::Ok), finding(Verdict::Fail)]).unwrap_err();
        assert_eq!(unfit.0.len(), 1);
        assert!(unfit.to_string().contains("fix: apt-get install runc"), "{unfit}");
    }
}
