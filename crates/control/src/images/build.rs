//! One build, from the artifact to the snapshot: fetch ▸ build the root file system ▸ boot ▸ start the app ▸ wait until it is ready ▸ capture ▸
//! validate on a clone.
//!
//! Ready is what the app's `/ready` hook says; without one, when it listens and has come to rest ([`super::readiness`]).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use hearth_build::{BuildRequest, Built, ImageConfig, Room};
use hearth_guest_protocol::App;
use hearth_machine::{
    BootError, BootSpec, CaptureError, Egress, GuestError, LaunchError, LaunchSource, LaunchSpec, Machine, MachineEvent, Snapshot,
};
use hearth_objects::ObjectUri;
use tokio::{sync::mpsc, time::timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    architecture::notice,
    arn::{ImageArn, endpoint_name},
    error::ControlError,
    hooks::{Hook, Hooks},
    logs::{LogLine, LogOrigin, LogWriter},
    pump::Pump,
    records::{millis, version_name},
    services::Services,
    types::BuildSizes,
};

use super::{
    Identity, Job, Shared,
    advice::app_exited,
    checks::{Check, CheckError},
    endpoints, image_dir,
    machine::BuilderMachine,
    readiness::{Readiness, Verdict},
    shape::Shape,
    uplink::{BuildUplink, RoleLogins},
    version_dir,
};

/// Lines of build output that wait for the log; the build waits when there are more.
const LOG_QUEUE: usize = 256;
/// Tag of an image whose builds use no layer of earlier ones, if it is `true`. Stock clients can set it.
const NO_CACHE_TAG: &str = "hearth:no-cache";
/// What the guest calls itself (SPEC 9.3).
pub const HOSTNAME: &str = "localhost";
/// What the state reason says of builds that a stop or a crash of the server ended.
pub(crate) const HOST_STOPPED: &str = "INTERNAL_PLATFORM_ERROR: The host stopped during the build.";
/// What the log says of a build whose image was deleted meanwhile; its record is gone.
const DELETED: &str = "The image was deleted.";
/// What it says of failures that are not the image's fault.
pub const HOST_FAILED: &str = "INTERNAL_PLATFORM_ERROR: The build failed because of this host; its log says why.";
const DISK_FULL: &str = "DISK_STORAGE_FULL: The host's disk is full.";

/// Why there is no snapshot.
#[derive(Debug)]
pub struct Failure {
    /// For the build's record.
    pub reason: String,
    /// As far as the build got.
    pub sizes: BuildSizes,
}

/// One build that is to run.
pub struct Pipeline {
    shared: Arc<Shared>,
    image: Identity,
    job: Job,
    /// Gives the build up: the server stops, or the image is deleted.
    stop: CancellationToken,
    /// Of the phase that runs.
    log: LogWriter,
    /// Of the phase that follows the build of the root file system.
    console: Option<LogWriter>,
    sizes: BuildSizes,
    hooks: Hooks,
    /// A name like those that MicroVMs get: build hooks are called in it.
    endpoint: String,
}

impl Pipeline {
    pub fn new(shared: Arc<Shared>, image: Identity, job: Job, stop: CancellationToken) -> Self {
        let [log, console] = shared.build_routes(&image, &job).map(|route| shared.logs.writer(&route));
        let hooks = Hooks::of(&job.spec);
        let endpoint = endpoint_name(&image.region, &shared.settings.domain);
        Self { shared, image, job, stop, log, console: Some(console), sizes: BuildSizes::default(), hooks, endpoint }
    }

    /// Builds. Leaves the snapshot, or nothing.
    pub async fn run(mut self) -> Result<BuildSizes, Failure> {
        let work = self.shared.settings.data_dir.join("tmp").join(format!("build-{}", self.job.build_id));
        let result = self.build(&work).await;
        remove(&work).await;
        if let Err(reason) = &result {
            remove(&version_dir(&self.shared.settings.data_dir, &self.image.id, self.job.number)).await;
            // Keeps what other versions left, if there are any.
            let _ = tokio::fs::remove_dir(image_dir(&self.shared.settings.data_dir, &self.image.id)).await;
            self.say(format!("Build failed: {reason}")).await;
        }
        let sizes = self.sizes;
        result.map(|()| sizes).map_err(|reason| Failure { reason, sizes })
    }

