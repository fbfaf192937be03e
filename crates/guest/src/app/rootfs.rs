//! The container's view of files: the image's file system as root, with the kernel's file systems in it as container engines arrange them.

use std::{fs, path::Path};

use nix::{
    fcntl::AT_FDCWD,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, makedev, mknod, umask},
    unistd::{chdir, pivot_root, symlinkat},
};

use super::container::{ContainerError, kernel};
use crate::{boot::ROOTFS, generation};

/// Docker's masked and read-only paths: files that tell about or change the machine rather than the container.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Name, major and minor number of the character devices every container has.
const DEVICES: [(&str, u64, u64); 6] = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Major and minor numbers of what a container with every capability has as well, for file systems of its own.
const FUSE: (u64, u64) = (10, 229);
const LOOP_CONTROL: (u64, u64) = (10, 237);
const LOOP_MAJOR: u64 = 7;
/// Block devices that the kernel's loop driver makes by itself.
const LOOPS: u64 = 8;
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the image's file system this process's root, with the kernel's file systems in their places.
pub fn enter(privileged: bool) -> Result<(), ContainerError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(kernel("making the mounts private"))?;
    let root = Path::new(ROOTFS);
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let kernel_files = if privileged { plain } else { plain | MsFlags::MS_RDONLY };
    attach("proc", &root.join("proc"), plain, None)?;
    attach("sysfs", &root.join("sys"), kernel_files, None)?;
    attach("cgroup2", &root.join("sys/fs/cgroup"), kernel_files, None)?;
    populate_dev(&root.join("dev"), plain, privileged)?;
    if !privileged {
        hide_kernel_files(root)?;
    }
    // The old root ends up on top of the new one, and is then removed from there (pivot_root(2)).
    chdir(root).map_err(kernel("entering the root file system"))?;
    pivot_root(".", ".").map_err(kernel("changing the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(kernel("leaving the old root"))?;
    chdir("/").map_err(kernel("entering the new root"))?;
    Ok(())
}

fn populate_dev(dev: &Path, plain: MsFlags, privileged: bool) -> Result<(), ContainerError> {
    let previous = umask(Mode::empty());
    attach("tmpfs", dev, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, Some("mode=755,size=64m"))?;
    for (name, major, minor) in DEVICES {
        make_device(dev, name, SFlag::S_IFCHR, 0o666, (major, minor))?;
    }
    if privileged {
        make_device(dev, "fuse", SFlag::S_IFCHR, 0o666, FUSE)?;
        make_device(dev, "loop-control", SFlag::S_IFCHR, 0o660, LOOP_CONTROL)?;
        for minor in 0..LOOPS {
            make_device(dev, &format!("loop{minor}"), SFlag::S_IFBLK, 0o660, (LOOP_MAJOR, minor))?;
        }
    }
    for (name, target) in LINKS {
        symlinkat(target, AT_FDCWD, &dev.join(name))
            .map_err(|error| ContainerError::Kernel { doing: format!("making /dev/{name}"), error })?;
    }
    let no_exec = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    // Group 5 is `tty` in every distribution.
    attach("devpts", &dev.join("pts"), no_exec, Some("newinstance,ptmxmode=0666,mode=0620,gid=5"))?;
    attach("tmpfs", &dev.join("shm"), plain, Some("mode=1777,size=64m"))?;
    attach("mqueue", &dev.join("mqueue"), plain, None)?;
    let hearth = dev.join("hearth");
    fs::create_dir(&hearth).map_err(|error| ContainerError::File("making /dev/hearth".to_owned(), error))?;
    bind_read_only(Path::new(generation::DIRECTORY), &hearth)?;
    umask(previous);
    Ok(())
}

fn make_device(dev: &Path, name: &str, kind: SFlag, mode: u32, (major, minor): (u64, u64)) -> Result<(), ContainerError> {
    mknod(&dev.join(name), kind, Mode::from_bits_truncate(mode), makedev(major, minor))
        .map_err(|error| ContainerError::Kernel { doing: format!("making /dev/{name}"), error })
}

/// Covers Docker's masked paths and makes its read-only paths so. A kernel that lacks a path needs nothing.
fn hide_kernel_files(root: &Path) -> Result<(), ContainerError> {
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for path in MASKED {
        let target = inside(path);
        match fs::metadata(&target) {
            Ok(metadata) if metadata.is_dir() => attach("tmpfs", &target, MsFlags::MS_RDONLY, Some("size=0k"))?,
            Ok(_) => bind(&root.join("dev/null"), &target, MsFlags::empty())?,
            Err(_) => {}
        }
    }
    for path in READ_ONLY {
        let target = inside(path);
        if target.exists() {
            bind_read_only(&target, &target)?;
        }
    }
    Ok(())
}

fn bind_read_only(source: &Path, target: &Path) -> Result<(), ContainerError> {
    bind(source, target, MsFlags::MS_REC)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, target, None::<&str>, flags | MsFlags::MS_NOEXEC, None::<&str>)
        .map_err(|error| ContainerError::Kernel { doing: format!("making {} read-only", target.display()), error })
}

fn bind(source: &Path, target: &Path, flags: MsFlags) -> Result<(), ContainerError> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>)
        .map_err(|error| ContainerError::Kernel { doing: format!("binding {} to {}", source.display(), target.display()), error })
}

fn attach(kind: &str, target: &Path, flags: MsFlags, data: Option<&str>) -> Result<(), ContainerError> {
    let doing = || format!("mounting {kind} on {}", target.display());
    fs::create_dir_all(target).map_err(|error| ContainerError::File(doing(), error))?;
    mount(Some(kind), target, Some(kind), flags, data).map_err(|error| ContainerError::Kernel { doing: doing(), error })
}
