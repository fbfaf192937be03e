//! `hearth serve`: puts the server together, says when it can serve, and takes it apart again.
//!
//! ```text
//! prerequisites ─▶ lock ─▶ listeners ─▶ store, keys, engine, builder ─▶ domain ─▶ API, endpoints, administrator's socket ─▶ connect.json
//! signal ─▶ connect.json gone ─▶ nothing new accepted ─▶ MicroVMs suspended ─▶ engine ended ─▶ scratch space emptied
//! ```

mod builds;
mod certificates;
mod listen;
mod logging;
mod signals;

use std::{io::Write, net::SocketAddr, path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use futures::FutureExt;
use hearth_api::Auth;
use hearth_build::Builder;
use hearth_control::{Control, Deps, GuestSettings, Settings, logs::LogStore, roles::Roles, token::Keyring, types::Caller};
use hearth_identity::Directory;
use hearth_ingress::{IngressConfig, LocalCa};
use hearth_machine::{
    Engine,
    kit::Kit,
    network::Slots,
    qemu::{Accelerator, Qemu},
};
use hearth_objects::{Access, LocalObjects};
use hearth_store::Store;
use tokio::{net::UnixListener, sync::Notify};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    certificates::Certificates,
    listen::Listeners,
    signals::{Asked, Signals},
};
use crate::{
    admin::{self, Admin},
    config::{ServeConfig, reachable},
    connect::Connect,
    credentials::{Credentials, Origin},
    data_dir::{DataDir, Lock},
    doctor,
    iam::{self, ObjectPrincipals},
    ports::{self, Ports},
    roles::{AwsRoles, OwnRoles},
    verbs::env,
};

/// Network slots that are kept ready, for that many MicroVMs to start at once without waiting.
const SLOTS_AHEAD: usize = 4;
/// What clients have under way at the stop may take this long to end.
const DRAIN: Duration = Duration::from_secs(5);
/// MicroVMs may take this long to be suspended at the stop.
const SUSPEND: Duration = Duration::from_secs(40);
/// The engine may take this long to end.
const ENGINE_END: Duration = Duration::from_secs(10);

