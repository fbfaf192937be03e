//! A sandbox that is a virtual machine: the builder's root file system on a disk, and four more disks with what the build needs.

use std::{
    fs::Permissions,
    io,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::{process::Command, sync::mpsc, time::timeout};

use super::{CERTIFICATES, Call, Host, START, SandboxError, WorkDir, bundle::daemon_environment, environment, has_certificates, io_error};
use crate::{
    BuildMachine, MachineDisk, MachineError, MachineSpec, Output, Program,
    lines::LineSplitter,
    process::{CAPTURE_LIMIT, Captured, MAX_TRANSLATED, ProcessError, Stop, run_captured},
    stores::Store,
};

/// How long the daemon may take to end when it is asked to.
const END: Duration = Duration::from_secs(30);
/// How long the build's files may take to be packed.
const PACK: Duration = Duration::from_secs(300);
/// Pieces of output that wait for their reader.
const OUTPUT_QUEUE: usize = 64;

const PREPARE: &str = include_str!("machine.sh");
/// Ends the daemon and the store's file system.
const FINISH: &str = "daemon=$(cat /run/docker.pid); kill -TERM \"$daemon\"; while [ -e \"/proc/$daemon/exe\" ]; do sleep 0.05; done; \
                      umount /var/lib/docker";

/// A machine in which the daemon answers.
#[derive(Debug)]
pub(crate) struct Machine {
    id: String,
    machine: Arc<dyn BuildMachine>,
    /// Made when the store is left in order.
    clean_mark: PathBuf,
}

impl Machine {
    /// Boots a machine and starts the daemon on a store.
    pub(super) async fn start(
        host: &Host,
        id: &str,
        store: &Store,
        work: &WorkDir,
        machine: &Arc<dyn BuildMachine>,
        stop: &Stop,
    ) -> Result<Self, SandboxError> {
        let unprepared = || SandboxError::Start("the builder's disk is not prepared".to_owned());
        let rootfs = host.root_disk.clone().ok_or_else(unprepared)?;
        if has_certificates() {
            tokio::fs::copy(CERTIFICATES, work.0.join("certificates")).await.map_err(io_error("copying the certificate authorities"))?;
        }
        let context = pack(work, stop).await?;
        let disk = |serial: &'static str, path: PathBuf, writable| MachineDisk { serial, path, writable };
        let disks = vec![
            disk("context", context.clone(), false),
            disk("image", work.disk(), true),
            disk("base", host.base_archive.clone(), false),
            disk("store", store.disk().await?, true),
        ];
        // Beside the build's directory, which the machine has a copy of.
        let spec = MachineSpec {
            id: id.to_owned(),
            dir: work.0.with_extension("machine"),
            rootfs,
            disks,
            argv: vec!["sleep".to_owned(), "infinity".to_owned()],
            env: daemon_environment(&environment()),
            timeout: START,
        };
        let this = Self { id: id.to_owned(), machine: Arc::clone(machine), clean_mark: store.clean_mark() };
        let begin = async {
            machine.boot(spec).await?;
            let mut ports = Vec::new();
            for address in &host.local_registries {
                let port = address.port().to_string();
                // They differ by their ports alone at the gateway.
                if !ports.contains(&port) {
                    machine.share(*address).await?;
                    ports.push(port);
                }
            }
            let ran = this.capture(Call::new("sh").args(["-c", PREPARE, "machine.sh"]).args(ports), stop).await?;
            if ran.status.success() { Ok(()) } else { Err(SandboxError::Start(ran.stderr)) }
        };
        let begun = tokio::select! {
            begun = timeout(START, begin) => begun.unwrap_or(Err(SandboxError::Slow)),
            stopped = stop.reached() => Err(stopped.into()),
        };
        if let Err(error) = begun {
            machine.kill().await;
            return Err(error);
        }
        // The machine has unpacked it. Deleting what cannot be deleted is left to the build's end.
        let _ = tokio::fs::remove_file(context).await;
        Ok(this)
    }

    pub(super) async fn capture(&self, call: Call, stop: &Stop) -> Result<Captured, ProcessError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let keep = async |mut output: mpsc::Receiver<Output>| {
            while let Some(piece) = output.recv().await {
                let (into, bytes) = match piece {
                    Output::Stdout(bytes) => (&mut stdout, bytes),
                    Output::Stderr(bytes) => (&mut stderr, bytes),
                };
                let room = CAPTURE_LIMIT.saturating_sub(into.len());
                into.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
        };
        let status = self.run(call, stop, keep).await?;
        Ok(Captured { status, stdout, stderr: String::from_utf8_lossy(&stderr).trim().to_owned() })
    }

    pub(super) async fn translate(
        &self,
        call: Call,
        stop: &Stop,
        log: &mpsc::Sender<String>,
        mut translate: impl FnMut(&str) -> Vec<String>,
    ) -> Result<ExitStatus, ProcessError> {
        let forward = async |mut output: mpsc::Receiver<Output>| {
            let mut splitter = LineSplitter::with_longest(MAX_TRANSLATED);
            loop {
                let piece = output.recv().await;
                let lines = match &piece {
                    Some(Output::Stdout(bytes) | Output::Stderr(bytes)) => splitter.push(bytes),
                    None => splitter.finish().into_iter().collect(),
                };
                for line in lines.iter().flat_map(|line| translate(line)) {
                    // A log without a reader is no reason to fail a build.
                    let _ = log.send(line).await;
                }
                if piece.is_none() {
                    return;
                }
            }
        };
        self.run(call, stop, forward).await
    }

    /// Runs a program and has its output read.
    async fn run(&self, call: Call, stop: &Stop, read: impl AsyncFnOnce(mpsc::Receiver<Output>)) -> Result<ExitStatus, ProcessError> {
        let (pieces, output) = mpsc::channel(OUTPUT_QUEUE);
        let program = Program { argv: call.argv, dir: call.dir.to_owned() };
        let both = async { tokio::join!(self.machine.run(program, pieces), read(output)).0 };
        tokio::select! {
            code = both => Ok(ExitStatus::from_raw((code? & 0xff) << 8)),
            stopped = stop.reached() => {
                // What runs in it has no other way to hear of that.
                self.machine.kill().await;
                Err(stopped.into())
            }
        }
    }

    pub(super) async fn kill(&self) {
        self.machine.kill().await;
    }

    pub(super) async fn end(self) {
        let finished = self.capture(Call::new("sh").args(["-c", FINISH]), &Stop::after(END)).await;
        self.machine.kill().await;
        match finished {
            Ok(ran) if ran.status.success() => {
                if let Err(error) = tokio::fs::write(&self.clean_mark, "").await {
                    tracing::warn!(sandbox = self.id, %error, "a layer store will begin anew");
                }
            }
            Ok(ran) => tracing::warn!(sandbox = self.id, error = ran.stderr, "a build's daemon did not end in order"),
            // It was killed already where the build was stopped.
            Err(ProcessError::Machine(MachineError::Gone(_))) => {}
            Err(error) => tracing::warn!(sandbox = self.id, %error, "a build's daemon did not end in order"),
        }
    }
}

/// Packs the build's directory for the machine. Everything in it becomes root's.
async fn pack(work: &WorkDir, stop: &Stop) -> Result<PathBuf, SandboxError> {
    let archive = work.0.with_extension("tar");
    let mut tar = Command::new("tar");
    tar.args(["--create", "--numeric-owner", "--owner=0", "--group=0", "--exclude=./disk", "--file"]).arg(&archive);
    tar.arg("--directory").arg(&work.0).arg(".").stdin(Stdio::null());
    let limit = Stop { cancel: stop.cancel.clone(), deadline: stop.deadline.min(Stop::after(PACK).deadline) };
    let packed = run_captured(tar, &limit).await?;
    if !packed.status.success() {
        return Err(io_error("packing the build's files")(io::Error::other(packed.stderr)));
    }
    // The machine's user opens it again, whatever the server's umask. The directory is for root alone.
    let mode = tokio::fs::set_permissions(&archive, Permissions::from_mode(0o644)).await;
    mode.map(|()| archive).map_err(io_error("sharing the build's files"))
}
