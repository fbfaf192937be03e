//! `cargo xtask demo`: the whole story, told with the stock AWS CLI and curl against a server of its own.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{leftovers::Host, server::Server, shell::Shell, story, workspace::Workspace};

/// One chapter of the story: its title, and what happens in it.
pub type Chapter = (&'static str, fn(&mut Shell, &mut Server) -> Result<()>);

enum Outcome {
    Passed(Duration),
    Failed(Duration, String),
    NotReached,
}

/// Sets up, builds, plays the story, and sums up. Fails if any step did.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    let tools = workspace.set_up()?;
    let hearth = workspace.build_hearth()?;
    let before = Host::look()?;

    heading("The server");
    let build_cache = workspace.target.join("build-cache");
    let mut server = Server::start(&hearth, &build_cache, "")?;
    println!("$ hearth serve --data-dir {} --api 127.0.0.1:0 --endpoint 127.0.0.1:0 --min-idle-seconds 5", server.data_dir().display());
    let mut shell = session(&tools, &hearth, &server)?;

    let mut outcomes = Vec::new();
    for (number, (title, chapter)) in story::CHAPTERS.iter().enumerate() {
        if matches!(outcomes.last(), Some(Outcome::Failed(..) | Outcome::NotReached)) {
            outcomes.push(Outcome::NotReached);
            continue;
        }
        heading(&format!("{}. {title}", number + 1));
        outcomes.push(timed(|| chapter(&mut shell, &mut server)));
        if let Some(Outcome::Failed(_, reason)) = outcomes.last() {
            println!("FAILED: {reason}\n\nThe server's last words:\n{}", server.log());
        }
    }
    heading("Stopping the server");
    println!("$ kill -TERM {}", server.pid());
    outcomes.push(timed(|| stop(server, &before)));
    if let Some(Outcome::Failed(_, reason)) = outcomes.last() {
        println!("FAILED: {reason}");
    }

    let titles = story::CHAPTERS.iter().map(|(title, _)| *title).chain(["Stopping leaves nothing behind"]);
    let failed = summarise(titles.zip(&outcomes), started.elapsed());
    if failed == 0 { Ok(()) } else { bail!("{failed} of {} steps did not pass", outcomes.len()) }
}

fn session(tools: &crate::workspace::Tools, hearth: &Path, server: &Server) -> Result<Shell> {
    let mut shell = Shell::new(server.scratch().to_owned());
    let programs = [hearth.parent().context("hearth is in no directory")?.to_owned(), tools.aws_dir.clone()];
    let path = std::env::join_paths(programs.into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())))?;
    shell.set("PATH", path);
    shell.set("AWS_PAGER", "");
    shell.set("EXAMPLE", tools.root.join("examples/flask-hello"));
    shell.source(&format!("eval \"$(hearth env --data-dir {})\"", server.data_dir().display()));
    shell.source("PORT=${HEARTH_ENDPOINT##*:}");
    // Eight seconds are enough to show how a MicroVM falls asleep, but clients refuse less than a minute before they ask the server.
    shell.set("AWS_CONFIG_FILE", server.scratch().join("aws-config"));
    shell.run("aws configure set parameter_validation false")?;
    shell.run("env | grep -E '^(AWS|CURL|HEARTH)_' | grep -v SECRET | sort")?;
    Ok(shell)
}

fn stop(server: Server, before: &Host) -> Result<()> {
    server.stop()?;
    let left = Host::look()?.since(before);
    if !left.is_empty() {
        bail!("these were left behind:\n  {}", left.join("\n  "));
    }
    println!("no process, mount, network namespace, network device, nftables table or temporary file is left");
    Ok(())
}

fn timed(body: impl FnOnce() -> Result<()>) -> Outcome {
    let started = Instant::now();
    match body() {
        Ok(()) => Outcome::Passed(started.elapsed()),
        Err(error) => Outcome::Failed(started.elapsed(), format!("{error:#}")),
    }
}

fn heading(title: &str) {
    println!("\n\x1b[1m{title}\x1b[0m\n");
}

fn summarise<'a>(steps: impl Iterator<Item = (&'a str, &'a Outcome)>, total: Duration) -> usize {
    heading("Summary");
    let mut failed = 0;
    for (title, outcome) in steps {
        let (result, seconds) = match outcome {
            Outcome::Passed(took) => ("passed", format!("{:.1}", took.as_secs_f64())),
            Outcome::Failed(took, _) => ("FAILED", format!("{:.1}", took.as_secs_f64())),
            Outcome::NotReached => ("not reached", "-".to_owned()),
        };
        failed += usize::from(result != "passed");
        println!("  {title:<58} {result:<12} {seconds:>7} s");
    }
    println!("  {:<58} {:<12} {:>7.1} s", "Everything, with set-up and build", "", total.as_secs_f64());
    failed
}
