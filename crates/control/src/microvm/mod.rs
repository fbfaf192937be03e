//! One MicroVM: its states, and the one task that changes them.
//!
//! ```text
//!                    ┌──────────────────── resume, wake ─────────────────────────┐
//!                    ▼                                                           │
//!   run ─────▶ PENDING ──launched──▶ RUNNING ──suspend, idle──▶ SUSPENDING ──▶ SUSPENDED
//!         /run or /resume             ▲   │                     /suspend │           │
//!                 │                   └───┼─resume, wake in time─┘   │           │
//!                 └───────────────────────┴───────────┬──────────────┴───────────┘
//!           terminate, lifetime over, suspended too long, app exited, machine died, hook, launch or suspend failed
//!                                                     ▼
//!                             TERMINATING ──/terminate, machine gone, files deleted──▶ TERMINATED
//! ```
//!
//! - **PENDING**: the engine launches the machine, from the image's snapshot or from what the last suspend left; then the app's `/run` hook is
//!   called, or `/resume`. A suspend that is asked for meanwhile is remembered and follows at once. A terminate waits for the engine's answer,
//!   not for the hook's, then kills.
//! - **RUNNING**: the endpoint has a dialer. Idle means that no byte crossed the endpoint for `maxIdleDurationSeconds`; the timer is armed for
//!   the last byte's time plus that, and looks again when it fires. The dialer is taken back before a suspend is recorded, and activity is
//!   looked at once more after that, so that a request either finds a dialer or is held: none is cut by the idle timer's decision. Streams
//!   that are open but silent are no activity, and are cut; settings may count them, and what the MicroVM does by itself ([`busy`]).
//! - **SUSPENDING**: the `/suspend` hook is called, then the engine writes the machine's state and ends its process. A wake or resume cancels
//!   that while the process can still go on, which is faster than to start another: an app that was told `/suspend` is told `/resume`, then.
//!   After that point it is remembered and follows at once. A terminate does not wait for the hook.
//! - **SUSPENDED**: no process, no memory. Ends after `suspendedDurationSeconds`, unless that is 0 (then idle terminates, and only an explicit
//!   suspend comes here) or the host's shutdown suspended it, which is not the user's doing: such a MicroVM wakes whatever its policy says.
//!   A resume that fails before the machine has run leads back here: nothing is lost, and whoever waited is told. One for which the host has
//!   no memory is not begun. A wake goes on even if nobody waits for it any more.
//! - **TERMINATING**, **TERMINATED**: an app that was RUNNING and is ended by a call or a timer has its `/terminate` hook called, is sent its
//!   stop signal, and has a moment to follow it. The machine is killed, its files are deleted, its record stays for a while.
//!
//! A hook is part of the operation it belongs to and runs in that operation's task ([`operation`]). One that does not answer 200 in its time
//! ends the MicroVM, with two exceptions: `/terminate`, and `/suspend` when the host stops, where the MicroVM's memory is worth more than the
//! app's consent. The end of the app or of the machine during a hook ends the MicroVM at once.
//!
//! `maximumDurationInSeconds` is wall time since the start and ends every state. [`policy`] decides, [`driver`] acts: it writes a transition
//! to the store, publishes it to [`Handle`]s, and only then answers whoever asked for it.

mod busy;
mod counted;
mod driver;
mod operation;
mod policy;
pub(crate) mod reason;
mod ship;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hearth_machine::{Dial, DialError, Engine, GuestStream, Snapshot, Target};
use hearth_store::{Store, StoreError};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::AbortHandle,
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    arn::{allows_http, check_shell},
    capacity::{self, Capacity, Reservation, Shortage},
    connectors::Policies,
    error::ControlError,
    hooks::Hooks,
    images::Snapshots,
    logs::LogStore,
    plane::{Activity, ConnectError},
    roles::Roles,
    settings::{ActivitySettings, GuestSettings},
    types::{Microvm, MicrovmState},
};

use counted::Counted;

pub(crate) use reason::HOST_STOPPED;

/// What every MicroVM's driver works with.
pub(crate) struct Shared {
    pub store: Store,
    pub engine: Arc<dyn Engine>,
    pub snapshots: Arc<Snapshots>,
    pub policies: Arc<Policies>,
    pub logs: Arc<LogStore>,
    pub roles: Arc<dyn Roles>,
    pub guests: GuestSettings,
    pub capacity: Arc<Capacity>,
    pub activity: ActivitySettings,
    /// Parent of the MicroVMs' directories.
    pub dir: PathBuf,
    /// How long an app may take to end after its stop signal.
    pub stop_grace: Duration,
    /// Told about each termination.
    pub terminated: Notify,
    /// Counts what observers could see change.
    pub changes: watch::Sender<u64>,
    pub tasks: TaskTracker,
}

