//! A running QEMU machine, and how its life ends: captured, suspended or killed.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hearth_guest_protocol::{App, Marker, Parting};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    EVENT_QUEUE, Failure, NEXT_STATE, OVERLAY, READY, Shared, create_overlay, process::Process, qmp::Qmp, suspended::SuspendedState,
};
use crate::{
    engine::{CaptureError, Dial, GuestError, GuestServices, Machine, MachineEvent, SuspendError, SuspendOutcome, Usage},
    kit::sha256_data,
    memory::{self, Mapping},
    network::{Egress, NetworkError, Slot},
    session::{Identity, Session},
    snapshot::{BOOT_OVERLAY, DEVICE_STATE, EMPTY_OVERLAY, FORMAT, MEMORY, ROOTFS, Snapshot, SnapshotManifest},
    working_set::WorkingSet,
};

/// How long QEMU may take to end after it was told to. It has only to close its files.
const QUIT: Duration = Duration::from_secs(10);

/// How long a guest that is to be killed may take to deliver its log.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a machine is made of.
pub struct Parts {
    pub id: String,
    pub dir: PathBuf,
    pub process: Process,
    pub qmp: Qmp,
    /// The host's end of the guest's channel, which outlives sessions.
    pub channel: UnixStream,
    pub slot: Slot,
    pub state_path: String,
    pub origin: Origin,
    pub generation: u64,
    pub services: Arc<dyn GuestServices>,
    pub engine: Arc<Shared>,
}

/// Where a machine's memory comes from.
pub enum Origin {
    /// It was booted: its memory is this file's.
    Boot { memory: File, rootfs: PathBuf, vcpus: u8, memory_mib: u32 },
    /// It was booted with disks of its own, and is not an image in the making.
    Tool,
    /// It is a clone: it maps this many bytes of its snapshot's memory privately.
    Clone { snapshot: Arc<Snapshot>, image: Arc<File>, mapped: u64 },
}

/// A running machine.
pub struct QemuMachine {
    parts: Parts,
    session: Session,
    events: Option<mpsc::Receiver<MachineEvent>>,
    /// Set before the host ends the machine: its end is no news then.
    closing: Arc<AtomicBool>,
}

impl QemuMachine {
    /// Takes over a machine whose guest is ready.
    async fn run(parts: Parts, session: Session, events: mpsc::Sender<MachineEvent>, receiver: mpsc::Receiver<MachineEvent>) -> Self {
        let closing = Arc::new(AtomicBool::new(false));
        let (exited, disk_failure) = (parts.process.exit_watch(), parts.qmp.disk_failure());
        let broken = session.take_end().await;
        let (id, expected) = (parts.id.clone(), closing.clone());
        tokio::spawn(async move {
            let broken = async {
                match broken {
                    Some(broken) => broken.await.is_ok(),
                    None => false,
                }
            };
            tokio::pin!(exited, broken, disk_failure);
            let mut disk_works = true;
            let reason = loop {
                tokio::select! {
                    reason = &mut exited => break reason,
                    by_guest = &mut broken => {
                        if !by_guest || expected.load(Ordering::Acquire) {
                            // The host ended the session. Whoever waits for the last of its events shall not wait for this task.
                            return;
                        }
                        // A session that breaks because its process ended is better explained by the process.
                        let ended = timeout(Duration::from_secs(1), &mut exited).await;
                        break ended.unwrap_or_else(|_| "the guest broke its session off".into());
                    }
                    failure = &mut disk_failure, if disk_works => {
                        disk_works = false;
                        tracing::error!(id, full = failure.full, "the host could not serve a machine's disk: its programs see I/O errors");
                        let _ = events.send(MachineEvent::DiskFailed { full: failure.full }).await;
                    }
                }
            };
            if !expected.load(Ordering::Acquire) {
                let _ = events.send(MachineEvent::Died { reason: reason.to_string() }).await;
            }
        });
        Self { parts, session, events: Some(receiver), closing }
    }

