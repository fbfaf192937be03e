//! From the kernel's first exec to a mounted disk and a known port: everything that happens once, before the first session.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hearth_guest_protocol::PORT_NAME;
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
};

use crate::{
    cgroup, network,
    uevent::{UeventError, Uevents},
};

/// Where the disk is mounted: the application's root.
pub const ROOTFS: &str = "/rootfs";
/// Where the kernel's trace events are.
pub const TRACEFS: &str = "/sys/kernel/tracing";

const DISK: &str = "/dev/vda";
const DEVICE_DEADLINE: Duration = Duration::from_secs(60);
/// Soft and hard limit of this process's open files.
const OPEN_FILES: u64 = 524_288;

/// What the sessions need to know of the machine.
#[derive(Debug)]
pub struct Machine {
    /// Device of the port that leads to the host.
    pub port: PathBuf,
    /// Release of the running kernel.
    pub kernel: String,
}

/// The machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// a file system could not be mounted
    #[error("mounting {what} on {target}: {error}")]
    Mount {
        /// Device or kind.
        what: &'static str,
        /// Mount point.
        target: &'static str,
        /// The kernel's answer.
        error: Errno,
    },
    /// a file of the initramfs or of a kernel file system could not be used
    #[error("{doing} {path}: {error}")]
    File {
        /// Present participle.
        doing: &'static str,
        /// Which file.
        path: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// a kernel module was refused
    #[error("inserting the kernel module {name}: {error}")]
    Module {
        /// File name.
        name: String,
        /// The kernel's answer.
        error: Errno,
    },
    /// the root directory could not be changed
    #[error("moving to the new root: {0}")]
    Root(Errno),
    /// a device did not appear
    #[error(transparent)]
    Device(#[from] UeventError),
    /// the application's control group could not be made
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    /// the limit of open files could not be raised
    #[error("setting the limit of open files: {0}")]
    OpenFiles(Errno),
    /// the loopback device could not be brought up
    #[error(transparent)]
    Network(#[from] network::NetworkError),
}

/// Brings the machine up.
pub fn boot() -> Result<Machine, BootError> {
    allow_open_files()?;
    mount_kernel_file_systems()?;
    // Subscribed before the modules that make the devices, so that no event can be missed.
    let mut events = Uevents::subscribe()?;
    insert_modules(Path::new("/modules"))?;
    move_to_new_root()?;

    let deadline = Instant::now() + DEVICE_DEADLINE;
    events.wait_for("the disk /dev/vda", deadline, || Path::new(DISK).exists().then_some(()))?;
    attach(DISK, ROOTFS, "ext4", MsFlags::MS_NOATIME, None)?;
    let port = events.wait_for("the virtio-serial port named hearth", deadline, find_port)?;
    if let Err(error) = attach("tracefs", TRACEFS, "tracefs", MsFlags::empty(), None) {
        // `listen` then looks at the socket tables now and then.
        eprintln!("hearth-guest: {error}");
    }
    // Processes in the root group of a cgroup namespace may not change its limits.
    attach("cgroup2", cgroup::ROOT, "cgroup2", MsFlags::empty(), Some("nsdelegate"))?;
    cgroup::create()?;
    network::bring_up_loopback()?;
    container_sysctls();
    let kernel = read("/proc/sys/kernel/osrelease")?.trim().to_owned();
    Ok(Machine { port, kernel })
}

/// Each connection that is carried to the application is an open file of this process. The kernel gives the first process 1024.
fn allow_open_files() -> Result<(), BootError> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).map_err(BootError::OpenFiles)
}

fn mount_kernel_file_systems() -> Result<(), BootError> {
    for directory in ["/proc", "/sys", "/dev", "/newroot"] {
        make_directory(directory)?;
    }
    attach("proc", "/proc", "proc", MsFlags::empty(), None)?;
    attach("sysfs", "/sys", "sysfs", MsFlags::empty(), None)?;
    attach("devtmpfs", "/dev", "devtmpfs", MsFlags::empty(), None)
}

/// Inserts the modules that the kit put into the initramfs, dependencies first, then frees their memory.
fn insert_modules(directory: &Path) -> Result<(), BootError> {
    let order = directory.join("order");
    for name in read(&order)?.lines() {
        let path = directory.join(name);
        let file = File::open(&path).map_err(|error| file_error("opening", &path, error))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(BootError::Module { name: name.to_owned(), error }),
        }
    }
    fs::remove_dir_all(directory).map_err(|error| file_error("removing", directory, error))
}

/// Leaves the initramfs for a tmpfs: the kernel's very first root cannot be pivoted away from, and the container pivots.
fn move_to_new_root() -> Result<(), BootError> {
    attach("tmpfs", "/newroot", "tmpfs", MsFlags::empty(), Some("mode=0755,size=1m"))?;
    for (from, to) in [("/proc", "/newroot/proc"), ("/sys", "/newroot/sys"), ("/dev", "/newroot/dev")] {
        make_directory(to)?;
        mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(|error| BootError::Mount {
            what: from,
            target: to,
            error,
        })?;
    }
    nix::unistd::chdir("/newroot").map_err(BootError::Root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(BootError::Root)?;
    nix::unistd::chroot(".").map_err(BootError::Root)?;
    nix::unistd::chdir("/").map_err(BootError::Root)?;
    make_directory(ROOTFS)
}

/// The device of our port. Its name appears in sysfs some time after the device does.
fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.filter_map(Result::ok).find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim_end() == PORT_NAME).then(|| Path::new("/dev").join(port.file_name()))
    })
}

/// What container engines set in a container's network namespace; here the machine's network is the container's.
fn container_sysctls() {
    for (name, value) in [("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 2147483647")] {
        if let Err(error) = fs::write(Path::new("/proc/sys/net/ipv4").join(name), value) {
            eprintln!("hearth-guest: setting net.ipv4.{name}: {error}");
        }
    }
}

fn attach(what: &'static str, target: &'static str, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<(), BootError> {
    mount(Some(what), target, Some(kind), flags, data).map_err(|error| BootError::Mount { what, target, error })
}

fn make_directory(path: &str) -> Result<(), BootError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(file_error("creating", Path::new(path), error)),
        _ => Ok(()),
    }
}

fn read(path: impl AsRef<Path>) -> Result<String, BootError> {
    fs::read_to_string(&path).map_err(|error| file_error("reading", path.as_ref(), error))
}

fn file_error(doing: &'static str, path: &Path, error: io::Error) -> BootError {
    BootError::File { doing, path: path.display().to_string(), error }
}