impl Shared {
    /// Promises memory to a clone of a snapshot, or so much if there is none.
    pub async fn admit(&self, snapshot: Option<&Snapshot>, memory_mib: u32, own_bytes: u64) -> Result<Reservation, Shortage> {
        let Some(snapshot) = snapshot else { return self.capacity.admit_clone(memory_mib, own_bytes, None) };
        let unloaded_bytes = self.engine.unloaded_bytes(snapshot).await;
        let image = capacity::Shared { snapshot: &snapshot.dir, bytes: snapshot.manifest.memory_bytes, unloaded_bytes };
        self.capacity.admit_clone(snapshot.manifest.memory_mib, own_bytes, Some(image))
    }
}

/// A MicroVM with what the API does not show.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub account: String,
    pub region: String,
    /// UUID of the image.
    pub image_id: String,
    pub image_name: String,
    /// Number of the image's version.
    pub number: i64,
    pub vm: Microvm,
    /// The union `logging` as it was sent; the image's own does not apply (SPEC 7).
    pub logging: Option<serde_json::Value>,
    /// Of the image's version, which may be gone.
    pub hooks: Hooks,
    pub run_hook_payload: Option<String>,
    /// What its image asks for.
    pub memory_mib: u32,
    /// Counts launches and resumes, from 1.
    pub generation: u64,
    pub suspended_at: Option<SystemTime>,
    pub suspended_by: Option<SuspendedBy>,
}

/// Whose doing a suspend was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SuspendedBy {
    Idle,
    Call,
    Host,
}

/// A MicroVM as its observers see it.
#[derive(Clone)]
pub(crate) struct View {
    pub vm: Arc<Microvm>,
    /// A request resumes it if it is suspended.
    wakes: bool,
    /// Counts wakes that failed and left it suspended.
    failed_wakes: u64,
    /// Present while requests can be sent to it.
    dialer: Option<Arc<dyn Dial>>,
}

/// What a caller may ask of a MicroVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Suspend,
    Resume,
    Terminate,
}

/// A message with someone who waits for the answer.
#[derive(Debug)]
struct Request {
    call: Wish,
    answer: oneshot::Sender<Result<(), CallError>>,
}

#[derive(Debug, Clone, Copy)]
enum Wish {
    Call(Call),
    HostShutdown,
}

/// Why a call was not followed.
#[derive(Debug, thiserror::Error)]
enum CallError {
    /// the MicroVM is over
    #[error("the MicroVM is terminated")]
    Terminated,
    /// the host has no memory to resume it
    #[error(transparent)]
    NoRoom(#[from] Shortage),
    /// the transition could not be recorded
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How a guest has its own MicroVM suspended.
#[derive(Debug, Clone)]
pub(crate) struct Suspender(mpsc::WeakUnboundedSender<Request>);

impl Suspender {
    /// Like SuspendMicrovm: returns when it is recorded, not when it is done.
    pub async fn suspend(&self) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let request = Request { call: Wish::Call(Call::Suspend), answer };
        let sent = self.0.upgrade().is_some_and(|requests| requests.send(request).is_ok());
        match answered.await {
            Ok(result) if sent => result.map_err(|error| error.to_string()),
            _ => Err("The MicroVM is about to end.".to_owned()),
        }
    }
}

/// How the rest of the domain reaches a MicroVM.
pub(crate) struct Handle {
    pub id: String,
    pub account: String,
    pub region: String,
    /// The endpoint's host name.
    pub host: String,
    pub activity: Arc<Activity>,
    /// Open streams keep it awake.
    counts_streams: bool,
    pub memory_mib: u32,
    http: bool,
    shell: bool,
    view: watch::Receiver<View>,
    requests: mpsc::UnboundedSender<Request>,
    wake: Arc<Notify>,
    task: Option<AbortHandle>,
}

impl Handle {
    /// Starts the driver of a MicroVM in state `PENDING`, which launches it with the memory it is promised, or `SUSPENDED`, which waits.
    pub fn start(shared: &Arc<Shared>, record: Record, promised: Option<Reservation>) -> Arc<Self> {
        Self::build(record, shared.activity.open_requests, |channels, record| {
            let driver = driver::Driver::new(Arc::clone(shared), record, channels, promised);
            Some(shared.tasks.spawn(driver.run()).abort_handle())
        })
    }

    /// A MicroVM that is over and only to be looked at.
    pub fn terminated(record: Record) -> Arc<Self> {
        Self::build(record, false, |_, _| None)
    }

    fn build(record: Record, counts_streams: bool, start: impl FnOnce(driver::Channels, Record) -> Option<AbortHandle>) -> Arc<Self> {
        let (publish, view) =
            watch::channel(View { vm: Arc::new(record.vm.clone()), wakes: wakes(&record), failed_wakes: 0, dialer: None });
        let (requests, mailbox) = mpsc::unbounded_channel();
        let wake = Arc::new(Notify::new());
        let activity = Arc::new(Activity::default());
        let memory_mib = record.memory_mib;
        let (id, host) = (record.vm.id.clone(), record.vm.endpoint.clone());
        let (account, region) = (record.account.clone(), record.region.clone());
        let http = allows_http(&record.vm.ingress_network_connectors);
        let shell = check_shell(&record.vm.ingress_network_connectors).is_ok();
        let suspender = Suspender(requests.downgrade());
        let channels = driver::Channels { publish, mailbox, suspender, wake: Arc::clone(&wake), activity: Arc::clone(&activity) };
        let task = start(channels, record);
        Arc::new(Self { id, account, region, host, activity, counts_streams, memory_mib, http, shell, view, requests, wake, task })
    }

