//! Debian's own tools, which do the work: apt-get, apt-cache, dpkg-query.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::Path,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, SystemTime},
};

use crate::suite::Suite;

const LISTS: &str = "/var/lib/apt/lists";
/// As long as dnf keeps its lists.
const LISTS_AGE: Duration = Duration::from_secs(48 * 60 * 60);

/// A tool of Debian's cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    #[error("{program} cannot be started: {source}")]
    Start { program: &'static str, source: io::Error },
    #[error("{program} failed: {detail}")]
    Failed { program: &'static str, detail: String },
    #[error("Debian's package lists cannot be fetched, see above")]
    Lists,
    #[error("Debian's package lists cannot be removed: {0}")]
    Clean(#[source] io::Error),
}

/// The suite as apt knows it.
pub struct Apt {
    names: BTreeSet<String>,
    installed: BTreeMap<String, String>,
    candidates: RefCell<HashMap<String, Option<String>>>,
}

impl Apt {
    /// Reads what there is.
    pub fn read() -> Result<Self, AptError> {
        let names = output("apt-cache", &["pkgnames"])?.lines().map(str::to_owned).collect();
        let format = "${db:Status-Status} ${Package} ${Version}\n";
        let installed = output("dpkg-query", &["--show", "--showformat", format])?;
        let installed = installed.lines().filter_map(|line| line.strip_prefix("installed ")?.split_once(' '));
        let installed = installed.map(|(name, version)| (name.to_owned(), version.to_owned())).collect();
        Ok(Self { names, installed, candidates: RefCell::default() })
    }
}

impl Suite for Apt {
    fn has(&self, package: &str) -> bool {
        self.names.contains(package)
    }

    fn starting_with(&self, prefix: &str) -> Vec<&str> {
        self.names.range(prefix.to_owned()..).map(String::as_str).take_while(|name| name.starts_with(prefix)).collect()
    }

    fn candidate(&self, package: &str) -> Option<String> {
        if let Some(known) = self.candidates.borrow().get(package) {
            return known.clone();
        }
        let policy = output("apt-cache", &["policy", "--", package]).unwrap_or_default();
        let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        let version = version.filter(|version| *version != "(none)").map(str::to_owned);
        self.candidates.borrow_mut().insert(package.to_owned(), version.clone());
        version
    }

    fn installed(&self, package: &str) -> Option<String> {
        self.installed.get(package).cloned()
    }

    fn all_installed(&self) -> Vec<String> {
        self.installed.keys().cloned().collect()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }
}

fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// What a tool that succeeds prints.
pub fn output(program: &'static str, arguments: &[&str]) -> Result<String, AptError> {
    let output = tool(program).args(arguments).stdin(Stdio::null()).output().map_err(|source| AptError::Start { program, source })?;
    if !output.status.success() {
        let detail = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(AptError::Failed { program, detail: if detail.is_empty() { output.status.to_string() } else { detail } });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a tool that prints by itself.
pub fn run(program: &'static str, arguments: &[&str]) -> Result<ExitStatus, AptError> {
    tool(program).args(arguments).stdin(Stdio::null()).status().map_err(|source| AptError::Start { program, source })
}

/// Arguments that every call of apt-get has: nobody answers questions, and packages are not kept once they are installed.
const ALWAYS: [&str; 8] = [
    "-oDpkg::Use-Pty=0",
    "-oDpkg::Options::=--force-confdef",
    "-oDpkg::Options::=--force-confold",
    "-oAPT::Keep-Downloaded-Packages=false",
    "-oAPT::Get::Show-Upgraded=true",
    "-oAPT::Update::Error-Mode=any",
    "-oDPkg::Lock::Timeout=60",
    "-oAcquire::Retries=3",
];

/// Runs apt-get and shows what it says.
pub fn get(quiet: bool, arguments: &[String]) -> Result<ExitStatus, AptError> {
    let mut all = ALWAYS.to_vec();
    all.push(if quiet { "-qq" } else { "-q" });
    all.extend(arguments.iter().map(String::as_str));
    run("apt-get", &all)
}

/// A change of one package.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub package: String,
    /// The version that comes. `None`: the package goes.
    pub version: Option<String>,
}

/// What apt-get would do.
pub fn simulate(arguments: &[String]) -> Result<Vec<Change>, AptError> {
    let mut all = vec!["-qq", "--simulate"];
    all.extend(ALWAYS);
    all.extend(arguments.iter().map(String::as_str));
    Ok(changes(&output("apt-get", &all)?))
}

/// Reads `Inst NAME [OLD] (NEW …)` and `Remv NAME [OLD]`.
fn changes(said: &str) -> Vec<Change> {
    let change = |line: &str| {
        let (verb, rest) = line.split_once(' ')?;
        let package = rest.split(' ').next()?.to_owned();
        match verb {
            "Inst" => Some(Change { package, version: rest.split_once('(')?.1.split(' ').next().map(str::to_owned) }),
            "Remv" => Some(Change { package, version: None }),
            _ => None,
        }
    };
    said.lines().filter_map(change).collect()
}

/// Whether there are lists of what the suite has, and they are recent. Files are dated by the archive, their directory by the last update.
pub fn lists_are_fresh() -> bool {
    let lists = fs::read_dir(LISTS).into_iter().flatten().flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
    let age = |modified| SystemTime::now().duration_since(modified).unwrap_or_default();
    lists && fs::metadata(LISTS).and_then(|metadata| metadata.modified()).is_ok_and(|modified| age(modified) < LISTS_AGE)
}

/// Fetches the lists of what the suite has.
pub fn update(quiet: bool) -> Result<(), AptError> {
    match get(quiet, &["update".to_owned()])? {
        status if status.success() => Ok(()),
        _ => Err(AptError::Lists),
    }
}

/// Removes the lists. Returns how many files they were.
pub fn remove_lists() -> Result<usize, AptError> {
    let mut removed = 0;
    for entry in fs::read_dir(LISTS).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        fs::remove_file(entry.path()).map_err(AptError::Clean)?;
        removed += 1;
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_from_a_simulation() {
        let said = "NOTE: This is only a simulation!\nInst libc6 [2.36-9+deb12u9] (2.36-9+deb12u10 Debian:12.10/stable [amd64])\n\
            Inst jq (1.6-2.1 Debian:12.10/stable [amd64])\nRemv nano [7.2-1]\nConf jq (1.6-2.1 Debian:12.10/stable [amd64])\n";
        let change = |package: &str, version: Option<&str>| Change { package: package.to_owned(), version: version.map(str::to_owned) };
        assert_eq!(changes(said), [change("libc6", Some("2.36-9+deb12u10")), change("jq", Some("1.6-2.1")), change("nano", None)]);
    }
}
