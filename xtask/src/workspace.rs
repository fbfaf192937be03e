//! Where things are in this work tree, and the set-up that every chore starts with.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{host, kit, node, process, python::Venv};

/// Longest time that a build of the workspace may take; on a fresh machine it compiles every dependency.
pub const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The work tree and cargo's target directory.
pub struct Workspace {
    /// Root of the work tree.
    pub root: PathBuf,
    /// Cargo's target directory; what the set-up makes is there too.
    pub target: PathBuf,
}

/// What the set-up provides.
pub struct Tools {
    /// Root of the work tree.
    pub root: PathBuf,
    /// Interpreter with the test clients.
    pub python: PathBuf,
    /// Directory that must be first on the PATH for an `aws` that knows MicroVMs.
    pub aws_dir: PathBuf,
    /// Directory whose `node_modules` has the JavaScript SDK.
    pub node: PathBuf,
}

impl Workspace {
    /// The work tree that this program was built from.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is not inside a work tree")?.to_owned();
        let program = std::env::current_exe().context("finding this program")?;
        // <target>/<profile>/xtask
        let target = program.ancestors().nth(2).context("this program is not in a target directory")?.to_owned();
        Ok(Self { root, target })
    }

    /// Provides all that building, testing and demonstrating need. Fast when it is there already.
    pub fn set_up(&self) -> Result<Tools> {
        host::ensure()?;
        kit::ensure(&self.target.join("kit")).context("making the guest kit")?;
        let venv = self.clients()?;
        let node = node::ensure(&self.target, &self.root.join("tests/conformance/javascript"))?;
        Ok(Tools { root: self.root.clone(), python: venv.python(), aws_dir: venv.bin(), node })
    }

    /// The Python environment of tests and demo.
    pub fn clients(&self) -> Result<Venv> {
        Venv::ensure(&self.target, &self.root.join("tests/requirements.txt"))
    }

    /// Builds the server and returns its path.
    pub fn build_hearth(&self) -> Result<PathBuf> {
        process::run("building hearth", self.cargo().args(["build", "--package", "hearth"]), BUILD_LIMIT)?;
        Ok(self.hearth())
    }

    /// Path of the server's program.
    pub fn hearth(&self) -> PathBuf {
        self.target.join("debug/hearth")
    }

    /// A cargo command in this work tree.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command
    }
}
