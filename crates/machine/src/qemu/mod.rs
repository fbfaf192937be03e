//! The QEMU driver: its `microvm` machine, with hardware virtualisation or software emulation.
//!
//! ```text
//! command   what a process is told            images    guest memory that clones map
//! process   starting, watching, ending one    qmp       talking to its monitor
//! machine   capture, suspend, kill            suspended what a suspend leaves
//! mod       boot, launch
//! ```

mod command;
mod images;
mod machine;
mod process;
mod qmp;
mod suspended;

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{PermissionsExt, fchown},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use hearth_guest_protocol::BOOT_MARKER;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::process::Command;

pub use self::command::{find_program, parse_version};
use self::{
    command::{Hardware, Life, RawDisk},
    images::Images,
    machine::{Origin, Parts},
    process::{Descriptors, Launch, Process, Spawner},
    qmp::Qmp,
    suspended::SuspendedState,
};
use crate::{
    engine::{
        BootError, BootSpec, CaptureError, Disk, Engine, GuestServices, LaunchError, LaunchSource, LaunchSpec, Machine, Outlet,
        SuspendError,
    },
    kit::Kit,
    memory::{self, Mapping},
    network::{Egress, NetworkError, Slot, Slots},
    snapshot::{BOOT_OVERLAY, DEVICE_STATE, EMPTY_OVERLAY, Platform, ROOTFS, Snapshot, SnapshotError},
};

/// Name of the emulator.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Name of the disk image tool.
pub const IMAGE_PROGRAM: &str = "qemu-img";
/// How long a clone may take until its guest has answered. It has only to wake up, but the host may be busy.
const READY: Duration = Duration::from_secs(30);
/// Events that wait for their reader before log records are held back.
const EVENT_QUEUE: usize = 256;
/// First of the user ids that machines run as; each adds the number of its slot.
const FIRST_UID: u32 = 810_000;

/// How guest instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor, with the kernel's help.
    Kvm,
    /// By translation. QEMU does not call it a security boundary.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// A CPU model that later versions of QEMU keep as it is; with hardware, the host's own.
    fn cpu_model(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "Nehalem-v1",
        }
    }
}

/// QEMU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// a program is missing
    #[error("{0} was not found: install the packages qemu-system-x86 and qemu-utils")]
    Missing(&'static str),
    /// a program does not work
    #[error("{program} does not work: {reason}")]
    Broken {
        /// Name of the program.
        program: &'static str,
        /// What it said.
        reason: String,
    },
    /// the two programs are of different versions
    #[error("{PROGRAM} is version {system}, {IMAGE_PROGRAM} version {image}: install qemu-system-x86 and qemu-utils of the same version")]
    Mixed {
        /// Version of the emulator.
        system: String,
        /// Version of the disk image tool.
        image: String,
    },
    /// a thread could not be started
    #[error("starting the thread that starts machines: {0}")]
    Spawner(io::Error),
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    shared: Arc<Shared>,
    platform: Platform,
    accelerator: Accelerator,
    program: PathBuf,
    kit: Kit,
    slots: Slots,
    spawner: Spawner,
}

/// What machines need of their engine after it started them.
#[derive(Debug)]
struct Shared {
    images: Images,
    image_program: PathBuf,
    kit_checksum: String,
    platform: Platform,
}

impl Qemu {
    /// Checks the installed programs and starts the driver.
    pub async fn start(kit: Kit, accelerator: Accelerator, slots: Slots) -> Result<Self, QemuError> {
        let (program, version) = installed_version(PROGRAM).await?;
        let (image_program, image) = installed_version(IMAGE_PROGRAM).await?;
        if version != image {
            return Err(QemuError::Mixed { system: version, image });
        }
        let platform = Platform {
            engine: "qemu".to_owned(),
            engine_version: version,
            accelerator: accelerator.name().to_owned(),
            cpu_model: accelerator.cpu_model().to_owned(),
        };
        let spawner = Spawner::start().map_err(QemuError::Spawner)?;
        let shared = Shared { images: Images::default(), image_program, kit_checksum: kit.checksum.clone(), platform: platform.clone() };
        Ok(Self { shared: Arc::new(shared), platform, accelerator, program, kit, slots, spawner })
    }