    /// The MicroVM as last recorded.
    pub fn microvm(&self) -> Arc<Microvm> {
        Arc::clone(&self.view.borrow().vm)
    }

    /// Asks for something and waits until it is recorded, not until it is done.
    pub async fn call(&self, call: Call) -> Result<(), ControlError> {
        let terminated = || ControlError::Terminated(self.id.clone());
        match self.ask(Wish::Call(call)).await {
            Some(Ok(())) => Ok(()),
            Some(Err(CallError::Terminated)) => Err(terminated()),
            Some(Err(CallError::NoRoom(shortage))) => Err(shortage.into()),
            Some(Err(CallError::Store(error))) => Err(ControlError::Internal(error.to_string())),
            None if self.microvm().state != MicrovmState::Terminated => Err(ControlError::InsufficientCapacity(STOPPING.to_owned())),
            None if call == Call::Terminate => Ok(()),
            None => Err(terminated()),
        }
    }

    /// Suspends the MicroVM if it runs, because the host stops. Returns when it is suspended or terminated; its driver has ended then.
    pub async fn shut_down(&self) {
        let _ = self.ask(Wish::HostShutdown).await;
        let mut view = self.view.clone();
        // Fails when the driver ends, which it does in a state of rest.
        let _ = view.wait_for(|view| view.vm.state == MicrovmState::Terminated).await;
    }

    /// Ends the driver without its consent; its machine dies with it.
    pub fn abort(&self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }

    async fn ask(&self, call: Wish) -> Option<Result<(), CallError>> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request { call, answer }).ok()?;
        answered.await.ok()
    }

    /// Opens a stream; wakes the MicroVM and waits for it up to `limit` if it sleeps.
    pub async fn connect(&self, target: &Target, limit: Duration) -> Result<Box<dyn GuestStream>, ConnectError> {
        let (allowed, what) = match target {
            Target::Port(_) => (self.http, "HTTP"),
            Target::Process(_) | Target::Files(_) => (self.shell, "shells"),
        };
        if !allowed {
            return Err(ConnectError::Unreachable(format!("the MicroVM has no ingress connector for {what}")));
        }
        // Before the view is looked at: the driver takes the dialer back, then looks at the activity.
        self.activity.touch();
        let connecting = tokio::time::timeout_at(Instant::now() + limit, self.connect_when_running(target));
        connecting.await.unwrap_or(Err(ConnectError::TooSlow(limit)))
    }

    async fn connect_when_running(&self, target: &Target) -> Result<Box<dyn GuestStream>, ConnectError> {
        let mut view = self.view.clone();
        let failed_before = view.borrow().failed_wakes;
        loop {
            let dialer = {
                let view = view.borrow_and_update();
                if view.failed_wakes != failed_before {
                    return Err(ConnectError::NotWoken(view.vm.state_reason.clone().unwrap_or_default()));
                }
                self.find_dialer(&view)?
            };
            if let Some(dialer) = dialer {
                match dialer.open(target).await {
                    Ok(stream) if self.counts_streams => return Ok(Box::new(Counted::new(stream, self.activity.begin()))),
                    Ok(stream) => return Ok(stream),
                    // Suspended, or dead, since the view was published: the next view says which.
                    Err(DialError::Gone(_)) => {}
                    Err(error) => return Err(ConnectError::Unreachable(error.to_string())),
                }
            }
            if view.changed().await.is_err() {
                return Err(ConnectError::Unreachable("the MicroVM is terminated, or the server is stopping".to_owned()));
            }
        }
    }

    /// The dialer of a running MicroVM; nothing if it will have one soon.
    fn find_dialer(&self, view: &View) -> Result<Option<Arc<dyn Dial>>, ConnectError> {
        match view.vm.state {
            MicrovmState::Running => Ok(view.dialer.clone()),
            MicrovmState::Pending => Ok(None),
            MicrovmState::Suspending | MicrovmState::Suspended if view.wakes => {
                // However many requests wait, the driver sees one wake.
                self.wake.notify_one();
                Ok(None)
            }
            MicrovmState::Suspending | MicrovmState::Suspended => {
                Err(ConnectError::Unreachable("the MicroVM is suspended and its idle policy does not resume it".to_owned()))
            }
            MicrovmState::Terminating | MicrovmState::Terminated => Err(ConnectError::Unreachable("the MicroVM is terminated".to_owned())),
        }
    }
}

pub(crate) const STOPPING: &str = "The server is stopping. Try again when it is back.";

/// Whether a request resumes the MicroVM while it is suspended.
fn wakes(record: &Record) -> bool {
    record.suspended_by == Some(SuspendedBy::Host) || record.vm.idle_policy.is_some_and(|policy| policy.auto_resume)
}

#[cfg(test)]
mod hook_tests;
#[cfg(test)]
mod tests;