/// Runs the server until a signal ends it. Exit code 0 after a clean stop.
pub async fn serve(config: ServeConfig, dir: DataDir) -> anyhow::Result<ExitCode> {
    logging::start(&config.log);
    raise_open_files();
    let mut signals = Signals::listen().context("listening for signals")?;
    let dir = DataDir::new(std::path::absolute(dir.path()).context("naming the data directory")?);
    let prepared = tokio::select! {
        prepared = Prepared::new(config, dir) => prepared?,
        // What had been begun is dropped, and ends with that.
        signal = signals.end() => {
            tracing::info!(signal, "stopped before it could serve");
            return Ok(ExitCode::SUCCESS);
        }
    };
    // From here on things are started that have to be stopped: a signal waits until all of them are.
    let server = Server::start(prepared).await?;
    let signal = loop {
        match signals.next().await {
            Asked::End(signal) => break signal,
            Asked::Reload => server.reload.notify_one(),
        }
    };
    tracing::info!(signal, "stopping; a second signal ends the server at once");
    tokio::select! {
        stopped = server.stop() => stopped?,
        signal = signals.end() => {
            tracing::warn!(signal, "ended at once");
            return Ok(ExitCode::FAILURE);
        }
    }
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// All that a server needs and that ends by being dropped.
struct Prepared {
    config: ServeConfig,
    dir: DataDir,
    lock: Lock,
    listeners: Listeners,
    credentials: Vec<Credentials>,
    principals: Arc<Directory>,
    origin: Origin,
    certificates: Certificates,
    store: Store,
    objects: LocalObjects,
    keyring: Keyring,
    kit: Kit,
    builder: Builder,
    accelerator: Accelerator,
}

impl Prepared {
    async fn new(config: ServeConfig, dir: DataDir) -> anyhow::Result<Self> {
        let facts = doctor::gather(&config, &dir).await;
        doctor::require(doctor::judge(&facts, &config))?;
        let lock = dir.lock()?;
        dir.prepare()?;
        Connect::withdraw(&dir).context("removing what an earlier server said")?;
        let listeners = Listeners::bind(&config).await?;
        let (credentials, origin) = credentials(&config, &dir)?;
        let ca = LocalCa::load_or_create(&dir.ca(), &config.domain)?;
        hearth_ingress::write_bundle(hearth_ingress::system_bundle().as_deref(), &ca, &dir.ca_bundle())
            .with_context(|| format!("writing {}", dir.ca_bundle().display()))?;
        let certificates = Certificates::read(&config, &dir, ca)?;
        let store = Store::open(&dir.database()).await?;
        let principals = Arc::new(iam::directory(&config, &dir, &credentials)?);
        let objects = LocalObjects::open(&dir.objects(), &config.account, Arc::new(ObjectPrincipals(Arc::clone(&principals))))?;
        let keyring = Keyring::load_or_create(&dir.keys())?;
        let kit = Kit::open(&doctor::find_kit(&config))?;
        let accelerator = doctor::accelerator(&facts, &config);
        let isolation = if config.build_isolation.is_microvm(accelerator) { "microvm" } else { "namespaces" };
        tracing::info!(accelerator = accelerator.name(), choice = ?config.engine, kvm = %facts.kvm, builds = isolation, "engine chosen");
        let builder = builds::builder(&config, &dir, &kit, accelerator).await?;
        Ok(Self {
            config,
            dir,
            lock,
            listeners,
            credentials,
            principals,
            origin,
            certificates,
            store,
            objects,
            keyring,
            kit,
            builder,
            accelerator,
        })
    }
}

/// A server that serves.
struct Server {
    dir: DataDir,
    control: Arc<Control>,
    engine: Arc<dyn Engine>,
    /// Ends the listeners.
    stop: CancellationToken,
    /// Has files read again.
    reload: Arc<Notify>,
    listeners: TaskTracker,
    _lock: Lock,
}

impl Server {
    async fn start(prepared: Prepared) -> anyhow::Result<Self> {
        let Prepared {
            config,
            dir,
            lock,
            listeners,
            credentials,
            principals,
            origin,
            certificates,
            store,
            objects,
            keyring,
            kit,
            builder,
            accelerator,
        } = prepared;
        let first = credentials.first().context("there are no credentials")?;
        let roles = roles(&config, &principals)?;
        let engine = engine(&config, &dir, kit, accelerator).await?;
        let logs = LogStore::new(dir.logs(), config.log_retention());
        let deps = Deps {
            store,
            engine: Arc::clone(&engine),
            builder: Arc::new(builder),
            objects: Arc::new(objects.clone()),
            logs: Arc::clone(&logs),
            keyring: Arc::new(keyring),
            roles,
            settings: Settings {
                guests: guests(&config, &listeners),
                build_machine: builds::machine(&config, &dir, accelerator),
                ..settings(&config, &dir)
            },
        };
        let control = match Control::start(deps).await {
            Ok(control) => control,
            Err(error) => {
                engine.shutdown().await;
                return Err(error.into());
            }
        };
        let connect = Connect {
            api: listeners.api_url.clone(),
            endpoint: listeners.endpoint,
            ca: dir.ca_certificate(),
            region: config.region.clone(),
            account: config.account.clone(),
            access_key_id: first.access_key_id.clone(),
            secret_access_key: first.secret_access_key.clone(),
            pid: std::process::id(),
        };
        let reload = certificates.reload();
        let server = Self { dir, control, engine, stop: CancellationToken::new(), reload, listeners: TaskTracker::new(), _lock: lock };
        let listening = server.listen(&config, listeners, certificates, &objects, logs, principals);
        if let Err(error) = listening.and_then(|()| connect.publish(&server.dir).context("writing connect.json")) {
            server.stop().await?;
            return Err(error);
        }
        announce(&connect, &server.dir, origin);
        Ok(server)
    }

    /// Starts to accept.
    fn listen(
        &self,
        config: &ServeConfig,
        listeners: Listeners,
        certificates: Certificates,
        objects: &LocalObjects,
        logs: Arc<LogStore>,
        principals: Arc<Directory>,
    ) -> anyhow::Result<()> {
        let administrator = Caller {
            account: config.account.clone(),
            region: config.region.clone(),
            principal: format!("arn:aws:iam::{}:root", config.account),
        };
        let api = |auth, access| {
            let settings = hearth_api::Settings { regions: config.served_regions(), min_idle_seconds: config.min_idle_seconds };
            hearth_api::service(self.control.clone(), Arc::clone(&logs), objects.service(access), auth, settings)
        };

        let signed = api(Auth::SigV4(Arc::clone(&principals)), Access::Signed);
        // Policies may ask where a request comes from.
        let signed = signed.into_make_service_with_connect_info::<SocketAddr>();
        let served = axum::serve(listeners.api, signed).with_graceful_shutdown(self.stop.clone().cancelled_owned());
        self.listeners.spawn(run_api("api", served, self.stop.clone()));

        let admin = Admin {
            plane: self.control.clone(),
            changes: self.control.changes(),
            stop: self.stop.clone(),
            logs: Arc::clone(&logs),
            objects: Arc::new(objects.clone()),
            caller: administrator.clone(),
            tmp: self.dir.tmp(),
        };
        let ports =
            Ports { control: self.control.clone(), data: self.control.clone(), caller: administrator.clone(), stop: self.stop.clone() };
        let trusted = admin::router(admin)
            .merge(ports::router(ports))
            .merge(iam::router(Arc::clone(&principals), administrator.account.clone()))
            .merge(api(Auth::Trusted(administrator, principals), Access::Trusted));
        let socket: UnixListener = self.dir.listen().with_context(|| format!("listening on {}", self.dir.socket().display()))?;
        let served = axum::serve(socket, trusted).with_graceful_shutdown(self.stop.clone().cancelled_owned());
        self.listeners.spawn(run_api("administrator's socket", served, self.stop.clone()));

        let tls = hearth_ingress::server_config(certificates.served())?;
        self.listeners.spawn(self.stop.clone().run_until_cancelled_owned(certificates.keep()).map(drop));
        let ingress = IngressConfig { limits: config.endpoints.into(), ..IngressConfig::default() };
        let endpoints = hearth_ingress::serve(listeners.endpoints, tls, self.control.clone(), ingress, self.stop.clone());
        self.listeners.spawn(endpoints);
        self.listeners.close();
        Ok(())
    }

    /// Takes the server apart. Each step has a deadline, and a step that misses it does not keep the next ones from being tried.
    async fn stop(self) -> anyhow::Result<()> {
        Connect::withdraw(&self.dir).context("removing connect.json")?;
        self.stop.cancel();
        within("the listeners to end", DRAIN * 2, self.listeners.wait()).await;
        within("the MicroVMs to be suspended and builds to end", SUSPEND * 2, self.control.shutdown()).await;
        within("the engine to end", ENGINE_END, self.engine.shutdown()).await;
        remove_socket(&self.dir.socket());
        self.dir.empty_tmp()?;
        Ok(())
    }
}

/// The keys that may sign: the configuration's, else the server's own pair.
fn credentials(config: &ServeConfig, dir: &DataDir) -> anyhow::Result<(Vec<Credentials>, Origin)> {
    if !config.credentials.is_empty() {
        return Ok((config.credentials.clone(), Origin::Kept));
    }
    let (own, origin) = Credentials::own(dir)?;
    Ok((vec![own], origin))
}

async fn engine(config: &ServeConfig, dir: &DataDir, kit: Kit, accelerator: Accelerator) -> anyhow::Result<Arc<dyn Engine>> {
    let slots = Slots::start(&instance(dir.path()), config.network.slots, config.network.nameservers.clone(), SLOTS_AHEAD).await?;
    Ok(Arc::new(Qemu::start(kit, accelerator, slots).await?))
}

/// A name for what the host keeps one of per server. The same for the same directory, so that a server finds what a killed predecessor left.
fn instance(dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let digest = ring::digest::digest(&ring::digest::SHA256, dir.as_os_str().as_bytes());
    digest.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

fn settings(config: &ServeConfig, dir: &DataDir) -> Settings {
    let defaults = Settings::new(dir.path().to_owned());
    Settings {
        domain: config.domain.clone(),
        max_concurrent_builds: builds::at_once(config, dir),
        ready_timeout: config.ready_timeout(),
        wake_timeout: config.wake_timeout(),
        stop_grace: config.stop_grace(),
        terminated_retention: config.terminated_retention(),
        capacity: config.capacity.into(),
        guest_size: config.guest_size.into(),
        architectures: config.architectures.into(),
        activity: config.activity.into(),
        quotas: config.quotas.into(),
        connectors: config.egress_policies(),
        shutdown_timeout: SUSPEND,
        ..defaults
    }
}

fn roles(config: &ServeConfig, directory: &Arc<Directory>) -> anyhow::Result<Arc<dyn Roles>> {
    let lifetime = config.roles.lifetime();
    Ok(match &config.roles.aws {
        Some(aws) => Arc::new(AwsRoles::new(aws.clone(), lifetime)?),
        None => Arc::new(OwnRoles { directory: Arc::clone(directory), lifetime }),
    })
}

fn guests(config: &ServeConfig, listeners: &Listeners) -> GuestSettings {
    GuestSettings {
        api: listeners.api.local_addr().ok().map(reachable),
        // AWS's credentials mean nothing here.
        names_api: config.roles.endpoint_variables && config.roles.aws.is_none(),
        self_suspend: config.extensions.self_suspend,
    }
}

/// Lets the server have as many connections as the host allows: the usual limit is meant for programs that wait for descriptors with select.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Serves one listener until the stop, then lets what is under way end, for a while.
async fn run_api<S>(name: &'static str, served: S, stop: CancellationToken)
where
    S: IntoFuture<Output = std::io::Result<()>>,
{
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        served = served.into_future() => if let Err(error) = served {
            tracing::error!(name, %error, "a listener failed");
        },
        () = late => tracing::debug!(name, "what clients had under way was cut"),
    }
}

/// Tells whoever started the server. That nobody listens is no reason to stop.
fn announce(connect: &Connect, dir: &DataDir, origin: Origin) {
    let mut text = String::new();
    if origin == Origin::Made {
        text.push_str("# A key pair was made for this server. `hearth env` prints these lines again.\n");
        text.push_str(&env::exports(connect, dir));
    }
    text.push_str(&format!("ready: how to reach hearth is in {}\n", dir.connect().display()));
    tracing::info!(api = connect.api, endpoint = %connect.endpoint, "serving");
    let mut stdout = std::io::stdout();
    if let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        tracing::warn!(%error, "nobody could be told");
    }
}

async fn within(what: &'static str, limit: Duration, step: impl Future<Output = ()>) {
    if tokio::time::timeout(limit, step).await.is_err() {
        tracing::error!(seconds = limit.as_secs(), "waited in vain for {what}");
    }
}

fn remove_socket(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(socket = %socket.display(), %error, "the administrator's socket was not removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_instance_name_that_fits_a_table_s() {
        assert_eq!(instance(Path::new("/a")), instance(Path::new("/a")));
        assert_ne!(instance(Path::new("/a")), instance(Path::new("/b")));
        assert_eq!(instance(Path::new("/a")).len(), 12);
    }

    #[test]
    fn the_configuration_s_keys_replace_the_server_s_own() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        dir.prepare().unwrap();
        let (own, origin) = credentials(&ServeConfig::default(), &dir).unwrap();
        assert_eq!((own.len(), origin), (1, Origin::Made));
        let pair = Credentials { access_key_id: "AKIAEXAMPLE".to_owned(), secret_access_key: "s".to_owned() };
        let config = ServeConfig { credentials: vec![pair.clone()], ..ServeConfig::default() };
        assert_eq!(credentials(&config, &dir).unwrap(), (vec![pair], Origin::Kept));
    }
}
