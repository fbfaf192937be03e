//! The JavaScript SDK that the conformance tests use, in the target directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{host, process};

const NPM_LIMIT: Duration = Duration::from_secs(5 * 60);

/// What a package directory's files say is wanted, exactly.
const FILES: [&str; 2] = ["package.json", "package-lock.json"];

/// Installs what the lock file of the directory `package` names, or leaves it as it is when it was installed for the same files. Returns the
/// directory of `node_modules`.
pub fn ensure(target: &Path, package: &Path) -> Result<PathBuf> {
    host::ensure_node()?;
    let dir = target.join("node");
    let mut digest = Sha256::new();
    let mut texts = Vec::new();
    for name in FILES {
        let path = package.join(name);
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        digest.update(&text);
        texts.push(text);
    }
    let digest = format!("{:x}", digest.finalize());
    let stamp = dir.join("package.sha256");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == digest) {
        return Ok(dir);
    }
    println!("installing the JavaScript SDK in {}", dir.display());
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    for (name, text) in FILES.iter().zip(texts) {
        fs::write(dir.join(name), text).with_context(|| format!("writing into {}", dir.display()))?;
    }
    process::run(
        "installing the JavaScript SDK",
        Command::new("npm").current_dir(&dir).args(["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]),
        NPM_LIMIT,
    )?;
    fs::write(&stamp, digest).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(dir)
}
