//! One QEMU process: started without privileges, watched until it is gone, never left behind.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use nix::{
    sys::{prctl, signal::Signal},
    unistd::{Pid, SysconfVar, getpid, getppid, sysconf},
};
use tokio::{
    io::AsyncReadExt,
    process::Child,
    runtime::Handle,
    sync::{oneshot, watch},
};

/// How much of QEMU's standard error is kept, in bytes.
const KEPT_STDERR: usize = 4096;

/// Descriptors that a process inherits, numbered as it sees them.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<FdMapping>);

impl Descriptors {
    /// Adds a descriptor and returns its number in the process.
    pub fn add(&mut self, descriptor: impl Into<OwnedFd>) -> i32 {
        let child_fd = 3 + i32::try_from(self.0.len()).expect("a handful of descriptors");
        self.0.push(FdMapping { parent_fd: descriptor.into(), child_fd });
        child_fd
    }

    /// Adds a descriptor and returns a path by which the process can open the same file again, wherever it lies.
    pub fn path(&mut self, descriptor: impl Into<OwnedFd>) -> String {
        format!("/proc/self/fd/{}", self.add(descriptor))
    }
}

/// What to start.
#[derive(Debug)]
pub struct Launch {
    pub program: String,
    pub arguments: Vec<String>,
    pub descriptors: Descriptors,
    /// User and group that the process runs as.
    pub uid: u32,
    pub gid: u32,
}

/// A running process. Dropping it kills the process.
#[derive(Debug)]
pub struct Process {
    /// Process id; stays taken until [`Process::wait`] has returned.
    pub pid: u32,
    exited: watch::Receiver<Option<Arc<str>>>,
    kill: Option<oneshot::Sender<()>>,
}

impl Process {
    /// Kills the process and waits until it is gone.
    pub async fn kill(mut self) {
        drop(self.kill.take());
        self.wait().await;
    }

    /// Waits until the process is gone and says how it ended.
    pub async fn wait(&self) -> Arc<str> {
        self.exit_watch().await
    }

    /// Processor time that it has used, of all its threads.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        let ticks = parse_cpu_ticks(&std::fs::read_to_string(format!("/proc/{}/stat", self.pid))?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{}/stat is not understood", self.pid)))?;
        let rate = sysconf(SysconfVar::CLK_TCK)?.and_then(|rate| u32::try_from(rate).ok()).filter(|rate| *rate > 0).unwrap_or(100);
        Ok(Duration::from_secs(ticks) / rate)
    }

    /// A future that resolves when the process is gone, and does not keep it alive.
    pub fn exit_watch(&self) -> impl Future<Output = Arc<str>> + Send + 'static {
        let mut exited = self.exited.clone();
        async move {
            match exited.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(reason)) => reason.clone(),
                Ok(None) | Err(_) => "its supervisor is gone".into(),
            }
        }
    }
}

/// Starts processes from one thread that lives as long as the engine. The kernel's parent-death signal follows the thread that forked, so a
/// thread that comes and goes would take its processes with it.
#[derive(Debug)]
pub struct Spawner(mpsc::Sender<Job>);

struct Job {
    launch: Launch,
    reply: oneshot::Sender<io::Result<Child>>,
}

impl Spawner {
    /// Starts the thread. It ends when the spawner is dropped, and takes every process with it.
    pub fn start() -> io::Result<Self> {
        let runtime = Handle::current();
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::Builder::new().name("spawner".into()).spawn(move || {
            let _runtime = runtime.enter();
            while let Ok(job) = queue.recv() {
                let _ = job.reply.send(start(job.launch));
            }
        })?;
        Ok(Self(jobs))
    }

    /// Starts a process.
    pub async fn spawn(&self, launch: Launch) -> io::Result<Process> {
        let gone = || io::Error::other("the spawner's thread is gone");
        let (reply, answer) = oneshot::channel();
        self.0.send(Job { launch, reply }).map_err(|_| gone())?;
        let mut child = answer.await.map_err(|_| gone())??;
        let pid = child.id().expect("a process that was not waited for has an id");
        let (report, exited) = watch::channel(None);
        let (kill, killed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let stderr = tokio::spawn(keep_tail(child.stderr.take()));
            let status = tokio::select! {
                status = child.wait() => status,
                _ = killed => {
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            let said = stderr.await.unwrap_or_default();
            let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            let reason = if said.is_empty() { format!("QEMU ended ({status})") } else { format!("QEMU ended ({status}): {said}") };
            report.send_replace(Some(reason.into()));
        });
        Ok(Process { pid, exited, kill: Some(kill) })
    }
}

fn start(launch: Launch) -> io::Result<Child> {
    let parent = getpid();
    let mut command = Command::new(&launch.program);
    command.args(&launch.arguments).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.uid(launch.uid).gid(launch.gid);
    command.fd_mappings(launch.descriptors.0).map_err(io::Error::other)?;
    // SAFETY: only system calls that are async-signal-safe. Runs after the user was changed, which would clear the parent-death signal.
    unsafe { command.pre_exec(move || confine(parent)) };
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true).spawn()
}

/// Runs in the new process before QEMU does.
fn confine(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    prctl::set_no_new_privs()?;
    // The parent may have died before it could be watched.
    if getppid() != parent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// User and system time, fields 14 and 15 of proc_pid_stat(5), in clock ticks. The second field, a name in parentheses, may hold anything.
fn parse_cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11);
    Some(times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?)
}

/// Reads to the end and returns the last few lines.
async fn keep_tail(stderr: Option<tokio::process::ChildStderr>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(read) = stderr.read(&mut buffer).await {
        if read == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..read]);
        kept.drain(..kept.len().saturating_sub(KEPT_STDERR));
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            descriptors: Descriptors::default(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        }
    }

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 9 9 20 0 1 0 5 6 7";
        assert_eq!(parse_cpu_ticks(stat), Some(300));
        assert_eq!(parse_cpu_ticks("7 (a S 1"), None);
    }

    #[tokio::test]
    async fn the_last_words_of_a_process_are_kept() {
        let spawner = Spawner::start().unwrap();
        let process = spawner.spawn(shell("echo no such disk >&2; exit 3")).await.unwrap();
        assert_eq!(&*process.wait().await, "QEMU ended (exit status: 3): no such disk");
    }

    #[tokio::test]
    async fn a_killed_process_is_gone_when_kill_returns() {
        let spawner = Spawner::start().unwrap();
        let process = spawner.spawn(shell("exec sleep 1000")).await.unwrap();
        let path = format!("/proc/{}", process.pid);
        assert!(std::fs::exists(&path).unwrap());
        process.kill().await;
        assert!(!std::fs::exists(&path).unwrap());
    }

    #[tokio::test]
    async fn processes_do_not_outlive_their_spawner() {
        let spawner = Spawner::start().unwrap();
        let process = spawner.spawn(shell("exec sleep 1000")).await.unwrap();
        drop(spawner);
        assert_eq!(&*process.wait().await, "QEMU ended (signal: 9 (SIGKILL))");
    }

    #[tokio::test]
    async fn descriptors_arrive_under_their_numbers() {
        let spawner = Spawner::start().unwrap();
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut launch = shell("");
        let number = launch.descriptors.add(far);
        launch.arguments[1] = format!("echo hello >&{number}");
        spawner.spawn(launch).await.unwrap().wait().await;
        let text = std::io::read_to_string(near).unwrap();
        assert_eq!(text, "hello\n");
    }
}
