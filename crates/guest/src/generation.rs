//! The generation counter: a file that applications read to learn that they live on somewhere else than before, as a clone or after a suspend.
//!
//! It holds the generation as a decimal number and a newline, 0 while the image is built, and is written in place: a descriptor that was
//! opened once, an inotify watch and a mapping all see the change. By then the application is still frozen, so it never reads half of it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// Where the file's directory is for PID 1. Containers have it at `/dev/hearth`.
pub const DIRECTORY: &str = "/hearth";
/// The file in that directory.
const NAME: &str = "generation";

/// The counter as applications see it.
#[derive(Debug)]
pub struct Counter {
    file: File,
    shown: u64,
}

impl Counter {
    /// Makes the file, in a directory that is made as well.
    pub fn create(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let file = File::options().read(true).write(true).create(true).truncate(true).open(directory.join(NAME))?;
        let mut counter = Self { file, shown: u64::MAX };
        counter.show(0)?;
        Ok(counter)
    }

    /// Shows a generation. Nothing is written if it is shown already: another host in the same life is no news.
    pub fn show(&mut self, generation: u64) -> io::Result<()> {
        if self.shown == generation {
            return Ok(());
        }
        let text = format!("{generation}\n");
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)?;
        self.shown = generation;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        errno::Errno,
        sys::inotify::{AddWatchFlags, InitFlags, Inotify},
    };

    use super::*;

    #[test]
    fn readers_and_watchers_see_a_new_generation_and_no_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let mut counter = Counter::create(directory.path()).unwrap();
        let path = directory.path().join(NAME);
        let opened = File::open(&path).unwrap();
        let events = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        events.add_watch(&path, AddWatchFlags::IN_MODIFY).unwrap();

        counter.show(0).unwrap();
        assert_eq!(events.read_events().unwrap_err(), Errno::EAGAIN, "the same generation is no news");
        for (generation, text) in [(1, "1\n"), (12_345, "12345\n"), (7, "7\n")] {
            counter.show(generation).unwrap();
            assert!(!events.read_events().unwrap().is_empty());
            let mut read = [0; 16];
            let length = opened.read_at(&mut read, 0).unwrap();
            assert_eq!(&read[..length], text.as_bytes());
        }
    }
}
