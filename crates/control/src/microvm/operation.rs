//! What goes on beside a driver's loop: a launch, a suspend, or clearing away. Each is a task of its own, one at a time, and the hooks that
//! belong to it are called in it.
//!
//! ```text
//! launch    restore ─▶ /run, or /resume after a suspend ─▶ Running
//! suspend   /suspend ─▶ write the state, end the process     (cancelled in time: /resume ─▶ Running)
//! clear     /terminate ─▶ stop signal ─▶ kill ─▶ delete the files     (the first two only for an app that runs and is to be ended)
//! ```

use std::{path::PathBuf, sync::Arc, time::Duration};

use hearth_guest_protocol::{HookCall, HookReply};
use hearth_machine::{Dial, LaunchError, LaunchSource, LaunchSpec, Machine, MachineEvent, SnapshotError, SuspendError, SuspendOutcome};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    hooks::{self, Called, Hook},
    logs::{LogLine, LogOrigin, LogWriter},
    pump::Pump,
    recovery::holds_suspended_state,
    services::Services,
};

use super::{Record, Shared, SuspendedBy, reason};

/// The suspend hook's time when the host stops: it has more to do than to wait for one app.
const HOST_SHUTDOWN_HOOK: Duration = Duration::from_secs(5);

/// A machine that runs.
pub struct Running {
    pub machine: Box<dyn Machine>,
    pub dialer: Arc<dyn Dial>,
    pub pump: Pump,
}

impl Running {
    /// Takes over a machine.
    fn attach(mut machine: Box<dyn Machine>, log: LogWriter) -> Self {
        let pump = Pump::start(machine.take_events(), log);
        Self { dialer: machine.dialer(), machine, pump }
    }

    async fn kill(self) {
        self.pump.kill(self.machine).await;
    }
}

/// What an operation leaves.
pub enum Outcome {
    Launched(Result<Running, LaunchFailure>),
    /// With the machine, if it runs on; or with the state reason.
    Suspended(Result<Option<Running>, String>),
    Cleared,
    /// A bug: the operation panicked.
    Broken,
}

/// Why there is no machine.
pub struct LaunchFailure {
    pub reason: String,
    /// What the last suspend left is still there.
    pub keeps_state: bool,
}

/// Why a hook was not followed. The app, and the machine, may still be there.
enum Setback {
    /// The app did not answer 200. With the state reason.
    Hook(String),
    /// The app or the machine came to its end, or the hook's answer is of no use any more. With the state reason.
    Over(String),
}

/// What an operation works with.
pub struct Operation {
    pub shared: Arc<Shared>,
    pub record: Record,
    pub dir: PathBuf,
    pub log: LogWriter,
    pub services: Arc<Services>,
    /// Cancelled when the MicroVM ends whatever a hook says.
    pub hurry: CancellationToken,
}

