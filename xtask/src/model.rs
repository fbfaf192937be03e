//! `cargo xtask model`: what the newest published model of the service has that Hearth does not serve. The tests pin their clients, so that a
//! new model turns nothing red; this tells of it.

use std::{process::Command, time::Duration};

use anyhow::Result;

use crate::{process, python::Venv, workspace::Workspace};

const LIMIT: Duration = Duration::from_secs(120);

/// Prints the differences. They are no failure.
pub fn run(workspace: &Workspace) -> Result<()> {
    let pinned = workspace.clients()?.models()?;
    let newest = Venv::with_newest_models(&workspace.target)?;
    process::run(
        "comparing the models",
        Command::new(newest.python())
            .current_dir(workspace.root.join("tests"))
            .args(["-m", "conformance.drift"])
            .arg(pinned)
            .env("PYTHONDONTWRITEBYTECODE", "1"),
        LIMIT,
    )
}
