//! Becomes the application: new namespaces, the image's root file system, Docker's idea of `/dev` and `/proc`, the image's user, then exec.
//!
//! Runs as a process of its own, which PID 1 starts with a socket as standard input. The [`App`] comes in through the socket as JSON; a
//! report of lines goes back (`pid N`, or `failed REASON`) and ends when exec closes the last copy of the socket.

use std::{
    convert::Infallible,
    ffi::{CString, NulError},
    fs,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
};

use caps::{CapSet, Capability};
use hearth_guest_protocol::App;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, setrlimit},
        signal::{SigHandler, Signal, signal},
        stat::{Mode, SFlag, makedev, mknod, umask},
    },
    unistd::{
        AccessFlags, ForkResult, Gid, Uid, access, chdir, dup2_stdin, execve, fchown, fork, pivot_root, setgid, setgroups, sethostname,
        setsid, setuid, symlinkat,
    },
};

use super::user::{self, User, UserError};
use crate::boot::ROOTFS;

/// The argument that makes the binary come here.
pub const ARGUMENT: &str = "container";
/// Begins the report's line with the application's process id.
pub const PID: &str = "pid ";
/// Begins the report's line with what went wrong.
pub const FAILED: &str = "failed ";

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Soft and hard limit of open files: what the platform being matched shows, and what container engines allow.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Docker's default capabilities (`0xa80425fb`).
const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FSETID,
    Capability::CAP_FOWNER,
    Capability::CAP_MKNOD,
    Capability::CAP_NET_RAW,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETPCAP,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_KILL,
    Capability::CAP_AUDIT_WRITE,
];

/// Docker's masked and read-only paths: files that tell about or change the machine rather than the container.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Name, major and minor number of the character devices every container has.
const DEVICES: [(&str, u64, u64); 6] = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A step on the way to the application's first instruction failed.
#[derive(Debug, thiserror::Error)]
enum ContainerError {
    #[error("reading what to run: {0}")]
    Instructions(io::Error),
    #[error("the image names no command: ENTRYPOINT and CMD are both empty")]
    NoCommand,
    #[error("the command or the environment contains a zero byte")]
    ZeroByte(#[from] NulError),
    #[error("{doing}: {}", describe(*error))]
    Kernel { doing: String, error: Errno },
    #[error("{0}: {1}")]
    File(String, io::Error),
    #[error("giving up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("{0:?}: executable file not found in PATH")]
    NotInPath(String),
}

/// The helper's whole life. Comes back only to report a failure.
pub fn main() -> ExitCode {
    let report = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => UnixStream::from(socket),
        Err(error) => {
            eprintln!("hearth-guest: {ARGUMENT}: standard input is not usable: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Err(error) = run(&report);
    // PID 1 reads one line.
    let reason = error.to_string().replace('\n', " ");
    // Nobody is left to tell if this fails too.
    let _ = (&report).write_all(format!("{FAILED}{reason}\n").as_bytes());
    ExitCode::FAILURE
}

fn run(mut report: &UnixStream) -> Result<Infallible, ContainerError> {
    let mut instructions = Vec::new();
    report.read_to_end(&mut instructions).map_err(ContainerError::Instructions)?;
    let app: App = serde_json::from_slice(&instructions).map_err(|error| ContainerError::Instructions(error.into()))?;

    let namespaces = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).map_err(kernel("making namespaces"))?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(kernel("making the container's first process"))? {
        ForkResult::Parent { child } => {
            // Without a reader there is nobody to run the application for, and its parent notices by itself.
            let _ = report.write_all(format!("{PID}{child}\n").as_bytes());
            // The child goes to PID 1, which waits for its end.
            std::process::exit(0)
        }
        ForkResult::Child => become_application(&app),
    }
}

fn become_application(app: &App) -> Result<Infallible, ContainerError> {
    setsid().map_err(kernel("starting a session"))?;
    sethostname(&app.hostname).map_err(kernel("setting the host name"))?;
    enter_root(app.all_capabilities)?;
    let null = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(kernel("opening /dev/null"))?;
    dup2_stdin(&null).map_err(kernel("closing standard input"))?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1).map_err(kernel("setting the limit of open files"))?;

    let user = user::resolve(&app.user, &read_or_empty("/etc/passwd")?, &read_or_empty("/etc/group")?)?;
    let environment = environment(app, &user);
    let cwd = if app.cwd.is_empty() { "/" } else { &app.cwd };
    fs::create_dir_all(cwd).map_err(|error| ContainerError::File(format!("creating WORKDIR {cwd}"), error))?;
    chdir(cwd).map_err(|error| ContainerError::Kernel { doing: format!("changing to WORKDIR {cwd}"), error })?;
    become_user(&user, app.all_capabilities)?;
    execute(app, &environment)
}

/// Makes the image's file system this process's root, with the kernel's file systems in their places.
fn enter_root(privileged: bool) -> Result<(), ContainerError> {
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
    let fuse = privileged.then_some(("fuse", 10, 229));
    for (name, major, minor) in DEVICES.into_iter().chain(fuse) {
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .map_err(|error| ContainerError::Kernel { doing: format!("making /dev/{name}"), error })?;
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
    umask(previous);
    Ok(())
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
            bind(&target, &target, MsFlags::MS_REC)?;
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(None::<&str>, &target, None::<&str>, flags | MsFlags::MS_NOEXEC, None::<&str>)
                .map_err(|error| ContainerError::Kernel { doing: format!("making {path} read-only"), error })?;
        }
    }
    Ok(())
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

/// The image's environment, completed as container engines do.
fn environment(app: &App, user: &User) -> Vec<(String, String)> {
    let mut environment = app.env.clone();
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOME", &user.home), ("HOSTNAME", &app.hostname)] {
        if !environment.iter().any(|(present, _)| present == name) {
            environment.push((name.to_owned(), value.to_owned()));
        }
    }
    environment
}

