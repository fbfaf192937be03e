//! The virtual environments: one with the clients that tests and demo use (boto3, pytest, and an AWS CLI that knows MicroVMs), one with the
//! newest published models of the service.

use std::{
    ffi::OsStr,
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
        venv.make()?;
        venv.install(&["--requirement".as_ref(), requirements.as_os_str()])?;
        fs::write(&stamp, digest).with_context(|| format!("writing {}", stamp.display()))?;
        Ok(venv)
    }

    /// An environment with the newest botocore that is published.
    pub fn with_newest_models(target: &Path) -> Result<Self> {
        let venv = Self { dir: target.join("model") };
        if !succeeds(Command::new(venv.python()).args(["-c", "import pip"])) {
            venv.make()?;
        }
        venv.install(&["--upgrade".as_ref(), "botocore".as_ref()])?;
        Ok(venv)
    }

    /// Makes the environment anew, with nothing in it.
    fn make(&self) -> Result<()> {
        println!("making the Python environment {}", self.dir.display());
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir).with_context(|| format!("removing {}", self.dir.display()))?;
        }
        process::run("making a virtual environment", Command::new(find_python()?).args(["-m", "venv"]).arg(&self.dir), LIMIT)
    }

    fn install(&self, arguments: &[&OsStr]) -> Result<()> {
        process::run(
            "installing the Python packages",
            Command::new(self.python()).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(arguments),
            PIP_LIMIT,
        )
    }

    /// The environment's interpreter.
    pub fn python(&self) -> PathBuf {
        self.bin().join("python")
    }

    /// Where the environment's programs are.
    pub fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// Directory of botocore's models.
    pub fn models(&self) -> Result<PathBuf> {
        let script = "import botocore, os; print(os.path.join(os.path.dirname(botocore.__file__), 'data'))";
        let printed = process::output("finding botocore", Command::new(self.python()).args(["-c", script]), LIMIT)?;
        Ok(PathBuf::from(printed.trim_end()))
    }

    fn works(&self) -> bool {
        succeeds(Command::new(self.python()).args(["-c", "import boto3, pytest"]))
    }
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
