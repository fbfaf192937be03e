//! Fakes of what the domain works with, and a world to put them in.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hearth_build::{BuildError, BuildRequest, Built, ImageBuilder, ImageConfig};
use hearth_guest_protocol::{Activity, App, BOOT_MARKER, ExitStatus, HookCall, HookReply, LogRecord, LogSource, Network};
use hearth_machine::{
    BootError, BootSpec, CaptureError, Dial, DialError, Egress, Engine, GuestError, GuestServices, GuestStream, HookError, LaunchError,
    LaunchSource, LaunchSpec, Machine, MachineEvent, NetworkError, Outlet, Platform, Snapshot, SnapshotManifest, SuspendError,
    SuspendOutcome, Suspended, Target, Usage,
    snapshot::{BOOT_OVERLAY, DEVICE_STATE, EMPTY_OVERLAY, FORMAT, MEMORY, ROOTFS},
};
use hearth_objects::{FetchError, ObjectUri, Objects, PutError};
use hearth_store::Store;
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    CapacitySettings, Control, Deps, Settings,
    arn::managed_image,
    logs::{LogStore, Retention},
    plane::{Admission, ConnectError, ControlPlane, DataPlane},
    roles::{Credentials, RoleError, Roles},
    token::Keyring,
    types::{Caller, CreateImage, IdlePolicy, Image, ImageSpec, ImageState, Microvm, MicrovmState, PageRequest, PortSpec, RunMicrovm},
};

/// What a fake engine does, and what was asked of it.
pub struct FakeEngine {
    platform: Platform,
    pub launches: AtomicUsize,
    pub suspends: AtomicUsize,
    pub kills: AtomicUsize,
    pub forgotten: AtomicUsize,
    /// Launches and suspends wait while this is false.
    pub gate: watch::Sender<bool>,
    /// Suspends that wait at the gate can be cancelled there.
    pub cancels: AtomicBool,
    /// Size of the snapshots that are captured.
    pub memory_bytes: AtomicU64,
    /// The memory of every snapshot is there.
    pub loaded: AtomicBool,
    /// What each suspended machine keeps.
    pub suspended_bytes: AtomicU64,
    pub fail_boot: AtomicBool,
    pub fail_launch: AtomicBool,
    pub fail_suspend: AtomicBool,
    pub fail_capture: AtomicBool,
    /// What a booted machine says after its app was started.
    pub script: Mutex<Vec<MachineEvent>>,
    /// The app of the last `start_app`.
    pub app: Mutex<Option<App>>,
    /// What the last boot or launch was told.
    pub egress: Mutex<Option<Egress>>,
    /// What the guest of the last boot or launch may ask.
    pub services: Mutex<Option<Arc<dyn GuestServices>>>,
    /// How the next calls of hooks are answered, by the last part of their path; 200 when there is nothing.
    pub answers: Mutex<HashMap<&'static str, VecDeque<HookAnswer>>>,
    /// The hooks that were called.
    pub calls: Mutex<Vec<HookCall>>,
    /// What machines were told, in order: `launch`, hooks by their name, `capture`, `suspend`, `stop`, `kill`.
    pub told: Mutex<Vec<String>>,
    /// Apps end when they are sent their stop signal.
    pub obeys_stop: AtomicBool,
    /// What every machine has used.
    pub usage: Mutex<Usage>,
    machines: Mutex<HashMap<String, Remote>>,
}

/// What becomes of a hook that is called.
#[derive(Debug, Clone)]
pub enum HookAnswer {
    Reply(HookReply),
    /// Nothing until its time is over.
    Hang,
    /// 200, after a while.
    Slow(Duration),
    /// The app exits with this code and the connection breaks.
    Exit(i32),
    /// 503, and then the app exits with this code.
    ExitLater(i32),
    /// The machine dies.
    Die,
}

impl HookAnswer {
    pub fn status(status: u16) -> Self {
        Self::Reply(HookReply::Status(status))
    }

    pub fn garbage() -> Self {
        Self::Reply(HookReply::Invalid { reason: "not HTTP".to_owned() })
    }
}

