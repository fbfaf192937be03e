//! The task that owns a MicroVM: the only code that changes its state.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hearth_machine::{Dial, LaunchSource, MachineEvent};
use hearth_store::StoreError;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    capacity::Reservation,
    logs::{LogGroup, LogLine, LogOrigin, LogWriter, Route, stream_name},
    plane::Activity,
    records,
    services::Services,
    types::MicrovmState,
};

use super::{
    CallError, Record, Request, Shared, SuspendedBy, Suspender, View, Wish,
    busy::Busy,
    operation::{LaunchFailure, Operation, Outcome, Running},
    policy::{self, Decision, Done, Message, Next, Situation},
    reason, ship, wakes,
};

/// The driver's ends of a [`super::Handle`].
pub struct Channels {
    pub publish: watch::Sender<View>,
    pub mailbox: mpsc::UnboundedReceiver<Request>,
    pub suspender: Suspender,
    pub wake: Arc<Notify>,
    pub activity: Arc<Activity>,
}

pub struct Driver {
    shared: Arc<Shared>,
    record: Record,
    channels: Channels,
    dir: PathBuf,
    log: LogWriter,
    /// What the guest may ask, in every life.
    services: Arc<Services>,
    running: Option<Running>,
    busy: Busy,
    /// Launch, suspend or clear, one at a time. A task of its own: whatever it holds, it gets on while the driver waits for the store.
    operation: Option<AbortOnDropHandle<Outcome>>,
    /// Cancels the suspend that is the present operation.
    cancel_suspend: CancellationToken,
    /// Tells the operation that the MicroVM ends whatever a hook says.
    hurry: CancellationToken,
    next: Option<Next>,
    stopping: bool,
    lifetime_end: Instant,
    suspended_end: Option<Instant>,
    failed_wakes: u64,
    /// While there is a machine, or is about to be one.
    promised: Option<Reservation>,
}

impl Driver {
    pub fn new(shared: Arc<Shared>, record: Record, channels: Channels, promised: Option<Reservation>) -> Self {
        let group = LogGroup::of_image(&record.account, &record.region, &record.image_name);
        let stream = stream_name(record.vm.started_at, &record.vm.version, &record.vm.id);
        let route = Route::new(group, stream, record.logging.as_ref());
        let (route, kept_back) = ship::checked(route, record.vm.execution_role_arn.as_deref(), shared.roles.as_ref());
        let log = shared.logs.writer(&route);
        if let Some(why) = kept_back {
            log.offer(LogLine::now(LogOrigin::System, why));
        }
        let suspender = shared.guests.self_suspend.then(|| channels.suspender.clone());
        let role = record.vm.execution_role_arn.as_deref();
        let services = Services::new(&record.vm.id, &record.region, role, &shared.roles, shared.guests.api).with_suspender(suspender);
        let dir = shared.dir.join(&record.vm.id);
        let lifetime_end = in_future(record.vm.started_at, Duration::from_secs(record.vm.maximum_duration_seconds.into()));
        let busy = Busy::new(shared.activity);
        let mut driver = Self {
            shared,
            record,
            channels,
            dir,
            log,
            services: Arc::new(services),
            running: None,
            busy,
            operation: None,
            cancel_suspend: CancellationToken::new(),
            hurry: CancellationToken::new(),
            next: None,
            stopping: false,
            lifetime_end,
            suspended_end: None,
            failed_wakes: 0,
            promised,
        };
        if driver.record.vm.state == MicrovmState::Pending {
            driver.launch(LaunchSource::Snapshot);
        }
        driver.suspended_end = driver.suspended_end();
        driver
    }

    pub async fn run(mut self) {
        while !self.is_at_rest() {
            let timer = self.timer();
            let due = timer.as_ref().map_or_else(Instant::now, |(at, _)| *at);
            tokio::select! {
                outcome = finished(&mut self.operation) => self.done(outcome).await,
                Some(request) = self.channels.mailbox.recv() => self.answer(request).await,
                () = self.channels.wake.notified() => self.consider_alone(Message::Wake).await,
                event = next_event(&mut self.running) => self.heard(event).await,
                () = sleep_until(due), if timer.is_some() => self.timer_fired().await,
            }
        }
    }

    /// Whether nothing will change any more.
    fn is_at_rest(&self) -> bool {
        match self.record.vm.state {
            MicrovmState::Terminated => true,
            MicrovmState::Suspended => self.stopping,
            _ => false,
        }
    }

    fn situation(&self) -> Situation {
        Situation {
            state: self.record.vm.state,
            wakes: wakes(&self.record),
            sleeps: self.record.vm.idle_policy.is_none_or(|policy| policy.suspended_seconds > 0),
            stopping: self.stopping,
        }
    }