    async fn build(&mut self, work: &Path) -> Result<(), String> {
        let (shared, stop) = (Arc::clone(&self.shared), self.stop.clone());
        let _turn = tokio::select! {
            turn = shared.turns.take(&self.image.account) => turn,
            () = stop.cancelled() => return Err(self.stopped()),
        };
        let (id, number, build_id) = (&self.image.id, self.job.number, &self.job.build_id);
        if let Err(error) = shared.store.build_started(id, number, build_id, millis(SystemTime::now())).await {
            return Err(self.host_failed(&error).await);
        }
        shared.changed();
        let made = tokio::fs::create_dir_all(work).await;
        if let Err(error) = made {
            return Err(self.io_failed("creating a scratch directory", &error).await);
        }
        for line in self.job.spec.foreign_architecture().into_iter().flat_map(notice) {
            self.say(line).await;
        }
        let archive = work.join("artifact.zip");
        tokio::select! {
            fetched = self.fetch(&archive) => fetched?,
            () = stop.cancelled() => return Err(self.stopped()),
        }
        let rootfs = work.join("rootfs.img");
        let built = self.build_rootfs(work, archive, &rootfs).await?;
        self.sizes.code_install = Some(built.content_bytes);
        // Ends the log of the first phase: whoever follows it goes on with this one.
        self.log = self.console.take().unwrap_or(self.log.clone());
        // Until the snapshot is made, or the build is over.
        let mut promised = shared.capacity.admit_boot(self.shape()?.memory_mib).map_err(|shortage| {
            tracing::warn!(build = build_id, %shortage, "a build is refused");
            format!("INTERNAL_PLATFORM_ERROR: {shortage}")
        })?;
        let machine = tokio::select! {
            booted = self.boot(work, rootfs) => booted?,
            () = stop.cancelled() => return Err(self.stopped()),
        };
        promised.started();
        let snapshot = Arc::new(self.make_snapshot(machine, &built.config).await?);
        let validated = tokio::select! {
            validated = self.validate(work, &snapshot) => validated,
            () = stop.cancelled() => Err(self.stopped()),
        };
        if let Err(reason) = validated {
            shared.engine.forget(&snapshot).await;
            return Err(reason);
        }
        let manifest = &snapshot.manifest;
        self.sizes.disk_snapshot = Some(manifest.disk_bytes);
        self.sizes.memory_snapshot = Some(manifest.memory_bytes + manifest.device_state_bytes);
        self.say(format!(
            "Snapshot: {} bytes of memory and device state, {} bytes of disk.",
            manifest.memory_bytes + manifest.device_state_bytes,
            manifest.disk_bytes
        ))
        .await;
        shared.snapshots.insert(&self.image.id, self.job.number, snapshot);
        Ok(())
    }