#[derive(Clone)]
struct Remote {
    events: mpsc::Sender<MachineEvent>,
    alive: watch::Receiver<bool>,
}

impl FakeEngine {
    pub fn new() -> Arc<Self> {
        let (gate, _) = watch::channel(true);
        Arc::new(Self {
            platform: platform(),
            launches: AtomicUsize::new(0),
            suspends: AtomicUsize::new(0),
            kills: AtomicUsize::new(0),
            forgotten: AtomicUsize::new(0),
            gate,
            cancels: AtomicBool::new(true),
            memory_bytes: AtomicU64::new(1000),
            loaded: AtomicBool::new(false),
            suspended_bytes: AtomicU64::new(0),
            fail_boot: AtomicBool::new(false),
            fail_launch: AtomicBool::new(false),
            fail_suspend: AtomicBool::new(false),
            fail_capture: AtomicBool::new(false),
            script: Mutex::new(vec![MachineEvent::Listening(8080), at_rest()]),
            app: Mutex::default(),
            egress: Mutex::default(),
            services: Mutex::default(),
            answers: Mutex::default(),
            calls: Mutex::default(),
            told: Mutex::default(),
            obeys_stop: AtomicBool::new(true),
            usage: Mutex::default(),
            machines: Mutex::default(),
        })
    }

    pub fn close_gate(&self) {
        self.gate.send_replace(false);
    }

    pub fn open_gate(&self) {
        self.gate.send_replace(true);
    }

    /// Says how the next call of a hook is answered, after those that were said before.
    pub fn answer(&self, hook: &'static str, answer: HookAnswer) {
        self.answers.lock().unwrap().entry(hook).or_default().push_back(answer);
    }

    /// What machines were told since this was asked last.
    pub fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.told.lock().unwrap())
    }

    fn tell(&self, what: &str) {
        self.told.lock().unwrap().push(what.to_owned());
    }

    async fn pass_gate(&self) {
        let _ = self.gate.subscribe().wait_for(|open| *open).await;
    }

    /// Lets a running machine say something.
    pub async fn say(&self, id: &str, event: MachineEvent) {
        let remote = self.machines.lock().unwrap()[id].clone();
        remote.events.send(event).await.unwrap();
    }

    /// Whether a machine of this id runs.
    pub fn runs(&self, id: &str) -> bool {
        self.machines.lock().unwrap().get(id).is_some_and(|remote| *remote.alive.borrow())
    }

    /// Whether any machine runs.
    pub fn runs_any(&self) -> bool {
        self.machines.lock().unwrap().values().any(|remote| *remote.alive.borrow())
    }

    fn machine(self: &Arc<Self>, id: &str, dir: PathBuf, memory_mib: u32) -> Box<dyn Machine> {
        let (events, receiver) = mpsc::channel(16);
        let (alive, observer) = watch::channel(true);
        let remote = Remote { events: events.clone(), alive: observer };
        self.machines.lock().unwrap().insert(id.to_owned(), remote);
        Box::new(FakeMachine { engine: Arc::clone(self), id: id.to_owned(), dir, memory_mib, events: Some((events, receiver)), alive })
    }
}

fn platform() -> Platform {
    Platform { engine: "fake".to_owned(), engine_version: "1".to_owned(), accelerator: "none".to_owned(), cpu_model: "none".to_owned() }
}

/// An engine behind the trait: the trait's methods need the `Arc`.
pub struct EngineHandle(pub Arc<FakeEngine>);

#[async_trait]
impl Engine for EngineHandle {
    fn platform(&self) -> &Platform {
        &self.0.platform
    }

    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Machine>, BootError> {
        assert!(spec.rootfs.exists(), "the root file system is there");
        *self.0.egress.lock().unwrap() = Some(spec.egress);
        *self.0.services.lock().unwrap() = Some(spec.services);
        std::fs::create_dir_all(&spec.dir).unwrap();
        if self.0.fail_boot.load(Ordering::SeqCst) {
            return Err(BootError::Monitor("no monitor".to_owned()));
        }
        Ok(self.0.machine(&spec.id, spec.dir, spec.memory_mib))
    }