    /// Starts a process and waits until its monitor answers.
    async fn start_process(&self, start: Start<'_>) -> Result<Started, Failure> {
        let slot = self.slots.take(start.egress).await.map_err(|error| Failure::host("taking a network slot", io::Error::other(error)))?;
        let uid = FIRST_UID + slot.index;
        let mut descriptors = Descriptors::default();
        let mut open = |path: &Path, write: bool| -> Result<String, Failure> {
            let file = File::open(path).map_err(Failure::of("opening", path))?;
            if write {
                // The process opens it again, as its own user.
                fchown(&file, Some(uid), Some(uid)).map_err(Failure::of("giving away", path))?;
                file.set_permissions(Permissions::from_mode(0o600)).map_err(Failure::of("giving away", path))?;
            }
            Ok(descriptors.path(file))
        };
        let kernel = open(&self.kit.kernel(), false)?;
        let initramfs = open(&self.kit.initramfs(), false)?;
        let overlay = open(&start.dir.join(OVERLAY), true)?;
        let layers = start.layers.iter().map(|path| open(path, false)).collect::<Result<Vec<_>, _>>()?;
        let mut disks = Vec::new();
        for Disk { serial, path, writable } in start.disks {
            disks.push(RawDisk { serial: serial.clone(), path: open(path, *writable)?, writable: *writable });
        }
        // Written by the next capture or suspend. QEMU opens it by this descriptor, because it cannot enter the directory.
        let state_file = start.dir.join(NEXT_STATE);
        File::create(&state_file).map_err(Failure::of("creating", &state_file))?;
        let state_path = open(&state_file, true)?;
        let console_file = start.dir.join(CONSOLE);
        let console = match start.console {
            true => {
                File::create(&console_file).map_err(Failure::of("creating", &console_file))?;
                Some(open(&console_file, true)?)
            }
            false => None,
        };
        let memory = start.memory.try_clone().map_err(|source| Failure::host("sharing guest memory", source))?;
        let memory = descriptors.path(memory);
        let load = start.load.map(|file| descriptors.add(file));
        let (channel, channel_end) = UnixStream::pair().map_err(|source| Failure::host("making the guest's channel", source))?;
        let (monitor, monitor_end) = UnixStream::pair().map_err(|source| Failure::host("making the monitor's channel", source))?;
        let tap = slot.tap().map_err(|source| Failure::host("sharing the tap device", source))?;
        let hardware = Hardware {
            id: start.id,
            accelerator: self.accelerator,
            cpu_model: &self.platform.cpu_model,
            vcpus: start.vcpus,
            memory_mib: start.memory_mib,
            kernel,
            initramfs,
            memory,
            overlay,
            layers,
            disks,
            tap: descriptors.add(tap),
            channel: descriptors.add(OwnedFd::from(channel_end)),
            monitor: descriptors.add(OwnedFd::from(monitor_end)),
            life: match &console {
                Some(console) => Life::Boot { console, tsc_khz: self.guest_tsc_khz() },
                None => Life::Clone,
            },
        };
        let launch =
            Launch { program: self.program.display().to_string(), arguments: hardware.arguments(), descriptors, uid, gid: self.gid(uid) };
        let process = self.spawner.spawn(launch).await.map_err(|source| Failure::host("starting QEMU", source))?;
        let qmp = tokio::select! {
            qmp = Qmp::connect(monitor) => qmp.map_err(Failure::monitor)?,
            reason = process.exit_watch() => return Err(Failure::Monitor(reason.to_string())),
        };
        Ok(Started { process, qmp, channel, slot, state_path, load })
    }

    fn guest_tsc_khz(&self) -> Option<u64> {
        match self.accelerator {
            Accelerator::Kvm => None,
            Accelerator::Tcg => command::tsc_khz(&fs::read_to_string("/proc/cpuinfo").ok()?),
        }
    }

    /// The machine's own group, or the one that may use `/dev/kvm`.
    fn gid(&self, own: u32) -> u32 {
        use std::os::unix::fs::MetadataExt;
        match self.accelerator {
            Accelerator::Kvm => fs::metadata("/dev/kvm").map_or(own, |device| device.gid()),
            Accelerator::Tcg => own,
        }
    }
}

/// The disk that this machine writes to.
const OVERLAY: &str = "overlay.qcow2";
/// Where the next device state goes.
const NEXT_STATE: &str = "device-state.next";
/// What the guest's kernel says while it boots.
const CONSOLE: &str = "console.log";

