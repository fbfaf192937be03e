//! The data directory: where each thing is, and the lock that gives it to one server at a time.

use std::{
    fs, io,
    io::{Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// A server's data directory. Only names are made here; [`DataDir::prepare`] makes the directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDir(PathBuf);

/// The data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// another server holds the lock
    #[error("another hearth (pid {pid}) serves {dir}; stop it first, or give this one another --data-dir")]
    Taken {
        /// The data directory.
        dir: PathBuf,
        /// Who holds it, as the lock file says.
        pid: String,
    },
    /// a file or directory could not be made or read
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl DataDirError {
    fn io(what: String) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Keeps other servers out for as long as it lives.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its Drop")] Flock<fs::File>);

impl DataDir {
    /// Names the directory.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where clients find out how to reach the server. There while it can serve.
    pub fn connect(&self) -> PathBuf {
        self.0.join("connect.json")
    }

    /// The server's lock.
    pub fn lock_file(&self) -> PathBuf {
        self.0.join("hearth.lock")
    }

    /// The administrator's socket.
    pub fn socket(&self) -> PathBuf {
        self.0.join("hearth.sock")
    }

    /// The local certificate authority.
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// The local authority's certificate.
    pub fn ca_certificate(&self) -> PathBuf {
        self.ca().join("ca.pem")
    }

    /// The account with an ACME authority, and the certificate from it.
    pub fn acme(&self) -> PathBuf {
        self.0.join("acme")
    }

    /// The host's certificate authorities and ours in one file, for clients that know only one.
    pub fn ca_bundle(&self) -> PathBuf {
        self.0.join("ca-bundle.pem")
    }

    /// Secrets.
    pub fn keys(&self) -> PathBuf {
        self.0.join("keys")
    }

    /// Durable records.
    pub fn database(&self) -> PathBuf {
        self.0.join("hearth.db")
    }

    /// The embedded S3's buckets.
    pub fn objects(&self) -> PathBuf {
        self.0.join("objects")
    }

    /// Build logs and application logs.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// Snapshots.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// What each MicroVM has of its own.
    pub fn microvms(&self) -> PathBuf {
        self.0.join("microvms")
    }

    /// The image builder's layers, unless the configuration names another.
    pub fn build_cache(&self) -> PathBuf {
        self.0.join("build-cache")
    }

    /// Scratch space, emptied at start and stop.
    pub fn tmp(&self) -> PathBuf {
        self.0.join("tmp")
    }

    /// Makes the directory and takes its lock.
    pub fn lock(&self) -> Result<Lock, DataDirError> {
        make(&self.0, 0o711)?;
        let path = self.lock_file();
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(DataDirError::io(format!("opening {}", path.display())))?;
        let mut holder = String::new();
        file.read_to_string(&mut holder).map_err(DataDirError::io(format!("reading {}", path.display())))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                write_pid(&mut lock).map_err(DataDirError::io(format!("writing {}", path.display())))?;
                Ok(Lock(lock))
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                let pid = if holder.trim().is_empty() { "unknown".to_owned() } else { holder.trim().to_owned() };
                Err(DataDirError::Taken { dir: self.0.clone(), pid })
            }
            Err((_, errno)) => Err(DataDirError::Io { what: format!("locking {}", path.display()), source: errno.into() }),
        }
    }

    /// Makes the directories of a server and empties the scratch space. Only for the holder of the lock.
    pub fn prepare(&self) -> Result<(), DataDirError> {
        // Others may pass through (QEMU runs as another user), but not look around; secrets are behind their own door.
        for dir in [self.images(), self.microvms()] {
            make(&dir, 0o711)?;
        }
        for dir in [self.ca(), self.keys(), self.objects(), self.logs()] {
            make(&dir, 0o700)?;
        }
        // SQLite gives its journals the mode of the database, and the database the umask's unless it is there already.
        let database = self.database();
        let made = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&database);
        made.map_err(DataDirError::io(format!("making {}", database.display())))?;
        self.empty_tmp()
    }

    /// Empties the scratch space.
    pub fn empty_tmp(&self) -> Result<(), DataDirError> {
        let tmp = self.tmp();
        match fs::remove_dir_all(&tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(DataDirError::Io { what: format!("emptying {}", tmp.display()), source: error })
            }
            _ => make(&tmp, 0o711),
        }
    }

    /// A name for the administrator's socket that is short enough whatever the directory's: socket addresses end at 107 bytes.
    /// Good for as long as the returned handle of the directory lives.
    pub fn short_socket(&self) -> io::Result<(fs::File, PathBuf)> {
        short(&self.0, "hearth.sock")
    }

    /// Listens on the administrator's socket. Nobody else can connect at any moment: the socket is made where nobody gets to it, and moved
    /// once it has its mode. A socket that an earlier server left is replaced.
    pub fn listen(&self) -> io::Result<tokio::net::UnixListener> {
        let made = self.keys().join("hearth.sock");
        if made.exists() {
            fs::remove_file(&made)?;
        }
        let (_dir, name) = short(&self.keys(), "hearth.sock")?;
        let listener = tokio::net::UnixListener::bind(&name)?;
        fs::set_permissions(&made, fs::Permissions::from_mode(0o600))?;
        fs::rename(&made, self.socket())?;
        Ok(listener)
    }
}