    async fn launch(&self, spec: LaunchSpec) -> Result<Box<dyn Machine>, LaunchError> {
        let launch = self.0.launches.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.tell("launch");
        *self.0.egress.lock().unwrap() = Some(spec.egress);
        *self.0.services.lock().unwrap() = Some(spec.services);
        self.0.pass_gate().await;
        std::fs::create_dir_all(&spec.dir).unwrap();
        if self.0.fail_launch.load(Ordering::SeqCst) {
            return Err(LaunchError::Monitor(format!("launch {launch} fails")));
        }
        if spec.source == LaunchSource::Suspended {
            std::fs::remove_dir_all(spec.dir.join("suspended")).expect("there is a suspended state");
        }
        Ok(self.0.machine(&spec.id, spec.dir, spec.snapshot.manifest.memory_mib))
    }

    async fn suspended_bytes(&self, _dir: &Path) -> u64 {
        self.0.suspended_bytes.load(Ordering::SeqCst)
    }

    async fn unloaded_bytes(&self, snapshot: &Snapshot) -> u64 {
        if self.0.loaded.load(Ordering::SeqCst) { 0 } else { snapshot.manifest.memory_bytes }
    }

    async fn outlet(&self) -> Result<Box<dyn Outlet>, NetworkError> {
        Ok(Box::new(FakeOutlet))
    }

    async fn forget(&self, _snapshot: &Snapshot) {
        self.0.forgotten.fetch_add(1, Ordering::SeqCst);
    }

    async fn shutdown(&self) {}
}

struct FakeMachine {
    engine: Arc<FakeEngine>,
    id: String,
    dir: PathBuf,
    memory_mib: u32,
    events: Option<(mpsc::Sender<MachineEvent>, mpsc::Receiver<MachineEvent>)>,
    alive: watch::Sender<bool>,
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.alive.send_replace(false);
        // The remote control must not keep the events open.
        let mut machines = self.engine.machines.lock().unwrap();
        if machines.get(&self.id).is_some_and(|remote| !*remote.alive.borrow()) {
            machines.remove(&self.id);
        }
    }
}

#[async_trait]
impl Machine for FakeMachine {
    async fn start_app(&self, app: App) -> Result<(), GuestError> {
        if app.argv == ["unstartable"] {
            return Err(GuestError::App("no such file".to_owned()));
        }
        *self.engine.app.lock().unwrap() = Some(app);
        let remote = self.engine.machines.lock().unwrap()[&self.id].clone();
        let script = self.engine.script.lock().unwrap().clone();
        for event in script {
            remote.events.send(event).await.unwrap();
        }
        Ok(())
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(FakeDial { id: self.id.clone(), engine: Arc::clone(&self.engine), alive: self.alive.subscribe() })
    }

    fn take_events(&mut self) -> Option<mpsc::Receiver<MachineEvent>> {
        self.events.take().map(|(_, receiver)| receiver)
    }

    async fn stop_app(&self) -> Result<(), GuestError> {
        self.engine.tell("stop");
        if self.engine.obeys_stop.load(Ordering::SeqCst) {
            self.engine.say(&self.id, exited(0)).await;
        }
        Ok(())
    }

    async fn record_working_set(&self) -> io::Result<u64> {
        self.engine.tell("record");
        Ok(4096)
    }

    async fn restrict(&mut self, _egress: &Egress) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn share(&mut self, _address: SocketAddr) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn capture(self: Box<Self>, into: PathBuf) -> Result<Snapshot, CaptureError> {
        self.engine.tell("capture");
        if self.engine.fail_capture.load(Ordering::SeqCst) {
            return Err(CaptureError::Monitor("no capture".to_owned()));
        }
        let draft = self.dir.join("snapshot");
        Ok(write_snapshot(&draft, &into, self.memory_mib, self.engine.memory_bytes.load(Ordering::SeqCst)).unwrap())
    }

