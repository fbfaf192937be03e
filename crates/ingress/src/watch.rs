//! Tells when files may have changed, without looking at them over and over: inotify(7) on the directories they are in, because files are
//! replaced by renaming others over them, and symbolic links (certbot's, Kubernetes') by changing what they lead to.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};

/// Room for several events with names of the longest kind.
const EVENTS: usize = 4096;

/// Watches the directories of files.
pub(crate) struct Watch(EventStream<Vec<u8>>);

impl Watch {
    /// Starts to watch: what changes from now on is told.
    pub(crate) fn new<'a>(files: impl IntoIterator<Item = &'a Path>) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let changes = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        for dir in directories(files) {
            inotify.watches().add(&dir, changes)?;
        }
        Ok(Self(inotify.into_event_stream(vec![0; EVENTS])?))
    }

    /// Waits for a change.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        match self.0.next().await {
            Some(event) => event.map(drop),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Where the files are, and where they really are.
fn directories<'a>(files: impl IntoIterator<Item = &'a Path>) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for file in files {
        for path in [Some(file.to_owned()), file.canonicalize().ok()].into_iter().flatten() {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            found.insert(parent.unwrap_or(Path::new(".")).to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Duration};

    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn files_that_are_replaced_written_or_linked_elsewhere_are_told() {
        let temp = tempfile::tempdir().unwrap();
        let (archive, live) = (temp.path().join("archive"), temp.path().join("live"));
        fs::create_dir(&archive).unwrap();
        fs::create_dir(&live).unwrap();
        fs::write(archive.join("1.pem"), "1").unwrap();
        let link = live.join("chain.pem");
        symlink(archive.join("1.pem"), &link).unwrap();
        let mut watch = Watch::new([link.as_path()]).unwrap();

        let changes: [(&str, &dyn Fn()); 3] = [
            ("written in place", &|| fs::write(archive.join("1.pem"), "1 again").unwrap()),
            ("replaced", &|| {
                fs::write(temp.path().join("new"), "1 anew").unwrap();
                fs::rename(temp.path().join("new"), archive.join("1.pem")).unwrap();
            }),
            ("linked elsewhere", &|| {
                symlink(archive.join("2.pem"), live.join("new")).unwrap();
                fs::rename(live.join("new"), &link).unwrap();
            }),
        ];
        for (how, change) in changes {
            change();
            timeout(PATIENCE, watch.changed()).await.expect(how).unwrap();
            // Whatever else the same change led to.
            while timeout(Duration::from_millis(20), watch.changed()).await.is_ok() {}
        }
    }
}
