//! The virtual environment with the clients that tests and demo use: boto3, pytest, and an AWS CLI that knows MicroVMs.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{host, process};

const PIP_LIMIT: Duration = Duration::from_secs(10 * 60);
const LIMIT: Duration = Duration::from_secs(60);

/// The environment in the target directory.
pub struct Venv {
    dir: PathBuf,
}

impl Venv {
    /// Makes the environment, or leaves it as it is when it was made from the same requirements.
    pub fn ensure(target: &Path, requirements: &Path) -> Result<Self> {
        let venv = Self { dir: target.join("venv") };
        let text = fs::read(requirements).with_context(|| format!("reading {}", requirements.display()))?;
        let digest = format!("{:x}", Sha256::digest(&text));
        let stamp = venv.dir.join("requirements.sha256");
        if fs::read_to_string(&stamp).is_ok_and(|found| found == digest) && venv.works() {
            return Ok(venv);
        }
        println!("making the Python environment {}", venv.dir.display());
        if venv.dir.exists() {
            fs::remove_dir_all(&venv.dir).with_context(|| format!("removing {}", venv.dir.display()))?;
        }
        process::run("making a virtual environment", Command::new(find_python()?).args(["-m", "venv"]).arg(&venv.dir), LIMIT)?;
        process::run(
            "installing the Python packages",
            Command::new(venv.python())
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"])
                .arg(requirements),
            PIP_LIMIT,
        )?;
        fs::write(&stamp, digest).with_context(|| format!("writing {}", stamp.display()))?;
        Ok(venv)
    }

    /// The environment's interpreter.
    pub fn python(&self) -> PathBuf {
        self.bin().join("python")
    }

    /// Where the environment's programs are.
    pub fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// The AWS CLI to use: the one on the PATH if it has the service, else the environment's.
    pub fn aws(&self) -> OsString {
        if knows_microvms("aws".as_ref()) { "aws".into() } else { self.bin().join("aws").into() }
    }

    fn works(&self) -> bool {
        succeeds(Command::new(self.python()).args(["-c", "import boto3, pytest"]))
    }
}

fn knows_microvms(aws: &std::ffi::OsStr) -> bool {
    succeeds(Command::new(aws).args(["lambda-microvms", "list-microvms", "--generate-cli-skeleton"]))
}

/// A Python that can make virtual environments: some have the module but not what it installs pip with.
fn find_python() -> Result<PathBuf> {
    let can_make = |python: &Path| succeeds(Command::new(python).args(["-c", "import ensurepip, venv"]));
    let system = PathBuf::from("/usr/bin/python3");
    if let Some(python) = ["python3", "/usr/bin/python3"].map(PathBuf::from).into_iter().find(|python| can_make(python)) {
        return Ok(python);
    }
    host::ensure_python_venv()?;
    can_make(&system).then_some(system).context("no Python 3 here can make virtual environments")
}

fn succeeds(command: &mut Command) -> bool {
    process::capture("a probe", command, LIMIT).is_ok_and(|(status, _)| status.success())
}