    async fn suspend(self: Box<Self>, cancel: CancellationToken) -> Result<SuspendOutcome, SuspendError> {
        self.engine.suspends.fetch_add(1, Ordering::SeqCst);
        self.engine.tell("suspend");
        let cancellable = self.engine.cancels.load(Ordering::SeqCst);
        tokio::select! {
            biased;
            () = self.engine.pass_gate() => {}
            () = cancel.cancelled(), if cancellable => {
                let machine = self.engine.machine(&self.id, self.dir.clone(), self.memory_mib);
                return Ok(SuspendOutcome::Cancelled(machine));
            }
        }
        if self.engine.fail_suspend.load(Ordering::SeqCst) {
            return Err(SuspendError::Host { what: "writing pages".to_owned(), source: io::ErrorKind::StorageFull.into() });
        }
        std::fs::create_dir_all(self.dir.join("suspended")).unwrap();
        Ok(SuspendOutcome::Suspended(Suspended { dirty_bytes: 1, device_state_bytes: 1 }))
    }

    fn usage(&self) -> io::Result<Usage> {
        Ok(*self.engine.usage.lock().unwrap())
    }

    async fn kill(self: Box<Self>) -> bool {
        self.engine.kills.fetch_add(1, Ordering::SeqCst);
        self.engine.tell("kill");
        true
    }
}

fn write_snapshot(draft: &Path, into: &Path, memory_mib: u32, memory_bytes: u64) -> io::Result<Snapshot> {
    std::fs::create_dir_all(draft)?;
    std::fs::File::create(draft.join(MEMORY))?.set_len(u64::from(memory_mib) << 20)?;
    for name in [DEVICE_STATE, ROOTFS, BOOT_OVERLAY, EMPTY_OVERLAY] {
        std::fs::write(draft.join(name), b"x")?;
    }
    let manifest = SnapshotManifest {
        format: FORMAT,
        platform: platform(),
        vcpus: 1,
        memory_mib,
        kit: "kit".to_owned(),
        marker: BOOT_MARKER,
        memory_bytes,
        device_state_bytes: 1,
        disk_bytes: 300,
        sha256: BTreeMap::new(),
    };
    Snapshot::publish(draft, into, manifest)
}

struct FakeDial {
    id: String,
    engine: Arc<FakeEngine>,
    alive: watch::Receiver<bool>,
}

#[async_trait]
impl Dial for FakeDial {
    /// Says the machine's id and ends.
    async fn open(&self, target: &Target) -> Result<Box<dyn GuestStream>, DialError> {
        if !*self.alive.borrow() {
            return Err(DialError::Gone("dropped".to_owned()));
        }
        if *target == Target::Port(1) {
            return Err(DialError::Refused(target.clone()));
        }
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(self.id.as_bytes()).await.unwrap();
        Ok(Box::new(near))
    }

    async fn call_hook(&self, call: HookCall) -> Result<HookReply, HookError> {
        let name = call.path.rsplit('/').next().unwrap_or_default().to_owned();
        let limit = Duration::from_millis(call.timeout_ms);
        self.engine.tell(&name);
        self.engine.calls.lock().unwrap().push(call);
        let answer = self.engine.answers.lock().unwrap().get_mut(name.as_str()).and_then(VecDeque::pop_front);
        match answer.unwrap_or(HookAnswer::status(200)) {
            HookAnswer::Reply(reply) => Ok(reply),
            HookAnswer::Hang => {
                tokio::time::sleep(limit).await;
                Ok(HookReply::TimedOut)
            }
            HookAnswer::Slow(time) => {
                tokio::time::sleep(time).await;
                Ok(HookReply::Status(200))
            }
            HookAnswer::ExitLater(code) => {
                let (engine, id) = (Arc::clone(&self.engine), self.id.clone());
                tokio::spawn(async move { engine.say(&id, exited(code)).await });
                Ok(HookReply::Status(503))
            }
            HookAnswer::Exit(code) => {
                // The connection breaks before anybody has noticed why.
                let (engine, id) = (Arc::clone(&self.engine), self.id.clone());
                tokio::spawn(async move { engine.say(&id, exited(code)).await });
                Ok(HookReply::Invalid { reason: "the connection closed".to_owned() })
            }
            HookAnswer::Die => {
                self.engine.say(&self.id, MachineEvent::Died { reason: "killed by signal 9".to_owned() }).await;
                Err(HookError::Gone("the session ended".to_owned()))
            }
        }
    }
}