    async fn fetch(&self, archive: &Path) -> Result<(), String> {
        let uri = &self.job.spec.code_artifact_uri;
        self.say(format!("Fetching {uri}.")).await;
        let parsed = ObjectUri::parse(uri).map_err(|error| format!("S3_INVALID_OBJECT: {error}"))?;
        match self.shared.objects.fetch(&self.image.account, &parsed, archive, self.shared.settings.max_artifact_bytes).await {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::info!(build = self.job.build_id, %error, "an artifact could not be fetched");
                Err(match error.reason_code() {
                    // The rest tells of the host's files.
                    "INTERNAL_PLATFORM_ERROR" => self.host_failed(&error).await,
                    code => format!("{code}: {error}"),
                })
            }
        }
    }

    /// Runs the Dockerfile; its output is logged as it appears.
    async fn build_rootfs(&self, work: &Path, archive: PathBuf, rootfs: &Path) -> Result<Built, String> {
        let shape = self.shape()?;
        let egress = self.egress().await?;
        let room = self.room(egress).await?;
        let (lines, mut output) = mpsc::channel::<String>(LOG_QUEUE);
        let request = BuildRequest {
            id: self.job.build_id.clone(),
            account: self.image.account.clone(),
            no_cache: self.wants_no_cache().await?,
            room: Some(room),
            logins: Some(Arc::new(RoleLogins {
                roles: Arc::clone(&self.shared.roles),
                role_arn: self.job.spec.build_role_arn.clone(),
                session: format!("build-{}", self.job.build_id),
            })),
            archive,
            work_dir: work.join("build"),
            rootfs: rootfs.to_owned(),
            disk_bytes: shape.disk_bytes,
            log: lines,
        };
        let copy = async {
            while let Some(line) = output.recv().await {
                self.log.append(LogLine::now(LogOrigin::Build, line)).await;
            }
        };
        let (built, ()) = tokio::join!(self.shared.builder.build(request, self.stop.clone()), copy);
        match built {
            Ok(built) => Ok(built),
            Err(hearth_build::BuildError::Cancelled) => Err(self.stopped()),
            Err(error @ (hearth_build::BuildError::Platform(_) | hearth_build::BuildError::DiskFull(_))) => {
                self.host_failed(&error).await;
                Err(error.state_reason())
            }
            Err(error) => {
                self.say(format!("Error: {error}")).await;
                Err(error.state_reason())
            }
        }
    }

    /// Whether the image's tags say that its layers are to be made anew.
    async fn wants_no_cache(&self) -> Result<bool, String> {
        let tags = match self.shared.store.image_by_id(&self.image.id).await {
            Ok(image) => image.map(|image| image.tags).unwrap_or_default(),
            Err(error) => return Err(self.host_failed(&error).await),
        };
        let tags: BTreeMap<String, String> = serde_json::from_str(&tags).unwrap_or_default();
        Ok(tags.get(NO_CACHE_TAG).is_some_and(|value| value.eq_ignore_ascii_case("true")))
    }

    async fn boot(&self, work: &Path, rootfs: PathBuf) -> Result<Box<dyn Machine>, String> {
        let egress = self.egress().await?;
        let shape = self.shape()?;
        self.say(format!("Booting with {} MiB of memory and {} vCPU.", shape.memory_mib, shape.vcpus)).await;
        let id = format!("build-{}", self.job.build_id);
        let services = self.services(&id);
        let booted = self
            .shared
            .engine
            .boot(BootSpec {
                id,
                dir: work.join("machine"),
                rootfs,
                disks: Vec::new(),
                vcpus: shape.vcpus,
                memory_mib: shape.memory_mib,
                egress,
                services,
                timeout: self.shared.settings.boot_timeout,
            })
            .await;
        match booted {
            Ok(machine) => Ok(machine),
            Err(BootError::Host { what, source }) => Err(self.io_failed(&what, &source).await),
            Err(error) => Err(self.host_failed(&error).await),
        }
    }

    /// What the guests of this build may reach.
    async fn egress(&self) -> Result<Egress, String> {
        let connectors = &self.job.spec.egress_network_connectors;
        match self.shared.policies.resolve(&self.image.account, &self.image.region, connectors).await {
            Ok(egress) => Ok(egress),
            Err(error @ (ControlError::ConnectorNotFound(_) | ControlError::InvalidTags(_))) => Err(error.to_string()),
            Err(error) => Err(self.host_failed(&error).await),
        }
    }

    /// What a guest of this build may ask. The app's build hooks act with the build role (SPEC 8.1).
    fn services(&self, id: &str) -> Arc<Services> {
        let shared = &self.shared;
        Arc::new(Services::new(id, &self.image.region, Some(&self.job.spec.build_role_arn), &shared.roles, shared.settings.guests.api))
    }

    /// Where the Dockerfile's steps run.
    async fn room(&self, egress: Egress) -> Result<Room, String> {
        let shared = &self.shared;
        if let Some(settings) = shared.settings.build_machine {
            let machine = BuilderMachine::new(Arc::clone(&shared.engine), Arc::clone(&shared.capacity), settings, egress);
            return Ok(Room::Machine(Arc::new(machine)));
        }
        match shared.engine.outlet().await {
            Ok(outlet) => Ok(Room::Namespaces(Box::new(BuildUplink::new(outlet, egress)))),
            Err(error) => Err(self.host_failed(&error).await),
        }
    }

    /// Starts the app, waits until it is ready, and captures the machine.
    async fn make_snapshot(&self, mut machine: Box<dyn Machine>, config: &ImageConfig) -> Result<Snapshot, String> {
        let mut pump = Pump::start(machine.take_events(), self.log.clone());
        let ready = tokio::select! {
            ready = self.make_ready(machine.as_ref(), &mut pump, config) => ready,
            () = self.stop.cancelled() => Err(self.stopped()),
        };
        if let Err(reason) = ready {
            pump.kill(machine).await;
            return Err(reason);
        }
        let into = version_dir(&self.shared.settings.data_dir, &self.image.id, self.job.number);
        if let Some(parent) = into.parent()
            && let Err(error) = tokio::fs::create_dir_all(parent).await
        {
            pump.kill(machine).await;
            return Err(self.io_failed("creating the image's directory", &error).await);
        }
        self.say("The application is ready. Taking the snapshot.".to_owned()).await;
        let captured = machine.capture(into).await;
        pump.last_words().await;
        match captured {
            Ok(snapshot) => Ok(snapshot),
            Err(CaptureError::Host { what, source }) => Err(self.io_failed(&what, &source).await),
            Err(error) => Err(self.host_failed(&error).await),
        }
    }

    async fn make_ready(&self, machine: &dyn Machine, pump: &mut Pump, config: &ImageConfig) -> Result<(), String> {
        self.say(format!("Starting {:?}.", config.argv)).await;
        match machine.start_app(self.app(config)).await {
            Ok(()) => {}
            Err(GuestError::App(reason)) => return Err(format!("The application could not be started: {reason}")),
            Err(error) => return Err(self.host_failed(&error).await),
        }
        if self.hooks.timeout(Hook::Ready).is_some() {
            return self.check(Hook::Ready, machine, pump).await;
        }
        self.wait_for_rest(pump, Readiness::new(&config.exposed_ports, self.shared.settings.ready_timeout)).await
    }

    async fn wait_for_rest(&self, pump: &mut Pump, mut readiness: Readiness) -> Result<(), String> {
        loop {
            let until = match readiness.verdict() {
                Verdict::Ready(why) => {
                    self.say(why).await;
                    return Ok(());
                }
                Verdict::Failed(reason) => return Err(reason),
                Verdict::Wait(until) => until,
            };
            match timeout_at(until, pump.next()).await {
                Ok(Some(MachineEvent::Listening(port))) => self.say(readiness.listening(port)).await,
                Ok(Some(MachineEvent::Activity(activity))) => readiness.activity(activity),
                Ok(Some(MachineEvent::AppExited(status))) => return Err(app_exited(status)),
                Ok(Some(MachineEvent::Died { reason })) => return Err(self.host_failed(&reason).await),
                Ok(Some(MachineEvent::DiskFailed { full: true })) => return Err(DISK_FULL.to_owned()),
                Ok(Some(MachineEvent::DiskFailed { full: false })) => return Err(self.host_failed(&"the host's disk failed").await),
                Ok(Some(MachineEvent::Log(_))) | Err(_) => {}
                Ok(None) => return Err(self.host_failed(&"the machine's events ended").await),
            }
        }
    }

    /// Has a clone of the snapshot checked by the app, if it wants to.
    async fn validate(&self, work: &Path, snapshot: &Arc<Snapshot>) -> Result<(), String> {
        if self.hooks.timeout(Hook::Validate).is_none() {
            return Ok(());
        }
        self.say("Validating the snapshot on a clone.".to_owned()).await;
        let id = format!("validate-{}", self.job.build_id);
        let spec = LaunchSpec {
            dir: work.join("validate"),
            snapshot: Arc::clone(snapshot),
            source: LaunchSource::Snapshot,
            egress: self.egress().await?,
            services: self.services(&id),
            generation: 1,
            id,
        };
        let mut machine = match self.shared.engine.launch(spec).await {
            Ok(machine) => machine,
            Err(LaunchError::Host { what, source }) => return Err(self.io_failed(&what, &source).await),
            Err(error) => return Err(self.host_failed(&error).await),
        };
        let mut pump = Pump::start(machine.take_events(), self.log.clone());
        let checked = self.check(Hook::Validate, machine.as_ref(), &mut pump).await;
        if checked.is_ok() {
            match machine.record_working_set().await {
                Ok(bytes) => self.say(format!("The snapshot is valid. Its working set is {bytes} bytes.")).await,
                // Launches do without.
                Err(error) => tracing::warn!(build = self.job.build_id, %error, "a working set could not be recorded"),
            }
        }
        pump.kill(machine).await;
        checked
    }

    /// Waits until a build hook that is enabled has answered 200.
    async fn check(&self, hook: Hook, machine: &dyn Machine, pump: &mut Pump) -> Result<(), String> {
        let Some(limit) = self.hooks.timeout(hook) else { return Ok(()) };
        let check = Check { hooks: &self.hooks, hook, endpoint: &self.endpoint, log: &self.log };
        match check.pass(machine.dialer().as_ref(), pump, limit).await {
            Ok(()) => Ok(()),
            Err(CheckError::App(reason)) => Err(reason),
            Err(CheckError::Machine(error)) => Err(self.host_failed(&error).await),
        }
    }

    fn app(&self, config: &ImageConfig) -> App {
        let arn = ImageArn { region: self.image.region.clone(), account: self.image.account.clone(), name: self.image.name.clone() };
        let ours = [
            ("AWS_LAMBDA_MICROVM_IMAGE_NAME", self.image.name.clone()),
            ("AWS_LAMBDA_MICROVM_IMAGE_ARN", arn.to_string()),
            ("AWS_LAMBDA_MICROVM_IMAGE_VERSION", version_name(self.job.number)),
            ("AWS_REGION", self.image.region.clone()),
        ];
        let requested = self.job.spec.environment.iter().flatten().map(|(key, value)| (key.clone(), value.clone()));
        let ours = ours.into_iter().map(|(key, value)| (key.to_owned(), value));
        let mut env = last_wins(config.env.iter().cloned().chain(requested).chain(ours));
        if self.shared.settings.guests.names_api {
            env.extend(endpoints::variables(&env));
        }
        App {
            argv: config.argv.clone(),
            env,
            cwd: config.cwd.clone(),
            user: config.user.clone(),
            stop_signal: config.stop_signal,
            all_capabilities: self.job.spec.all_capabilities,
            hostname: HOSTNAME.to_owned(),
        }
    }

    /// The one place where a size becomes a machine: what the settings say when the build runs.
    fn shape(&self) -> Result<Shape, String> {
        self.shared.sizes.shape(self.job.spec.memory_mib).map_err(|error| error.to_string())
    }

    /// The reason of a build that was given up.
    fn stopped(&self) -> String {
        if self.shared.stop.is_cancelled() { HOST_STOPPED.to_owned() } else { DELETED.to_owned() }
    }

    async fn say(&self, text: String) {
        self.log.append(LogLine::now(LogOrigin::Build, text)).await;
    }

    /// The reason of a failure that is not the image's fault. What it was goes to the server's log alone: it tells of the host's files.
    async fn host_failed(&self, error: &(dyn std::fmt::Display + Sync)) -> String {
        let text = error.to_string();
        tracing::error!(build = self.job.build_id, error = text, "a build failed because of this host");
        self.say(format!("The server's log says more about build {}.", self.job.build_id)).await;
        HOST_FAILED.to_owned()
    }

    async fn io_failed(&self, what: &str, error: &io::Error) -> String {
        let reason = self.host_failed(&format!("{what}: {error}")).await;
        if error.kind() == io::ErrorKind::StorageFull { DISK_FULL.to_owned() } else { reason }
    }
}

/// The environment without the values that later ones replace, in order of first appearance.
fn last_wins(all: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut environment: Vec<(String, String)> = Vec::new();
    for (key, value) in all {
        match environment.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => environment.push((key, value)),
        }
    }
    environment
}

/// Deletes a directory that may not be there.
async fn remove(dir: &Path) {
    match tokio::fs::remove_dir_all(dir).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "files of a build are left until the next start");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_values_replace_earlier_ones_where_those_stood() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let all = [pair("A", "1"), pair("B", "2"), pair("A", "3")];
        assert_eq!(last_wins(all.into_iter()), [pair("A", "3"), pair("B", "2")]);
    }
}