/// Writes a file that only its owner may read, under a temporary name first, so that readers see the old one or the new one.
pub fn write_secret(path: &Path, contents: &[u8]) -> io::Result<()> {
    write_atomically(path, contents, 0o600)
}

/// Writes a file under a temporary name, and renames it once it is on disk.
pub fn write_atomically(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    // The umask may have taken bits off that a public file needs.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

fn short(dir: &Path, name: &str) -> io::Result<(fs::File, PathBuf)> {
    let dir = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECTORY).open(dir)?;
    let name = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
    Ok((dir, name))
}

fn make(dir: &Path, mode: u32) -> Result<(), DataDirError> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(dir);
    made.map_err(DataDirError::io(format!("making the directory {}", dir.display())))
}

fn write_pid(lock: &mut Flock<fs::File>) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_is_refused_with_the_pid_of_the_first() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().join("data"));
        let lock = dir.lock().unwrap();
        let refusal = dir.lock().unwrap_err();
        assert!(refusal.to_string().contains(&format!("(pid {})", std::process::id())), "{refusal}");
        drop(lock);
        dir.lock().unwrap();
    }

    #[test]
    fn secrets_are_their_owner_s_only_and_replace_the_old_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("secret");
        fs::write(&path, "old").unwrap();
        write_secret(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn preparing_empties_the_scratch_space_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        dir.prepare().unwrap();
        fs::create_dir_all(dir.tmp().join("build/context")).unwrap();
        fs::write(dir.keys().join("k"), "").unwrap();
        dir.prepare().unwrap();
        assert_eq!(fs::read_dir(dir.tmp()).unwrap().count(), 0);
        assert!(dir.keys().join("k").exists());
    }

    #[test]
    fn others_pass_through_but_read_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().join("data"));
        dir.lock().unwrap();
        dir.prepare().unwrap();
        for entry in walkdir::WalkDir::new(dir.path()) {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o066, 0, "{} has mode {mode:o}", entry.path().display());
        }
    }

    #[tokio::test]
    async fn the_socket_works_in_a_directory_with_a_long_name_and_is_private() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().join("d".repeat(120)));
        dir.lock().unwrap();
        dir.prepare().unwrap();
        for _server in 0..2 {
            let listener = dir.listen().unwrap();
            assert_eq!(fs::metadata(dir.socket()).unwrap().permissions().mode() & 0o777, 0o600);
            let (_handle, name) = dir.short_socket().unwrap();
            let (accepted, connected) = tokio::join!(listener.accept(), tokio::net::UnixStream::connect(&name));
            accepted.unwrap();
            connected.unwrap();
        }
    }
}