/// Gives up what the user shall not have. Root keeps the bounding set at exec; everybody else loses all capabilities at `setuid`.
fn become_user(user: &User, all_capabilities: bool) -> Result<(), ContainerError> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // So that /dev/stdout and /dev/stderr can be opened by name.
    fchown(io::stdout(), Some(uid), None).map_err(kernel("handing over standard output"))?;
    fchown(io::stderr(), Some(uid), None).map_err(kernel("handing over standard error"))?;
    if !all_capabilities {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !DEFAULT_CAPABILITIES.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).map_err(kernel("setting the supplementary groups"))?;
    setgid(gid).map_err(kernel("setting the group"))?;
    setuid(uid).map_err(kernel("setting the user"))
}

fn execute(app: &App, environment: &[(String, String)]) -> Result<Infallible, ContainerError> {
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, value)| value);
    let name = app.argv.first().ok_or(ContainerError::NoCommand)?;
    let program = find_program(name, path)?;
    let arguments = app.argv.iter().map(|argument| CString::new(argument.as_str())).collect::<Result<Vec<_>, _>>()?;
    let variables = environment.iter().map(|(name, value)| CString::new(format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
    let program_c = CString::new(program.display().to_string())?;
    // SAFETY: the default action runs no code of ours. The Rust runtime ignores this signal, which exec would hand on.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(kernel("restoring SIGPIPE"))?;
    match execve(&program_c, &arguments, &variables) {
        Err(Errno::ENOENT) if program.exists() => {
            Err(ContainerError::Kernel { doing: format!("{}: its interpreter or loader", program.display()), error: Errno::ENOENT })
        }
        Err(error) => Err(ContainerError::Kernel { doing: program.display().to_string(), error }),
    }
}

/// A name with a slash is a path; any other is looked for in PATH.
fn find_program(name: &str, path: &str) -> Result<PathBuf, ContainerError> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    path.split(':')
        .filter(|directory| !directory.is_empty())
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| candidate.is_file() && access(candidate, AccessFlags::X_OK).is_ok())
        .ok_or_else(|| ContainerError::NotInPath(name.to_owned()))
}

fn read_or_empty(path: &str) -> Result<String, ContainerError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(ContainerError::File(format!("reading {path}"), error)),
    }
}

fn kernel(doing: &str) -> impl Fn(Errno) -> ContainerError {
    move |error| ContainerError::Kernel { doing: doing.to_owned(), error }
}

/// As shells put it: "no such file or directory".
fn describe(error: Errno) -> String {
    let text = error.desc();
    text.chars().take(1).flat_map(char::to_lowercase).chain(text.chars().skip(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> App {
        App {
            argv: vec!["run".into()],
            env: vec![("HOME".into(), "/mine".into())],
            cwd: "/".into(),
            user: String::new(),
            stop_signal: 15,
            all_capabilities: false,
            hostname: "box".into(),
        }
    }

    #[test]
    fn the_environment_is_completed_not_replaced() {
        let user = User { uid: 0, gid: 0, groups: vec![], home: "/root".into() };
        let environment = environment(&app(), &user);
        let get = |name: &str| environment.iter().find(|(present, _)| present == name).map(|(_, value)| value.as_str());
        assert_eq!(get("HOME"), Some("/mine"));
        assert_eq!(get("PATH"), Some(DEFAULT_PATH));
        assert_eq!(get("HOSTNAME"), Some("box"));
    }

    #[test]
    fn programs_are_found_as_a_shell_would() {
        assert_eq!(find_program("sh", "/nowhere::/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(find_program("./sh", "/bin").unwrap(), Path::new("./sh"));
        assert_eq!(
            find_program("no-such-program", "/bin").unwrap_err().to_string(),
            "\"no-such-program\": executable file not found in PATH"
        );
    }

    #[test]
    fn the_default_capabilities_are_dockers() {
        let mask = DEFAULT_CAPABILITIES.iter().fold(0, |mask, capability| mask | capability.bitmask());
        assert_eq!(mask, 0xa804_25fb);
    }

    #[test]
    fn reasons_read_like_a_shells() {
        assert_eq!(
            ContainerError::Kernel { doing: "/app/run".into(), error: Errno::ENOENT }.to_string(),
            "/app/run: no such file or directory"
        );
    }
}
