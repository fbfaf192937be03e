//! What makes one life of the guest differ from another that began at the same snapshot: clock, randomness, and names.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    net::Ipv4Addr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

/// Bytes handed to the kernel at a time.
const POOL_BYTES: usize = 256;

/// A part of the new identity could not be taken on.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// the clock could not be set
    #[error("setting the clock: {0}")]
    Clock(Errno),
    /// the random number generator could not be opened
    #[error("opening /dev/urandom: {0}")]
    RandomDevice(io::Error),
    /// the random number generator refused
    #[error("reseeding the random number generator: {0}")]
    Random(Errno),
    /// a file could not be written
    #[error("writing {path}: {error}")]
    File {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// Sets the wall clock; `now` is in nanoseconds since the Unix epoch.
pub fn set_clock(now: u64) -> Result<(), IdentityError> {
    const NANOSECONDS: u64 = 1_000_000_000;
    let seconds = i64::try_from(now / NANOSECONDS).expect("2^64 ns are 585 years");
    let rest = i64::try_from(now % NANOSECONDS).expect("less than 2^30");
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, rest)).map_err(IdentityError::Clock)
}

/// The kernel's `struct rand_pool_info` with room for its variable part (random(4)).
#[repr(C)]
struct RandomPool {
    entropy_bits: libc::c_int,
    byte_count: libc::c_int,
    bytes: [u8; POOL_BYTES],
}

// The kernel declared RNDADDENTROPY with the size of the structure's two fixed fields.
nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 2 * size_of::<libc::c_int>()), RandomPool);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Credits `entropy` to the kernel's generator and makes it use it now, so that clones of one snapshot part ways.
pub fn reseed_random(entropy: &[u8]) -> Result<(), IdentityError> {
    let device = File::options().write(true).open("/dev/urandom").map_err(IdentityError::RandomDevice)?;
    for chunk in entropy.chunks(POOL_BYTES) {
        let count = libc::c_int::try_from(chunk.len()).expect("at most POOL_BYTES");
        let mut pool = RandomPool { entropy_bits: 8 * count, byte_count: count, bytes: [0; POOL_BYTES] };
        pool.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the request reads two integers and then `byte_count` bytes, all of which lie within `pool`.
        unsafe { add_entropy(device.as_raw_fd(), &raw const pool) }.map_err(IdentityError::Random)?;
    }
    // SAFETY: the request takes no argument.
    unsafe { reseed(device.as_raw_fd()) }.map_err(IdentityError::Random)?;
    Ok(())
}

/// Files of the root file system that describe the machine, as container engines write them.
#[derive(Debug)]
pub struct Names {
    etc: PathBuf,
    resolv_conf: Option<String>,
}

impl Names {
    /// For the root file system at `rootfs`. Nothing of the image runs yet.
    pub fn new(rootfs: &Path) -> Self {
        Self { etc: rootfs.join("etc"), resolv_conf: None }
    }

    /// Writes `resolv.conf`: at first whatever the image holds, later only if the application has not changed it.
    pub fn set_resolvers(&mut self, nameservers: &[Ipv4Addr]) -> Result<(), IdentityError> {
        let text: String = nameservers.iter().map(|server| format!("nameserver {server}\n")).collect();
        let path = self.etc.join("resolv.conf");
        if let Some(ours) = &self.resolv_conf
            && (*ours == text || fs::read_to_string(&path).is_ok_and(|present| present != *ours))
        {
            return Ok(());
        }
        replace(&path, &text)?;
        self.resolv_conf = Some(text);
        Ok(())
    }

    /// Writes `hostname` and `hosts`.
    pub fn set_hostname(&self, hostname: &str) -> Result<(), IdentityError> {
        replace(&self.etc.join("hostname"), &format!("{hostname}\n"))?;
        let own = if hostname == "localhost" { String::new() } else { format!("127.0.0.1\t{hostname}\n") };
        let hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n{own}"
        );
        replace(&self.etc.join("hosts"), &hosts)
    }
}

/// Replaces a file, or a link whatever it leads to: seen from outside the container it would lead elsewhere.
fn replace(path: &Path, text: &str) -> Result<(), IdentityError> {
    let write = || {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::write(path, text)
    };
    write().map_err(|error| IdentityError::File { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("hearth-guest-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("etc")).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_first_write_replaces_what_the_image_left() {
        let root = Scratch::new("resolv-first");
        let path = root.0.join("etc/resolv.conf");
        std::os::unix::fs::symlink("/nowhere/stub", &path).unwrap();
        Names::new(&root.0).set_resolvers(&[Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.1\nnameserver 10.0.0.2\n");
        assert!(!path.is_symlink());
    }

    #[test]
    fn later_writes_respect_the_application() {
        let root = Scratch::new("resolv-later");
        let path = root.0.join("etc/resolv.conf");
        let mut names = Names::new(&root.0);
        names.set_resolvers(&[Ipv4Addr::new(10, 0, 0, 1)]).unwrap();
        names.set_resolvers(&[Ipv4Addr::new(10, 0, 0, 2)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.2\n");
        fs::write(&path, "nameserver 1.1.1.1\n").unwrap();
        names.set_resolvers(&[Ipv4Addr::new(10, 0, 0, 3)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 1.1.1.1\n");
    }

    #[test]
    fn the_host_knows_its_own_name() {
        let root = Scratch::new("hosts");
        Names::new(&root.0).set_hostname("box").unwrap();
        assert_eq!(fs::read_to_string(root.0.join("etc/hostname")).unwrap(), "box\n");
        assert!(fs::read_to_string(root.0.join("etc/hosts")).unwrap().ends_with("127.0.0.1\tbox\n"));
    }
}
