//! The virtual machine that a build runs in, where builds do not run in namespaces of the host.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use hearth_build::{BuildMachine, MachineError, MachineSpec, Output, Program};
use hearth_guest_protocol::{App, Exec, ExecInput, ExecOutput, read_message, write_message};
use hearth_machine::{BootSpec, Dial, Disk, Egress, Engine, Machine, MachineEvent, NoServices, Target};
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    capacity::{Capacity, Reservation},
    settings::BuildMachineSettings,
};

use super::build::HOSTNAME;

/// How long the news of why a program was killed may take.
const NEWS: Duration = Duration::from_secs(2);
/// How the kernel ends what has no memory.
const KILLED: i32 = 128 + 9;

/// A machine for one build.
pub struct BuilderMachine {
    engine: Arc<dyn Engine>,
    capacity: Arc<Capacity>,
    settings: BuildMachineSettings,
    /// What the image may reach.
    egress: Egress,
    running: Mutex<Option<Running>>,
}

struct Running {
    machine: Box<dyn Machine>,
    reached: Reached,
    events: JoinHandle<()>,
    /// Until the machine has gone.
    _promised: Reservation,
}

/// What programs need of the running machine.
#[derive(Clone)]
struct Reached {
    dialer: Arc<dyn Dial>,
    /// Why it has ended.
    end: watch::Receiver<Option<End>>,
}

#[derive(Debug, Clone)]
enum End {
    OutOfMemory,
    Other(String),
}

impl BuilderMachine {
    pub fn new(engine: Arc<dyn Engine>, capacity: Arc<Capacity>, settings: BuildMachineSettings, egress: Egress) -> Self {
        Self { engine, capacity, settings, egress, running: Mutex::default() }
    }

    /// What an error of the session means, given how the machine ended.
    async fn explained(&self, reached: &mut Reached, error: impl fmt::Display) -> MachineError {
        let ended = timeout(NEWS, reached.end.wait_for(Option::is_some)).await;
        match ended.ok().and_then(Result::ok).and_then(|end| end.clone()) {
            Some(End::OutOfMemory) => MachineError::OutOfMemory(self.settings.memory_mib),
            Some(End::Other(reason)) => MachineError::Gone(reason),
            None => MachineError::Gone(error.to_string()),
        }
    }
}

impl fmt::Debug for BuilderMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuilderMachine").field("settings", &self.settings).field("egress", &self.egress).finish_non_exhaustive()
    }
}

#[async_trait]
impl BuildMachine for BuilderMachine {
    async fn boot(&self, spec: MachineSpec) -> Result<(), MachineError> {
        let BuildMachineSettings { memory_mib, vcpus } = self.settings;
        let mut promised = self.capacity.admit_boot(memory_mib).map_err(|shortage| MachineError::Capacity(shortage.to_string()))?;
        let disks = spec.disks.into_iter();
        let disks = disks.map(|disk| Disk { serial: disk.serial.to_owned(), path: disk.path, writable: disk.writable }).collect();
        let boot = BootSpec {
            id: spec.id,
            dir: spec.dir,
            rootfs: spec.rootfs,
            disks,
            vcpus,
            memory_mib,
            egress: Egress::Internet,
            services: Arc::new(NoServices),
            timeout: spec.timeout,
        };
        let mut running = self.running.lock().await;
        let mut machine = self.engine.boot(boot).await.map_err(failed)?;
        promised.started();
        let (report, end) = watch::channel(None);
        let events = tokio::spawn(watch_end(machine.take_events(), report));
        let app = App {
            argv: spec.argv,
            env: spec.env,
            cwd: "/".to_owned(),
            user: String::new(),
            stop_signal: 15,
            all_capabilities: true,
            hostname: HOSTNAME.to_owned(),
        };
        let started = machine.start_app(app).await;
        let reached = Reached { dialer: machine.dialer(), end };
        *running = Some(Running { machine, reached, events, _promised: promised });
        started.map_err(failed)
    }

    async fn share(&self, address: SocketAddr) -> Result<(), MachineError> {
        let mut running = self.running.lock().await;
        running.as_mut().ok_or_else(not_running)?.machine.share(address).await.map_err(failed)
    }

    async fn restrict(&self) -> Result<(), MachineError> {
        let mut running = self.running.lock().await;
        running.as_mut().ok_or_else(not_running)?.machine.restrict(&self.egress).await.map_err(failed)
    }

    async fn run(&self, program: Program, output: mpsc::Sender<Output>) -> Result<i32, MachineError> {
        // Not held while the program runs: several may, and the machine may be killed meanwhile.
        let mut reached = self.running.lock().await.as_ref().ok_or_else(not_running)?.reached.clone();
        let exec = Exec { argv: program.argv, env: Vec::new(), cwd: Some(program.dir), user: None, terminal: None };
        match converse(reached.dialer.as_ref(), exec, &output).await {
            // The daemon may have been killed with it, or it alone.
            Ok(KILLED) => match self.explained(&mut reached, "").await {
                error @ MachineError::OutOfMemory(_) => Err(error),
                _ => Ok(KILLED),
            },
            Ok(code) => Ok(code),
            Err(Failure::Session(error)) => Err(self.explained(&mut reached, error).await),
            Err(Failure::Start(reason)) => Err(failed(io::Error::other(reason))),
        }
    }

    async fn kill(&self) {
        let running = self.running.lock().await.take();
        if let Some(Running { machine, events, .. }) = running {
            machine.kill().await;
            events.abort();
        }
    }
}

/// Why a program has no exit code.
enum Failure {
    Session(String),
    Start(String),
}

/// Runs a program to its end.
async fn converse(dialer: &dyn Dial, exec: Exec, output: &mpsc::Sender<Output>) -> Result<i32, Failure> {
    let session = |error: &dyn fmt::Display| Failure::Session(error.to_string());
    let mut stream = dialer.open(&Target::Process(exec)).await.map_err(|error| session(&error))?;
    write_message(&mut stream, &ExecInput::StdinEnd).await.map_err(|error| session(&error))?;
    loop {
        let piece = match read_message(&mut stream).await.map_err(|error| session(&error))? {
            ExecOutput::Stdout(bytes) => Output::Stdout(bytes),
            ExecOutput::Stderr(bytes) => Output::Stderr(bytes),
            ExecOutput::Exited(status) => return Ok(status.code),
            ExecOutput::Failed { reason } => return Err(Failure::Start(reason)),
            ExecOutput::Started | ExecOutput::StdinTaken(_) => continue,
        };
        // Whoever does not listen any more has the machine killed.
        let _ = output.send(piece).await;
    }
}

/// Reads a machine's events until it ends.
async fn watch_end(events: Option<mpsc::Receiver<MachineEvent>>, report: watch::Sender<Option<End>>) {
    let Some(mut events) = events else { return };
    while let Some(event) = events.recv().await {
        let end = match event {
            MachineEvent::AppExited(status) if status.out_of_memory => End::OutOfMemory,
            MachineEvent::AppExited(status) => End::Other(format!("its main process ended with {}", status.code)),
            MachineEvent::Died { reason } => End::Other(reason),
            MachineEvent::DiskFailed { full: true } => End::Other("the host's disk is full".to_owned()),
            MachineEvent::DiskFailed { full: false } => End::Other("the host's disk failed".to_owned()),
            MachineEvent::Listening(_) | MachineEvent::Activity(_) | MachineEvent::Log(_) => continue,
        };
        report.send_if_modified(|known| known.is_none() && known.replace(end).is_none());
    }
}

fn not_running() -> MachineError {
    MachineError::Gone("it does not run".to_owned())
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    MachineError::Failed(Box::new(error))
}