    fn expect_end(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

#[async_trait]
impl Machine for QemuMachine {
    async fn start_app(&self, app: App) -> Result<(), GuestError> {
        self.session.start(app).await
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        self.session.dialer()
    }

    fn take_events(&mut self) -> Option<mpsc::Receiver<MachineEvent>> {
        self.events.take()
    }

    async fn stop_app(&self) -> Result<(), GuestError> {
        self.session.stop().await
    }

    async fn record_working_set(&self) -> io::Result<u64> {
        let Origin::Clone { snapshot, mapped, .. } = &self.parts.origin else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "only a clone of a snapshot has a working set"));
        };
        let (pid, mapped, dir) = (self.parts.process.pid, *mapped, snapshot.dir.clone());
        let record = move || WorkingSet::record(&dir, &Mapping::of(pid, mapped)?);
        tokio::task::spawn_blocking(record).await.map_err(io::Error::other)?
    }

    async fn capture(self: Box<Self>, into: PathBuf) -> Result<Snapshot, CaptureError> {
        self.expect_end();
        let parts = self.parts;
        let Origin::Boot { memory, rootfs, vcpus, memory_mib } = parts.origin else {
            return Err(CaptureError::Monitor("only a machine that was booted with one disk can be captured".to_owned()));
        };
        let touched = memory::allocated_bytes(&memory).map_err(|source| Failure::host("looking at guest memory", source))?;
        let marker = self.session.detach(Parting::Capture { touched }).await?;
        freeze(&parts.qmp, &parts.state_path).await?;
        end(parts.process, &parts.qmp).await;
        let disk_bytes = fs::metadata(&rootfs).map_err(Failure::of("opening", &rootfs))?.len();
        let draft = draft_of(&into);
        let _ = fs::remove_dir_all(&draft);
        fs::create_dir_all(&draft).map_err(Failure::of("creating", &draft))?;
        create_overlay(&parts.engine.image_program, &draft.join(EMPTY_OVERLAY), disk_bytes).await?;
        let engine = parts.engine.clone();
        let write = {
            let (draft, into) = (draft.clone(), into.clone());
            move || -> io::Result<(Snapshot, File)> {
                let memory_bytes = memory::copy_data(&memory, &draft.join(MEMORY))?;
                fs::rename(parts.dir.join(NEXT_STATE), draft.join(DEVICE_STATE))?;
                fs::rename(parts.dir.join(OVERLAY), draft.join(BOOT_OVERLAY))?;
                fs::hard_link(&rootfs, draft.join(ROOTFS))?;
                let mut checksums = std::collections::BTreeMap::new();
                for name in [MEMORY, DEVICE_STATE, BOOT_OVERLAY, EMPTY_OVERLAY, ROOTFS] {
                    let file = File::open(draft.join(name))?;
                    keep_for_root(&file)?;
                    file.sync_all()?;
                    checksums.insert(name.to_owned(), sha256_data(&file)?);
                }
                let manifest = SnapshotManifest {
                    format: FORMAT,
                    platform: engine.platform.clone(),
                    vcpus,
                    memory_mib,
                    kit: engine.kit_checksum.clone(),
                    marker,
                    memory_bytes,
                    device_state_bytes: fs::metadata(draft.join(DEVICE_STATE))?.len(),
                    disk_bytes: memory::data_bytes(&draft.join(BOOT_OVERLAY))?,
                    sha256: checksums,
                };
                memory::seal(&memory)?;
                Ok((Snapshot::publish(&draft, &into, manifest)?, memory))
            }
        };
        let written = tokio::task::spawn_blocking(write).await.map_err(io::Error::other).flatten();
        match written {
            Ok((snapshot, memory)) => {
                parts.engine.images.insert(&snapshot, memory).await;
                Ok(snapshot)
            }
            Err(source) => {
                let _ = fs::remove_dir_all(&draft);
                Err(Failure::Host { what: format!("writing the snapshot {}", into.display()), source }.into())
            }
        }
    }

    async fn suspend(self: Box<Self>, cancel: CancellationToken) -> Result<SuspendOutcome, SuspendError> {
        self.expect_end();
        let parts = self.parts;
        let Origin::Clone { mapped, ref image, .. } = parts.origin else {
            return Err(SuspendError::Monitor("only a clone of a snapshot can be suspended".to_owned()));
        };
        let marker = self.session.detach(Parting::Pause).await?;
        if cancel.is_cancelled() {
            return parts.run_on(marker).await;
        }
        freeze(&parts.qmp, &parts.state_path).await?;
        let (dir, image, pid, generation) = (parts.dir.clone(), Arc::clone(image), parts.process.pid, parts.generation);
        let write = move || SuspendedState::write(&dir, &Mapping::of(pid, mapped)?, &image, marker, generation, &cancel);
        let written = tokio::task::spawn_blocking(write).await.map_err(io::Error::other).flatten();
        match written {
            Ok(Some(suspended)) => {
                end(parts.process, &parts.qmp).await;
                Ok(SuspendOutcome::Suspended(suspended))
            }
            Ok(None) => {
                parts.qmp.cont().await.map_err(Failure::monitor)?;
                parts.run_on(marker).await
            }
            Err(source) => {
                end(parts.process, &parts.qmp).await;
                Err(Failure::of("writing the suspended state to", &parts.dir)(source).into())
            }
        }
    }

    fn usage(&self) -> io::Result<Usage> {
        Ok(Usage { cpu: self.parts.process.cpu_time()?, sent_bytes: self.parts.slot.sent_bytes()? })
    }

    async fn restrict(&mut self, egress: &Egress) -> Result<(), NetworkError> {
        self.parts.slot.restrict(egress).await
    }

    async fn share(&mut self, address: SocketAddr) -> Result<(), NetworkError> {
        self.parts.slot.share(address).await
    }

    async fn kill(self: Box<Self>) -> bool {
        self.expect_end();
        let Self { parts, session, .. } = *self;
        // A guest that lets go of its session has delivered its log.
        let delivered = matches!(timeout(LAST_WORDS, session.detach(Parting::End)).await, Ok(Ok(_)));
        parts.process.kill().await;
        tracing::debug!(id = parts.id, delivered, "killed");
        delivered
    }
}

