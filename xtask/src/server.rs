//! A server started for one chore.

use std::{
    collections::VecDeque,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::process::{Output, Process};

const START_LIMIT: Duration = Duration::from_secs(90);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Lines of the server's log that are kept to be shown when something fails.
const LOG_LINES: usize = 60;

/// A running server with a data directory of its own, both gone when it is stopped.
pub struct Server {
    process: Process,
    dir: tempfile::TempDir,
    log: VecDeque<String>,
}

impl Server {
    /// Starts a server on free ports, with idle times from a few seconds, and waits until it says that it is ready. `settings`
    /// are the end of its configuration file.
    pub fn start(hearth: &Path, build_cache: &Path, settings: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hearth-demo-").tempdir().context("making a data directory")?;
        // MicroVMs run as users of their own, who must be able to reach their files.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).context("opening the data directory")?;
        let config = dir.path().join("hearth.toml");
        let text = format!("build_cache_dir = {:?}\n{settings}", build_cache.display().to_string());
        fs::write(&config, text).context("writing the configuration")?;
        let data = dir.path().join("data");
        let process = Process::start(
            "hearth serve",
            Command::new(hearth)
                .args(["serve", "--api", "127.0.0.1:0", "--endpoint", "127.0.0.1:0", "--min-idle-seconds", "5", "--data-dir"])
                .arg(&data)
                .arg("--config")
                .arg(&config),
            Output::Lines,
        )?;
        let mut server = Self { process, dir, log: VecDeque::new() };
        let deadline = Instant::now() + START_LIMIT;
        while let Some(line) = server.next_line(deadline)? {
            if line.starts_with("ready") {
                return Ok(server);
            }
        }
        match server.process.ended() {
            Some(status) => bail!("hearth serve ended before it was ready: {status}\n{}", server.log()),
            None => bail!("hearth serve was not ready within {} s\n{}", START_LIMIT.as_secs(), server.log()),
        }
    }

    /// The server's data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A directory for the chore's own files, gone with the server.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// The server's process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Lets time pass, as long as the server lives: the service has no call that waits for a state.
    pub fn pause(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.next_line(deadline)?;
            if let Some(status) = self.process.ended() {
                bail!("hearth serve ended by itself: {status}\n{}", self.log());
            }
        }
        Ok(())
    }

    /// The last lines of the server's log.
    pub fn log(&self) -> String {
        self.log.iter().map(|line| format!("  | {line}\n")).collect()
    }

    /// Stops the server and removes its directory.
    pub fn stop(self) -> Result<()> {
        let status = self.process.stop(STOP_LIMIT)?;
        self.dir.close().context("removing the data directory")?;
        if status.success() { Ok(()) } else { bail!("hearth serve ended with {status}") }
    }

    fn next_line(&mut self, deadline: Instant) -> Result<Option<String>> {
        let line = self.process.line(deadline)?;
        if let Some(line) = &line {
            self.log.push_back(line.clone());
            while self.log.len() > LOG_LINES {
                self.log.pop_front();
            }
        }
        Ok(line)
    }
}