/// A process to start.
struct Start<'a> {
    id: &'a str,
    dir: &'a Path,
    vcpus: u8,
    memory_mib: u32,
    memory: &'a File,
    egress: &'a Egress,
    layers: Vec<PathBuf>,
    disks: &'a [Disk],
    /// Device state to load.
    load: Option<File>,
    /// Boots and writes its console to a file.
    console: bool,
}

/// A process whose monitor answers.
struct Started {
    process: Process,
    qmp: Qmp,
    channel: UnixStream,
    slot: Slot,
    /// Path by which the process can write its next device state.
    state_path: String,
    /// Number of the descriptor with the device state to load.
    load: Option<i32>,
}

impl Started {
    fn into_parts(
        self,
        id: String,
        dir: PathBuf,
        generation: u64,
        services: Arc<dyn GuestServices>,
        origin: Origin,
        engine: Arc<Shared>,
    ) -> Parts {
        let Self { process, qmp, channel, slot, state_path, load: _ } = self;
        Parts { id, dir, process, qmp, channel, slot, state_path, origin, generation, services, engine }
    }
}

#[async_trait]
impl Engine for Qemu {
    fn platform(&self) -> &Platform {
        &self.platform
    }

    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Machine>, BootError> {
        let size = u64::from(spec.memory_mib) << 20;
        fs::create_dir_all(&spec.dir).map_err(Failure::of("creating", &spec.dir))?;
        let disk_bytes = fs::metadata(&spec.rootfs).map_err(Failure::of("opening", &spec.rootfs))?.len();
        create_overlay(&self.shared.image_program, &spec.dir.join(OVERLAY), disk_bytes).await?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memory = memfd_create(memory::NAME, flags).map_err(io::Error::from);
        let memory = memory.map(File::from).and_then(|file| file.set_len(size).map(|()| file));
        let memory = memory.map_err(|source| Failure::host("making guest memory", source))?;
        let started = self
            .start_process(Start {
                id: &spec.id,
                dir: &spec.dir,
                vcpus: spec.vcpus,
                memory_mib: spec.memory_mib,
                memory: &memory,
                egress: &spec.egress,
                layers: vec![spec.rootfs.clone()],
                disks: &spec.disks,
                load: None,
                console: true,
            })
            .await?;
        let dir = spec.dir.clone();
        let origin = match spec.disks.is_empty() {
            true => Origin::Boot { memory, rootfs: spec.rootfs, vcpus: spec.vcpus, memory_mib: spec.memory_mib },
            false => Origin::Tool,
        };
        let parts = started.into_parts(spec.id, spec.dir, 0, spec.services, origin, self.shared.clone());
        let begun = parts.begin::<BootError>(BOOT_MARKER, spec.timeout).await;
        let machine = begun.map_err(|error| match error {
            BootError::Monitor(reason) => BootError::Monitor(with_console(&reason, &dir)),
            error => {
                tracing::warn!(%error, console = with_console("", &dir), "the guest did not come up");
                error
            }
        })?;
        Ok(Box::new(machine))
    }

    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Machine>, LaunchError> {
        let snapshot = &spec.snapshot;
        snapshot.check_platform(&self.platform)?;
        fs::create_dir_all(&spec.dir).map_err(Failure::of("creating", &spec.dir))?;
        let suspended = match spec.source {
            LaunchSource::Snapshot => {
                let overlay = spec.dir.join(OVERLAY);
                fs::copy(snapshot.file(EMPTY_OVERLAY), &overlay).map_err(Failure::of("creating", &overlay))?;
                None
            }
            LaunchSource::Suspended => Some(SuspendedState::open(&spec.dir)?),
        };
        let image = self.shared.images.get(snapshot).await.map_err(|source| Failure::host("reading the snapshot's memory", source))?;
        let state = match &suspended {
            None => snapshot.file(DEVICE_STATE),
            Some(suspended) => suspended.device_state(),
        };
        let load = File::open(&state).map_err(|source| SnapshotError::Io { what: format!("opening {}", state.display()), source })?;
        let started = self
            .start_process(Start {
                id: &spec.id,
                dir: &spec.dir,
                vcpus: snapshot.manifest.vcpus,
                memory_mib: snapshot.manifest.memory_mib,
                memory: &image,
                egress: &spec.egress,
                layers: vec![snapshot.file(BOOT_OVERLAY), snapshot.file(ROOTFS)],
                disks: &[],
                load: Some(load),
                console: false,
            })
            .await?;
        let mapped = u64::from(snapshot.manifest.memory_mib) << 20;
        let marker = match suspended {
            None => snapshot.manifest.marker,
            Some(suspended) => {
                let pid = started.process.pid;
                let restore = move || {
                    suspended.restore(&Mapping::of(pid, mapped)?)?;
                    Ok(suspended)
                };
                let restored = tokio::task::spawn_blocking(restore).await.map_err(io::Error::other).flatten();
                restored.map_err(|source| Failure::host("restoring guest memory", source))?.marker()
            }
        };
        let descriptor = started.load.expect("a clone is given device state");
        tokio::select! {
            loaded = started.qmp.load(descriptor) => loaded.map_err(Failure::monitor)?,
            reason = started.process.exit_watch() => return Err(LaunchError::Monitor(reason.to_string())),
        }
        // From here on the machine runs ahead of what was suspended: that state must not be used again.
        let dir = spec.dir.clone();
        let discarded = tokio::task::spawn_blocking(move || SuspendedState::discard(&dir)).await.map_err(io::Error::other).flatten();
        discarded.map_err(Failure::of("removing the suspended state in", &spec.dir))?;
        started.qmp.cont().await.map_err(Failure::monitor)?;
        let origin = Origin::Clone { snapshot: spec.snapshot, image, mapped };
        let parts = started.into_parts(spec.id, spec.dir, spec.generation, spec.services, origin, self.shared.clone());
        Ok(Box::new(parts.begin::<LaunchError>(marker, READY).await?))
    }