impl Parts {
    /// Opens a session with the guest, whose processors run, and makes a machine of the parts. `marker` is the one the guest waits for.
    pub async fn begin<E: From<Failure> + From<GuestError>>(self, marker: Marker, deadline: Duration) -> Result<QemuMachine, E> {
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let channel = self.channel.try_clone().map_err(|source| Failure::host("sharing the guest's channel", source))?;
        let services = Arc::clone(&self.services);
        let identity = Identity { vm_id: self.id.clone(), generation: self.generation, network: Some(self.slot.network()), services };
        let session = tokio::select! {
            session = Session::open(channel, marker, identity, deadline, events.clone()) => session?,
            reason = self.process.exit_watch() => return Err(Failure::Monitor(reason.to_string()).into()),
        };
        Ok(QemuMachine::run(self, session, events, receiver).await)
    }

    /// Goes on with a machine whose session has ended and whose processors run: the same life in a new session.
    async fn run_on(self, marker: Marker) -> Result<SuspendOutcome, SuspendError> {
        let machine = self.begin::<SuspendError>(marker, READY).await?;
        tracing::debug!(id = machine.parts.id, "a suspend was cancelled");
        Ok(SuspendOutcome::Cancelled(Box::new(machine)))
    }
}

/// Stops the machine and writes its device state.
async fn freeze(qmp: &Qmp, state_path: &str) -> Result<(), Failure> {
    qmp.stop().await.map_err(Failure::monitor)?;
    qmp.save(state_path.to_owned()).await.map_err(Failure::monitor)
}

/// Ends a process that has nothing left to do.
async fn end(process: Process, qmp: &Qmp) {
    let quit = async {
        // QEMU may close the monitor before it has answered: what counts is that it ends.
        let _ = qmp.quit().await;
        process.wait().await;
    };
    if timeout(QUIT, quit).await.is_err() {
        tracing::warn!(pid = process.pid, "QEMU did not end by itself within {} s and is killed", QUIT.as_secs());
    }
    process.kill().await;
}

/// Directory in which a snapshot is written before it has its name.
fn draft_of(into: &Path) -> PathBuf {
    let name = into.file_name().unwrap_or_default().to_string_lossy();
    into.with_file_name(format!(".{name}.draft"))
}

/// Takes a file back from the user that a machine ran as, for everyone to read and nobody to change.
fn keep_for_root(file: &File) -> io::Result<()> {
    use std::os::unix::fs::{PermissionsExt, fchown};
    fchown(file, Some(nix::unistd::geteuid().as_raw()), Some(nix::unistd::getegid().as_raw()))?;
    file.set_permissions(fs::Permissions::from_mode(0o444))
}
