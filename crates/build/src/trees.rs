//! Directory trees that a build has made, as the server measures and deletes them.
//!
//! A step decides how deep its directories are and how many files it makes. The walk is left to the system's tools: they need no stack and no
//! descriptor for each level, take paths that are longer than PATH_MAX, and never follow a link, even if a directory becomes one meanwhile.

use std::{
    ffi::OsStr,
    io,
    path::Path,
    process::{Command, Output, Stdio},
};

/// Bytes that a file counts for at least. It takes an inode even if it is empty, and file systems have one for each 16 KiB or so.
const LEAST: u64 = 4 << 10;

/// Deletes a directory and all below it, if it is there. Blocks.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    let removed = run("rm", &["-rf", "--one-file-system"], dir)?;
    if removed.status.success() { Ok(()) } else { Err(failure("rm", &removed)) }
}

/// Bytes that a directory and all below it take on the disk. What vanishes meanwhile does not count. Blocks.
pub(crate) fn disk_usage(dir: &Path) -> io::Result<u64> {
    let bytes = total(dir, "--block-size=1")?;
    let files = total(dir, "--inodes")?;
    Ok(bytes.max(files.saturating_mul(LEAST)))
}

/// The sum that `du` prints. It fails for a file that has vanished too, and has a sum all the same.
fn total(dir: &Path, unit: &str) -> io::Result<u64> {
    let measured = run("du", &["--summarize", "--one-file-system", unit], dir)?;
    let text = String::from_utf8_lossy(&measured.stdout);
    text.split_whitespace().next().and_then(|sum| sum.parse().ok()).ok_or_else(|| failure("du", &measured))
}

fn run(program: &str, options: &[&str], dir: &Path) -> io::Result<Output> {
    let arguments = options.iter().map(OsStr::new).chain([OsStr::new("--"), dir.as_os_str()]);
    Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output()
}

fn failure(program: &str, output: &Output) -> io::Error {
    let words = String::from_utf8_lossy(&output.stderr);
    io::Error::other(format!("{program}: {}", words.lines().next().unwrap_or("it gave no reason")))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// More levels than a path can name, and more than a thread's stack or a process's descriptors suffice for.
    const LEVELS: u32 = 25_000;

    fn nest(dir: &Path) {
        let code = format!("chdir $ARGV[0]; for (1..{LEVELS}) {{ mkdir 'd' or die; chdir 'd' or die }}");
        assert!(Command::new("perl").args(["-e", &code]).arg(dir).status().unwrap().success());
    }

    #[test]
    fn remove_tree_deeper_than_any_path_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        nest(&tree);
        assert!(disk_usage(&tree).unwrap() >= u64::from(LEVELS) * LEAST);
        remove(&tree).unwrap();
        assert!(!tree.exists());
        remove(&tree).unwrap();
    }

    #[test]
    fn disk_usage_empty_files_count_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, other) = (dir.path().join("tree"), dir.path().join("other"));
        fs::create_dir(&tree).unwrap();
        fs::create_dir(&other).unwrap();
        for number in 0..100 {
            fs::write(tree.join(number.to_string()), "").unwrap();
        }
        let empty = disk_usage(&tree).unwrap();
        assert!(empty >= 100 * LEAST, "{empty}");
        fs::write(other.join("large"), vec![1; 4 << 20]).unwrap();
        symlink(&other, tree.join("link")).unwrap();
        assert!(disk_usage(&tree).unwrap() < 1 << 20);
        remove(&tree).unwrap();
        assert!(other.join("large").exists());
        assert!(disk_usage(&dir.path().join("nothing")).is_err());
    }
}
