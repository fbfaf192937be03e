//! `cargo xtask bench`: how long launch, suspend and resume take, and what the endpoint proxy adds, measured from outside with real clients.

use std::{process::Command, time::Duration};

use anyhow::Result;
use clap::ValueEnum;

use crate::{host, process, server::Server, workspace::Workspace};

const LIMIT: Duration = Duration::from_secs(30 * 60);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Subject {
    /// Launch, suspend, resume, and how many API calls a second are answered.
    Lifecycle,
    /// Latency, throughput, wakes and memory of the endpoint proxy.
    Ingress,
}

/// Builds an image on a server of its own and measures each path `rounds` times, or as often as the script does by itself.
pub fn run(workspace: &Workspace, subject: Subject, rounds: Option<u32>) -> Result<()> {
    let tools = workspace.set_up()?;
    host::ensure_wrk()?;
    process::run("building hearth", workspace.cargo().args(["build", "--release", "--package", "hearth"]), crate::workspace::BUILD_LIMIT)?;
    let hearth = workspace.target.join("release/hearth");
    // Measured is how fast the server answers, not how fast it may.
    let settings = "[quotas]\nget = { per_second = 1000000, burst = 1000000 }\n";
    let mut server = Server::start(&hearth, &workspace.target.join("build-cache"), settings)?;
    let pid = server.pid().to_string();
    let data_dir = server.data_dir();
    let rounds: Vec<String> = rounds.into_iter().flat_map(|rounds| ["--rounds".to_owned(), rounds.to_string()]).collect();
    let script = |name: &str| {
        let mut script = Command::new(&tools.python);
        script
            .arg(workspace.root.join("tests").join(name))
            .arg("--data-dir")
            .arg(&data_dir)
            .current_dir(workspace.root.join("tests"))
            .env("HEARTH", &hearth)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        script
    };
    let result = match subject {
        Subject::Lifecycle => process::run("the measurements", script("bench.py").args(rounds), LIMIT)
            .and_then(|()| process::run("the load", &mut script("load.py"), LIMIT)),
        Subject::Ingress => process::run("the measurements", script("bench_ingress.py").args(["--pid", &pid]).args(rounds), LIMIT),
    };
    if result.is_err() {
        // What it wrote meanwhile is still in the pipe.
        let _ = server.pause(Duration::from_millis(200));
        eprintln!("The server's last words:\n{}", server.log());
    }
    server.stop().and(result)
}