/// A connection to nowhere.
#[derive(Debug)]
struct FakeOutlet;

#[async_trait]
impl Outlet for FakeOutlet {
    fn network(&self) -> Network {
        Network { address: [10, 0, 2, 15].into(), prefix: 24, gateway: [10, 0, 2, 2].into(), nameservers: Vec::new(), mtu: 1500 }
    }

    async fn plug(&mut self, _pid: u32) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn share(&mut self, _address: SocketAddr) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn restrict(&mut self, _egress: &Egress) -> Result<(), NetworkError> {
        Ok(())
    }
}

/// A builder that writes an empty root file system.
pub struct FakeBuilder {
    pub config: Mutex<ImageConfig>,
    pub fail: AtomicBool,
    /// Builds wait while this is false.
    pub gate: watch::Sender<bool>,
    pub running: AtomicUsize,
    pub most_at_once: AtomicUsize,
}

impl FakeBuilder {
    pub fn new() -> Arc<Self> {
        let (gate, _) = watch::channel(true);
        let config = ImageConfig {
            argv: vec!["app".to_owned()],
            env: vec![("A".to_owned(), "image".to_owned()), ("B".to_owned(), "image".to_owned())],
            cwd: "/".to_owned(),
            user: String::new(),
            stop_signal: 15,
            exposed_ports: Vec::new(),
        };
        Arc::new(Self {
            config: Mutex::new(config),
            fail: AtomicBool::new(false),
            gate,
            running: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        })
    }
}

pub struct BuilderHandle(pub Arc<FakeBuilder>);

#[async_trait]
impl ImageBuilder for BuilderHandle {
    async fn build(&self, request: BuildRequest, cancel: CancellationToken) -> Result<Built, BuildError> {
        let running = self.0.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most_at_once.fetch_max(running, Ordering::SeqCst);
        request.log.send("STEP 1/1: FROM scratch".to_owned()).await.unwrap();
        let mut gate = self.0.gate.subscribe();
        let cancelled = tokio::select! {
            _ = gate.wait_for(|open| *open) => false,
            () = cancel.cancelled() => true,
        };
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        if cancelled {
            return Err(BuildError::Cancelled);
        }
        if self.0.fail.load(Ordering::SeqCst) {
            return Err(BuildError::ContainerBuildFailed("RUN false".to_owned()));
        }
        assert!(request.archive.exists(), "the artifact was fetched");
        std::fs::write(&request.rootfs, b"rootfs").unwrap();
        Ok(Built { config: self.0.config.lock().unwrap().clone(), content_bytes: 100 })
    }
}

/// Objects by key; `gone` is missing, `broken` cannot be read.
pub struct FakeObjects;

#[async_trait]
impl Objects for FakeObjects {
    async fn fetch(&self, _account: &str, uri: &ObjectUri, into: &Path, _max_bytes: u64) -> Result<u64, FetchError> {
        match uri.key() {
            "gone" => Err(FetchError::NoSuchKey { bucket: uri.bucket().to_owned(), key: uri.key().to_owned() }),
            "broken" => Err(FetchError::Io { uri: uri.to_string(), source: io::Error::other("/secret/path") }),
            _ => {
                std::fs::write(into, b"zip").unwrap();
                Ok(3)
            }
        }
    }

    async fn put(&self, _account: &str, _bucket: &str, _key: &str, _file: &Path) -> Result<(), PutError> {
        Ok(())
    }
}

/// A server with fakes below it.
pub struct World {
    pub dir: tempfile::TempDir,
    pub engine: Arc<FakeEngine>,
    pub builder: Arc<FakeBuilder>,
    pub logs: Arc<LogStore>,
    pub control: Arc<Control>,
}

pub fn caller() -> Caller {
    Caller { account: "000000000000".to_owned(), region: "us-east-1".to_owned(), principal: "arn:aws:iam::000000000000:root".to_owned() }
}

