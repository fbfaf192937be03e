//! From a process in the container to the program it shall be: limits, user, environment, working directory, capabilities, exec.

use std::{
    convert::Infallible,
    ffi::CString,
    fs, io,
    path::{Path, PathBuf},
};

use caps::{CapSet, Capability};
use hearth_guest_protocol::App;
use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, setrlimit},
        signal::{SigHandler, Signal, signal},
    },
    unistd::{AccessFlags, Gid, Uid, access, chdir, execve, fchown, setgid, setgroups, setuid},
};

use super::{
    advice::advice,
    container::{ContainerError, kernel},
    user::{self, User},
};

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

/// Becomes the program of `app`, as its user, in its directory. For a process that is in the container; standard input, output and error
/// are what it has.
pub fn become_program(app: &App) -> Result<Infallible, ContainerError> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1).map_err(kernel("setting the limit of open files"))?;
    let user = user::resolve(&app.user, &read_or_empty("/etc/passwd")?, &read_or_empty("/etc/group")?)?;
    let environment = environment(app, &user);
    let cwd = if app.cwd.is_empty() { "/" } else { &app.cwd };
    fs::create_dir_all(cwd).map_err(|error| ContainerError::File(format!("creating WORKDIR {cwd}"), error))?;
    chdir(cwd).map_err(|error| ContainerError::Kernel { doing: format!("changing to WORKDIR {cwd}"), error })?;
    become_user(&user, app.all_capabilities)?;
    execute(app, &environment)
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
    let Err(error) = execve(&program_c, &arguments, &variables);
    let doing = match error {
        Errno::ENOENT if program.exists() => format!("{}: its interpreter or loader", program.display()),
        _ => program.display().to_string(),
    };
    Err(match advice(&program, error) {
        Some(advice) => ContainerError::Program { doing, error, advice },
        None => ContainerError::Kernel { doing, error },
    })
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
}