    async fn answer(&mut self, request: Request) {
        let message = match request.call {
            Wish::Call(call) => Message::Call(call),
            Wish::HostShutdown => {
                self.stopping = true;
                Message::HostShutdown
            }
        };
        let result = self.consider(message).await;
        // Fails when the caller has gone away, which changes nothing.
        let _ = request.answer.send(result);
    }

    async fn consider_alone(&mut self, message: Message) {
        match self.consider(message.clone()).await {
            Ok(()) => {}
            Err(CallError::NoRoom(shortage)) => tracing::warn!(id = self.record.vm.id, %shortage, "a MicroVM is not woken"),
            Err(error) => tracing::error!(id = self.record.vm.id, ?message, %error, "a MicroVM's transition failed"),
        }
    }

    async fn consider(&mut self, message: Message) -> Result<(), CallError> {
        match policy::decide(self.situation(), message) {
            Decision::Nothing => Ok(()),
            Decision::Refuse => Err(CallError::Terminated),
            Decision::Remember(next) => {
                self.next = next;
                Ok(())
            }
            Decision::Cancel => {
                self.next = Some(Next::Resume);
                self.cancel_suspend.cancel();
                Ok(())
            }
            Decision::Resume => self.resume().await,
            Decision::EnterRunning => {
                self.enter_running().await;
                Ok(())
            }
            Decision::Suspend(by) => self.suspend(by).await,
            Decision::EnterSuspended => {
                self.enter_suspended().await;
                Ok(())
            }
            Decision::ReturnToSuspended(reason) => {
                self.return_to_suspended(reason).await;
                Ok(())
            }
            Decision::Stop(reason) => self.end(reason, true).await,
            Decision::End(reason) => self.end(reason, false).await,
            Decision::Hurry => {
                self.hurry.cancel();
                Ok(())
            }
            Decision::Clear => {
                self.clear(false);
                Ok(())
            }
            Decision::EnterTerminated => {
                self.enter_terminated().await;
                Ok(())
            }
        }
    }

    async fn done(&mut self, outcome: Outcome) {
        let done = match outcome {
            Outcome::Launched(Ok(running)) => {
                self.running = Some(running);
                Done::Launched
            }
            Outcome::Launched(Err(LaunchFailure { reason, keeps_state: true })) => Done::ResumeFailed(reason),
            Outcome::Launched(Err(LaunchFailure { reason, keeps_state: false })) => Done::LaunchFailed(reason),
            Outcome::Suspended(Ok(None)) => Done::Suspended,
            Outcome::Suspended(Ok(Some(running))) => {
                self.running = Some(running);
                Done::SuspendCancelled
            }
            Outcome::Suspended(Err(reason)) => Done::SuspendFailed(reason),
            Outcome::Cleared => Done::Cleared,
            Outcome::Broken => match self.record.vm.state {
                MicrovmState::Pending => Done::LaunchFailed(reason::BROKEN.to_owned()),
                MicrovmState::Suspending => Done::SuspendFailed(reason::BROKEN.to_owned()),
                // What could not be cleared away now is at the next start.
                _ => Done::Cleared,
            },
        };
        self.consider_alone(Message::Done(done)).await;
        // A transition that ends in another one keeps what is to follow for later; what is so already needs nothing more.
        let (state, next) = match self.record.vm.state {
            state @ (MicrovmState::Running | MicrovmState::Suspended) => (state, self.next.take()),
            _ => return,
        };
        let followed = match (state, next) {
            (MicrovmState::Running, Some(Next::Suspend(by))) => self.suspend(by).await,
            (MicrovmState::Suspended, Some(Next::Resume)) => self.resume().await,
            _ => Ok(()),
        };
        if let Err(error) = followed {
            tracing::error!(id = self.record.vm.id, ?next, %error, "what was to follow a MicroVM's transition failed");
        }
    }