pub fn spec(key: &str) -> ImageSpec {
    ImageSpec {
        base_image_arn: managed_image("us-east-1", "al2023-1"),
        base_image_version: Some("1".to_owned()),
        build_role_arn: "arn:aws:iam::000000000000:role/build".to_owned(),
        description: None,
        code_artifact_uri: format!("s3://bucket/{key}"),
        memory_mib: 512,
        egress_network_connectors: Vec::new(),
        environment: Some(BTreeMap::from([("B".to_owned(), "request".to_owned())])),
        all_capabilities: false,
        echoed: BTreeMap::new(),
    }
}

pub fn create(name: &str) -> CreateImage {
    CreateImage { name: name.to_owned(), spec: spec("app.zip"), tags: BTreeMap::new(), client_token: None }
}

pub fn image_arn(name: &str) -> String {
    format!("arn:aws:lambda:us-east-1:000000000000:microvm-image:{name}")
}

pub fn idle(max_idle_seconds: u32, suspended_seconds: u32, auto_resume: bool) -> Option<IdlePolicy> {
    Some(IdlePolicy { max_idle_seconds, suspended_seconds, auto_resume })
}

pub fn run(name: &str, idle_policy: Option<IdlePolicy>) -> RunMicrovm {
    RunMicrovm {
        image: image_arn(name),
        version: None,
        execution_role_arn: Some("arn:aws:iam::000000000000:role/app".to_owned()),
        idle_policy,
        maximum_duration_seconds: 28_800,
        ingress_network_connectors: Vec::new(),
        egress_network_connectors: Vec::new(),
        run_hook_payload: None,
        logging: None,
        client_token: None,
    }
}

pub fn log_line(text: &str) -> MachineEvent {
    MachineEvent::Log(LogRecord { source: LogSource::Stdout, time_ns: 1_000_000, line: text.as_bytes().to_vec(), dropped: 0 })
}

pub fn at_rest() -> MachineEvent {
    MachineEvent::Activity(Activity::AtRest)
}