    async fn unloaded_bytes(&self, snapshot: &Snapshot) -> u64 {
        if self.shared.images.holds(&snapshot.dir).await { 0 } else { snapshot.manifest.memory_bytes }
    }

    async fn suspended_bytes(&self, dir: &Path) -> u64 {
        SuspendedState::bytes(dir).await
    }

    async fn outlet(&self) -> Result<Box<dyn Outlet>, NetworkError> {
        Ok(Box::new(self.slots.outlet().await?))
    }

    async fn forget(&self, snapshot: &Snapshot) {
        self.shared.images.forget(&snapshot.dir).await;
    }

    async fn shutdown(&self) {
        self.shared.images.clear().await;
        self.slots.shutdown().await;
    }
}

/// A step that every operation has in common failed.
enum Failure {
    Host { what: String, source: io::Error },
    Monitor(String),
}

impl Failure {
    fn host(what: &str, source: io::Error) -> Self {
        Self::Host { what: what.to_owned(), source }
    }

    fn of(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Host { what: format!("{what} {}", path.display()), source }
    }

    fn monitor(error: qmp::QmpError) -> Self {
        Self::Monitor(error.to_string())
    }
}

macro_rules! from_failure {
    ($($error:ty),*) => {
        $(impl From<Failure> for $error {
            fn from(failure: Failure) -> Self {
                match failure {
                    Failure::Host { what, source } => Self::Host { what, source },
                    Failure::Monitor(reason) => Self::Monitor(reason),
                }
            }
        })*
    };
}
from_failure!(BootError, LaunchError, CaptureError, SuspendError);

/// Creates an empty overlay. What it lies over is said when it is used, not written into it.
async fn create_overlay(program: &Path, path: &Path, bytes: u64) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string());
    let output = command.kill_on_drop(true).output().await.map_err(Failure::of("creating", path))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::Host { what: format!("creating {}", path.display()), source: io::Error::other(message) })
}

async fn installed_version(program: &'static str) -> Result<(PathBuf, String), QemuError> {
    let path = find_program(program).ok_or(QemuError::Missing(program))?;
    let broken = |reason: String| QemuError::Broken { program, reason };
    let output = Command::new(&path).arg("--version").stdin(Stdio::null()).output().await.map_err(|error| broken(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text).ok_or_else(|| broken(format!("`{program} --version` said {text:?}")))?;
    Ok((path, version.to_owned()))
}

/// The reason, and the last lines of the console, which usually say more.
fn with_console(reason: &str, dir: &Path) -> String {
    let console = fs::read(dir.join(CONSOLE)).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let tail: Vec<&str> = console.lines().rev().take(5).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    if tail.is_empty() { reason.to_owned() } else { format!("{reason}; the guest's console ends with: {}", tail.join(" / ")) }
}