    async fn heard(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::AppExited(status) => self.consider_alone(Message::AppExited(status)).await,
            MachineEvent::Died { reason } => self.consider_alone(Message::Died(reason)).await,
            MachineEvent::Listening(_) | MachineEvent::Activity(_) | MachineEvent::Log(_) | MachineEvent::DiskFailed { .. } => {}
        }
    }

    /// What is due next, and when. The idle timer only knows the activity up to now: whoever it wakes looks again.
    fn timer(&self) -> Option<(Instant, Message)> {
        let state = self.record.vm.state;
        if matches!(state, MicrovmState::Terminating | MicrovmState::Terminated) {
            return None;
        }
        let lifetime = (self.lifetime_end, Message::LifetimeOver);
        let other = match state {
            MicrovmState::Running => self.idle_end().map(|at| (at, Message::Idle)),
            MicrovmState::Suspended => self.suspended_end.map(|at| (at, Message::SuspendedTooLong)),
            _ => None,
        };
        Some(other.filter(|(at, _)| *at < lifetime.0).unwrap_or(lifetime))
    }

    async fn timer_fired(&mut self) {
        let Some((at, message)) = self.timer() else { return };
        // Looked at even if bytes have moved since the timer was set: the next window begins here.
        let busy = message == Message::Idle && self.is_busy();
        if at > Instant::now() {
            return;
        }
        if busy {
            self.channels.activity.touch();
        } else {
            self.consider_alone(message).await;
        }
    }

    /// Whether something else than bytes keeps the MicroVM awake, since this was asked last.
    fn is_busy(&mut self) -> bool {
        let worked = self.measure();
        worked || self.busy.counts_requests() && self.channels.activity.open() > 0
    }

    /// Whether the machine worked since this was asked last.
    fn measure(&mut self) -> bool {
        if !self.busy.measures() {
            return false;
        }
        let used = self.running.as_ref().and_then(|running| {
            let used = running.machine.usage();
            used.inspect_err(|error| tracing::warn!(id = self.record.vm.id, %error, "what a machine uses cannot be read")).ok()
        });
        self.busy.next(Instant::now(), used)
    }

    /// When the MicroVM has been idle for long enough.
    fn idle_end(&self) -> Option<Instant> {
        let policy = self.record.vm.idle_policy?;
        Some(Instant::from_std(self.channels.activity.last()) + Duration::from_secs(policy.max_idle_seconds.into()))
    }

    /// When the MicroVM has been suspended for long enough.
    fn suspended_end(&self) -> Option<Instant> {
        let seconds = self.record.vm.idle_policy?.suspended_seconds;
        let counts = seconds > 0 && self.record.suspended_by != Some(SuspendedBy::Host);
        let since = self.record.suspended_at.filter(|_| counts)?;
        Some(in_future(since, Duration::from_secs(seconds.into())))
    }

    fn launch(&mut self, source: LaunchSource) {
        self.operation = Some(self.operation().begin(|operation| operation.launch(source)));
    }

    /// A new operation.
    fn operation(&mut self) -> Operation {
        self.hurry = CancellationToken::new();
        Operation {
            shared: Arc::clone(&self.shared),
            record: self.record.clone(),
            dir: self.dir.clone(),
            log: self.log.clone(),
            services: Arc::clone(&self.services),
            hurry: self.hurry.clone(),
        }
    }

    async fn resume(&mut self) -> Result<(), CallError> {
        // A snapshot that cannot be opened is found to be so by the launch.
        let snapshot = self.shared.snapshots.get(&self.record.image_id, self.record.number).await;
        let own_bytes = self.shared.engine.suspended_bytes(&self.dir).await;
        let promised = match self.shared.admit(snapshot.ok().as_deref(), 0, own_bytes).await {
            Ok(promised) => promised,
            Err(shortage) => {
                // Those who wait are told; it sleeps on as before.
                self.failed_wakes += 1;
                self.publish(None);
                return Err(shortage.into());
            }
        };
        let mut record = self.record.clone();
        record.vm.state = MicrovmState::Pending;
        record.vm.state_reason = None;
        record.generation += 1;
        save(&self.shared, &record).await?;
        self.record = record;
        self.promised = Some(promised);
        self.suspended_end = None;
        self.publish(None);
        self.launch(LaunchSource::Suspended);
        Ok(())
    }

    async fn enter_running(&mut self) {
        self.record.vm.state = MicrovmState::Running;
        self.record.suspended_at = None;
        self.record.suspended_by = None;
        if let Some(promised) = &mut self.promised {
            promised.started();
        }
        self.save_after_the_fact().await;
        self.measure();
        self.channels.activity.touch();
        self.publish(self.dialer());
    }

    async fn suspend(&mut self, by: SuspendedBy) -> Result<(), CallError> {
        self.publish(None);
        if by == SuspendedBy::Idle && self.idle_end().is_some_and(|at| at > Instant::now()) {
            self.publish(self.dialer());
            return Ok(());
        }
        let mut record = self.record.clone();
        record.vm.state = MicrovmState::Suspending;
        record.suspended_by = Some(by);
        if let Err(error) = save(&self.shared, &record).await {
            // The idle timer tries again when it would have fired next.
            self.channels.activity.touch();
            self.publish(self.dialer());
            return Err(error.into());
        }
        self.record = record;
        self.publish(None);
        let Some(running) = self.running.take() else {
            return self.end(reason::died("the server lost track of it"), false).await;
        };
        self.cancel_suspend = CancellationToken::new();
        let cancel = self.cancel_suspend.clone();
        self.operation = Some(self.operation().begin(|operation| operation.suspend(running, by, cancel)));
        Ok(())
    }

    async fn enter_suspended(&mut self) {
        self.record.vm.state = MicrovmState::Suspended;
        self.record.suspended_at = Some(SystemTime::now());
        self.promised = None;
        if self.stopping {
            // Whoever asked first: it would have been resumed, or kept running, had the host not stopped.
            self.next = None;
        }
        self.save_after_the_fact().await;
        self.suspended_end = self.suspended_end();
        self.publish(None);
    }

    /// A resume failed, and everything is as it was before, but for those who waited: they are told.
    async fn return_to_suspended(&mut self, reason: String) {
        self.log.offer(LogLine::now(LogOrigin::System, reason.clone()));
        self.record.vm.state = MicrovmState::Suspended;
        self.record.vm.state_reason = Some(reason);
        self.next = None;
        self.failed_wakes += 1;
        self.promised = None;
        self.save_after_the_fact().await;
        self.suspended_end = self.suspended_end();
        self.publish(None);
    }

    /// Begins the end, which an app that runs may be asked to prepare for. It goes on even if it cannot be recorded: a full disk is no reason
    /// to keep what fills it.
    async fn end(&mut self, reason: String, ask_app: bool) -> Result<(), CallError> {
        self.log.offer(LogLine::now(LogOrigin::System, format!("MicroVM terminates: {reason}")));
        self.record.vm.state = MicrovmState::Terminating;
        self.record.vm.state_reason = Some(reason);
        self.next = None;
        let saved = save(&self.shared, &self.record).await;
        self.publish(None);
        if self.operation.is_none() {
            self.clear(ask_app);
        } else {
            self.hurry.cancel();
        }
        Ok(saved?)
    }

    fn clear(&mut self, ask_app: bool) {
        let running = self.running.take();
        self.operation = Some(self.operation().begin(|operation| operation.clear(running, ask_app)));
    }

    async fn enter_terminated(&mut self) {
        self.record.vm.state = MicrovmState::Terminated;
        self.record.vm.terminated_at = Some(SystemTime::now());
        self.promised = None;
        self.save_after_the_fact().await;
        self.publish(None);
        self.shared.terminated.notify_one();
        let shared = &self.shared;
        shared.snapshots.release(&shared.store, shared.engine.as_ref(), &self.record.image_id, self.record.number).await;
    }

    fn dialer(&self) -> Option<Arc<dyn Dial>> {
        self.running.as_ref().map(|running| Arc::clone(&running.dialer))
    }

    fn publish(&self, dialer: Option<Arc<dyn Dial>>) {
        self.channels.publish.send_replace(View {
            vm: Arc::new(self.record.vm.clone()),
            wakes: wakes(&self.record),
            failed_wakes: self.failed_wakes,
            dialer,
        });
        self.shared.changes.send_modify(|count| *count += 1);
    }

    /// Records what has already happened. If that fails, a restart finds out by itself: it goes by the files.
    async fn save_after_the_fact(&mut self) {
        if let Err(error) = save(&self.shared, &self.record).await {
            tracing::error!(id = self.record.vm.id, state = ?self.record.vm.state, %error, "a MicroVM's state could not be recorded");
        }
    }
}

/// What the machine says next; never, if there is none or it has said everything. Cancel safe.
async fn next_event(running: &mut Option<Running>) -> MachineEvent {
    let event = match running {
        Some(running) => running.pump.next().await,
        None => None,
    };
    match event {
        Some(event) => event,
        None => std::future::pending().await,
    }
}

/// The operation's outcome; never, if there is none. Cancel safe.
async fn finished(operation: &mut Option<AbortOnDropHandle<Outcome>>) -> Outcome {
    match operation {
        Some(running) => {
            let outcome = running.await;
            *operation = None;
            outcome.unwrap_or_else(|error| {
                tracing::error!(%error, "an operation on a MicroVM broke off");
                Outcome::Broken
            })
        }
        None => std::future::pending().await,
    }
}

async fn save(shared: &Shared, record: &Record) -> Result<(), StoreError> {
    shared.store.save_microvm(&record.vm.id, &records::change(record)).await
}

/// The instant that lies `after` later than a time on the wall.
fn in_future(since: SystemTime, after: Duration) -> Instant {
    let passed = SystemTime::now().duration_since(since).unwrap_or_default();
    Instant::now() + after.saturating_sub(passed)
}