pub fn exited(code: i32) -> MachineEvent {
    MachineEvent::AppExited(ExitStatus { code, out_of_memory: false })
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(set: impl FnOnce(&mut Settings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (engine, builder) = (FakeEngine::new(), FakeBuilder::new());
        let mut settings = settings(dir.path());
        set(&mut settings);
        let (logs, control) = start(dir.path(), &engine, &builder, settings).await;
        Self { dir, engine, builder, logs, control }
    }

    /// A world with an image named `demo`.
    pub async fn with_image() -> Self {
        let world = Self::new().await;
        world.build("demo").await;
        world
    }

    /// Stops the server and starts another one on the same directory.
    pub async fn restart(self) -> Self {
        self.control.shutdown().await;
        self.start_again().await
    }

    /// The server is gone in the middle of what it did; another one starts.
    pub async fn crash(self) -> Self {
        for handle in self.control.inner.registry.all() {
            handle.abort();
        }
        self.start_again().await
    }

    async fn start_again(self) -> Self {
        let Self { dir, builder, .. } = self;
        let engine = FakeEngine::new();
        let (logs, control) = start(dir.path(), &engine, &builder, settings(dir.path())).await;
        Self { dir, engine, builder, logs, control }
    }

    pub async fn build(&self, name: &str) -> Image {
        self.control.create_image(&caller(), create(name)).await.unwrap();
        self.settled(name).await
    }

    /// The image when it is not being built any more.
    pub async fn settled(&self, name: &str) -> Image {
        self.when("the image to settle", || async {
            let image = self.control.get_image(&caller(), &image_arn(name)).await.unwrap();
            (image.state != ImageState::Creating).then_some(image)
        })
        .await
    }

    /// The state reason of the one build of the first version.
    pub async fn build_reason(&self, name: &str) -> String {
        let builds = self.control.list_builds(&caller(), &image_arn(name), "1.0", PageRequest::default()).await.unwrap();
        builds.items[0].state_reason.clone().unwrap()
    }

    pub async fn run(&self, idle_policy: Option<IdlePolicy>) -> Microvm {
        let vm = self.control.run_microvm(&caller(), run("demo", idle_policy)).await.unwrap();
        self.reaches(&vm.id, MicrovmState::Running).await
    }

    pub async fn get(&self, id: &str) -> Microvm {
        self.control.get_microvm(&caller(), id).await.unwrap()
    }

    /// The MicroVM when it is in a state.
    pub async fn reaches(&self, id: &str, state: MicrovmState) -> Microvm {
        self.when("a state of a MicroVM", || async {
            let vm = self.get(id).await;
            (vm.state == state).then_some(vm)
        })
        .await
    }

    /// Waits until something is so, looking whenever the domain says that something changed.
    pub async fn when<T, F: Future<Output = Option<T>>>(&self, what: &str, mut look: impl FnMut() -> F) -> T {
        let mut changes = self.control.changes();
        within(what, async {
            loop {
                changes.mark_unchanged();
                if let Some(found) = look().await {
                    return found;
                }
                changes.changed().await.unwrap();
            }
        })
        .await
    }

    pub async fn admit(&self, vm: &Microvm, port: u16) -> Admission {
        let token = self.control.create_auth_token(&caller(), &vm.id, Duration::from_secs(60), vec![PortSpec::All]).await.unwrap();
        self.control.admit(&vm.endpoint, &token, port).unwrap()
    }

    pub async fn connect(&self, vm: &Microvm) -> Result<String, ConnectError> {
        use tokio::io::AsyncReadExt;
        let admission = self.admit(vm, 8080).await;
        let mut stream = self.control.connect(&admission).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        Ok(text)
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Names in a directory of the data directory.
    pub fn names(&self, dir: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(dir)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Every role can be assumed and may do everything.
struct FakeRoles;

#[async_trait]
impl Roles for FakeRoles {
    async fn assume(&self, role_arn: &str, session_name: &str) -> Result<Credentials, RoleError> {
        Ok(Credentials {
            access_key_id: format!("{role_arn} {session_name}"),
            secret_access_key: "secret".to_owned(),
            session_token: "token".to_owned(),
            issued_at: 0,
            expires_at: u64::MAX,
        })
    }

    fn allows(&self, _role_arn: &str, _action: &str, _resource: &str) -> bool {
        true
    }
}

fn settings(dir: &Path) -> Settings {
    Settings {
        capacity: CapacitySettings { reserve_mib: 0, ..CapacitySettings::default() },
        max_concurrent_builds: 1,
        ..Settings::new(dir.to_owned())
    }
}

async fn start(dir: &Path, engine: &Arc<FakeEngine>, builder: &Arc<FakeBuilder>, settings: Settings) -> (Arc<LogStore>, Arc<Control>) {
    let logs = LogStore::new(dir.join("logs"), Retention::default());
    let control = Control::start(Deps {
        store: Store::open(&dir.join("hearth.db")).await.unwrap(),
        engine: Arc::new(EngineHandle(Arc::clone(engine))),
        builder: Arc::new(BuilderHandle(Arc::clone(builder))),
        objects: Arc::new(FakeObjects),
        logs: Arc::clone(&logs),
        keyring: Arc::new(Keyring::load_or_create(&dir.join("keys")).unwrap()),
        roles: Arc::new(FakeRoles),
        settings,
    })
    .await
    .unwrap();
    (logs, control)
}

/// Real time, whatever the test's clock does: a test that waits in vain fails instead of hanging.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let (_running, ended) = std::sync::mpsc::channel::<()>();
    let limit = tokio::task::spawn_blocking(move || ended.recv_timeout(Duration::from_secs(20)));
    tokio::select! {
        found = future => found,
        _ = limit => panic!("waited too long for {what}"),
    }
}

/// A clock that moves only when told to. tokio's paused clock runs ahead whenever all tasks wait, and then timers would fire while the
/// database works; it does not while something blocks.
pub struct Frozen {
    _blocker: std::sync::mpsc::Sender<()>,
}

impl Frozen {
    pub fn now() -> Self {
        let (blocker, blocked) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || blocked.recv());
        tokio::time::pause();
        Self { _blocker: blocker }
    }

    pub async fn pass(&self, seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        // Lets everything that is due happen as far as it can without the disk.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }
}