impl Operation {
    /// Starts it.
    pub fn begin<F: Future<Output = Outcome> + Send + 'static>(self, act: impl FnOnce(Self) -> F) -> AbortOnDropHandle<Outcome> {
        AbortOnDropHandle::new(tokio::spawn(act(self)))
    }

    /// Launches the machine and has the app take up its work.
    pub async fn launch(self, source: LaunchSource) -> Outcome {
        let mut running = match self.restore(source).await {
            Ok(running) => running,
            Err(failure) => return Outcome::Launched(Err(failure)),
        };
        let hook = if source == LaunchSource::Snapshot { Hook::Run } else { Hook::Resume };
        match self.call_hook(&mut running, hook, Duration::MAX).await {
            Ok(()) => Outcome::Launched(Ok(running)),
            Err(Setback::Hook(reason) | Setback::Over(reason)) => {
                running.kill().await;
                Outcome::Launched(Err(LaunchFailure { reason, keeps_state: false }))
            }
        }
    }

    /// Has the engine launch the machine.
    async fn restore(&self, source: LaunchSource) -> Result<Running, LaunchFailure> {
        let (shared, record) = (&self.shared, &self.record);
        let (id, generation) = (&record.vm.id, record.generation);
        // What a connector means may have changed since the last launch.
        let egress = match shared.policies.resolve(&record.account, &record.region, &record.vm.egress_network_connectors).await {
            Ok(egress) => egress,
            Err(error) => {
                tracing::error!(id, generation, %error, "a MicroVM's egress connector means nothing");
                let keeps_state = source == LaunchSource::Suspended && holds_suspended_state(&self.dir).await;
                return Err(LaunchFailure { reason: reason::NO_CONNECTOR.to_owned(), keeps_state });
            }
        };
        let launched = async {
            let snapshot = shared.snapshots.get(&record.image_id, record.number).await?;
            let (dir, services) = (self.dir.clone(), Arc::clone(&self.services) as _);
            shared.engine.launch(LaunchSpec { id: id.clone(), dir, snapshot, source, egress, services, generation }).await
        };
        let error = match launched.await {
            Ok(machine) => return Ok(Running::attach(machine, self.log.clone())),
            Err(error) => error,
        };
        tracing::error!(id, generation, %error, "a MicroVM could not be launched");
        // A host that cannot resume it now may do so later; a state that is damaged stays so.
        let for_good = matches!(&error, LaunchError::Snapshot(error) if !matches!(error, SnapshotError::Platform { .. }));
        let keeps_state = source == LaunchSource::Suspended && !for_good && holds_suspended_state(&self.dir).await;
        Err(LaunchFailure { reason: reason::launch_failed(&error), keeps_state })
    }

    /// Has the app prepare and suspends the machine. An app that fails to prepare is ended, unless it is the host that wants the suspend:
    /// then its memory is worth more than its consent.
    pub async fn suspend(self, mut running: Running, by: SuspendedBy, cancel: CancellationToken) -> Outcome {
        let host = by == SuspendedBy::Host;
        match self.call_hook(&mut running, Hook::Suspend, if host { HOST_SHUTDOWN_HOOK } else { Duration::MAX }).await {
            Ok(()) => {}
            Err(Setback::Hook(reason)) if host => {
                self.say(format!("{reason} The MicroVM is suspended all the same, because the host stops."));
            }
            Err(Setback::Hook(reason) | Setback::Over(reason)) => {
                running.kill().await;
                return Outcome::Suspended(Err(reason));
            }
        }
        if !cancel.is_cancelled() {
            let suspended = running.machine.suspend(cancel).await;
            running.pump.last_words().await;
            running = match self.still_running(suspended) {
                Ok(Some(machine)) => Running::attach(machine, self.log.clone()),
                Ok(None) => return Outcome::Suspended(Ok(None)),
                Err(reason) => return Outcome::Suspended(Err(reason)),
            };
        }
        // An app that has prepared for a suspend must hear that it is over.
        if self.record.hooks.timeout(Hook::Suspend).is_some()
            && let Err(Setback::Hook(reason) | Setback::Over(reason)) = self.call_hook(&mut running, Hook::Resume, Duration::MAX).await
        {
            running.kill().await;
            return Outcome::Suspended(Err(reason));
        }
        Outcome::Suspended(Ok(Some(running)))
    }

    /// The machine whose suspend was cancelled, if it was; or the state reason.
    fn still_running(&self, suspended: Result<SuspendOutcome, SuspendError>) -> Result<Option<Box<dyn Machine>>, String> {
        let id = &self.record.vm.id;
        match suspended {
            Ok(SuspendOutcome::Suspended(written)) => {
                tracing::debug!(id, dirty_bytes = written.dirty_bytes, device_state_bytes = written.device_state_bytes, "suspended");
                Ok(None)
            }
            Ok(SuspendOutcome::Cancelled(machine)) => Ok(Some(machine)),
            Err(error) => {
                tracing::error!(id, %error, "a MicroVM could not be suspended");
                Err(reason::suspend_failed(&error))
            }
        }
    }

    /// Ends the machine, if there is one, and deletes the files. An app that is asked to end has its time to do so.
    pub async fn clear(self, running: Option<Running>, ask_app: bool) -> Outcome {
        if let Some(mut running) = running {
            if ask_app {
                self.ask_to_end(&mut running).await;
            }
            running.kill().await;
        }
        match tokio::fs::remove_dir_all(&self.dir).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(dir = %self.dir.display(), %error, "files of a terminated MicroVM are left until the next start");
            }
            _ => {}
        }
        Outcome::Cleared
    }

    /// Calls the terminate hook, then sends the stop signal and waits until the app has ended. Whatever comes of it, the MicroVM ends.
    async fn ask_to_end(&self, running: &mut Running) {
        match self.call_hook(running, Hook::Terminate, Duration::MAX).await {
            Ok(()) => {}
            Err(Setback::Hook(reason)) => self.say(reason),
            Err(Setback::Over(_)) => return,
        }
        let grace = self.shared.stop_grace;
        if grace.is_zero() {
            return;
        }
        let stop = async {
            if let Err(error) = running.machine.stop_app().await {
                tracing::warn!(id = self.record.vm.id, %error, "an app could not be sent its stop signal");
                return;
            }
            while let Some(event) = running.pump.next().await {
                if matches!(event, MachineEvent::AppExited(_) | MachineEvent::Died { .. }) {
                    return;
                }
            }
        };
        tokio::select! {
            stopped = timeout(grace, stop) => if stopped.is_err() {
                self.say(format!("The app did not end within {} s of its stop signal and is killed.", grace.as_secs_f32()));
            },
            () = self.hurry.cancelled() => {}
        }
    }

    /// Calls a hook if the image has it enabled, and waits for its answer for its timeout, but at most for `limit`.
    async fn call_hook(&self, running: &mut Running, hook: Hook, limit: Duration) -> Result<(), Setback> {
        let hooks = &self.record.hooks;
        let called = match hooks.timeout(hook) {
            None => return Ok(()),
            Some(own) => {
                let own = own.min(limit);
                let call = async {
                    let called = hooks::call(running.dialer.as_ref(), &mut running.pump, self.call_of(hook, own)).await;
                    hooks::explain(&mut running.pump, called).await
                };
                tokio::select! {
                    called = call => (called, own),
                    () = self.hurry.cancelled() => return Err(Setback::Over(reason::HURRIED.to_owned())),
                }
            }
        };
        match called {
            (Called::Replied(HookReply::Status(200)), _) => Ok(()),
            (Called::Replied(reply), limit) => {
                if let HookReply::Invalid { reason } = &reply {
                    self.say(format!("The {} hook's answer was not valid: {}", hook.name(), hooks::shorten(reason)));
                }
                Err(Setback::Hook(reason::hook_failed(hook, &reply, hooks.port(), limit)))
            }
            (Called::AppExited(status), _) => Err(Setback::Over(reason::app_exited(status))),
            (Called::Died(what), _) => Err(Setback::Over(reason::died(&what))),
        }
    }

    fn call_of(&self, hook: Hook, limit: Duration) -> HookCall {
        let hooks = &self.record.hooks;
        match hook {
            Hook::Run => hooks.run_call(limit, &self.record.vm.id, self.record.run_hook_payload.as_deref()),
            _ => hooks.runtime_call(hook, limit),
        }
    }

    fn say(&self, text: String) {
        self.log.offer(LogLine::now(LogOrigin::System, text));
    }
}
