//! The build hooks (SPEC 6.2): `/ready` says when the machine of a build may be captured, `/validate` whether a clone of the snapshot works.

use std::time::Duration;

use hearth_guest_protocol::HookReply;
use hearth_machine::{Dial, MachineEvent};
use tokio::time::{Instant, timeout_at};

use crate::{
    hooks::{self, Called, Hook, Hooks, iso_8601},
    logs::{LogLine, LogOrigin, LogWriter},
    pump::Pump,
};

use super::advice::app_exited;

/// Pauses between calls of a hook that is not ready yet: from the first to the longest, each twice the one before. There is no event that
/// tells when an app would answer otherwise; a port that begins to listen is one, and ends a pause.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why a build hook did not answer 200.
#[derive(Debug, PartialEq, Eq)]
pub enum CheckError {
    /// The app's doing, as the state reason says it.
    App(String),
    /// Not the app's doing.
    Machine(String),
}

/// Calls of one build hook.
pub struct Check<'a> {
    pub hooks: &'a Hooks,
    pub hook: Hook,
    /// In whose name the hook is called.
    pub endpoint: &'a str,
    pub log: &'a LogWriter,
}

impl Check<'_> {
    /// Calls the hook until it answers 200: again when it answers 503 or nobody listens yet. Anything else fails at once.
    pub async fn pass(&self, dialer: &dyn Dial, pump: &mut Pump, limit: Duration) -> Result<(), CheckError> {
        let deadline = Instant::now() + limit;
        let (mut pause, longest) = PAUSES;
        let mut last_said = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timed_out(limit));
            }
            let called = hooks::call(dialer, pump, self.hooks.build_call(self.hook, left, self.endpoint)).await;
            let not_yet = match hooks::explain(pump, called).await {
                Called::Replied(HookReply::Status(200)) => return Ok(()),
                Called::Replied(HookReply::Status(503)) => "answers 503: not yet.".to_owned(),
                Called::Replied(HookReply::Refused) => format!("cannot be called yet: nothing listens on port {}.", self.hooks.port()),
                Called::Replied(HookReply::TimedOut) => return Err(self.timed_out(limit)),
                Called::Replied(HookReply::Status(status)) => return Err(self.refused(status)),
                Called::Replied(HookReply::Invalid { reason }) => {
                    self.say(format!("The {} hook's answer is not valid: {}", self.hook.name(), hooks::shorten(&reason))).await;
                    return Err(self.failed("the application did not return a valid HTTP response."));
                }
                Called::AppExited(status) => return Err(CheckError::App(app_exited(status))),
                Called::Died(reason) => return Err(CheckError::Machine(reason)),
            };
            if not_yet != last_said {
                self.say(format!("The {} hook {not_yet}", self.hook.name())).await;
                last_said = not_yet;
            }
            self.wait(pump, deadline.min(Instant::now() + pause)).await?;
            pause = longest.min(pause * 2);
        }
    }

    /// Waits until it is worth another call.
    async fn wait(&self, pump: &mut Pump, until: Instant) -> Result<(), CheckError> {
        loop {
            match timeout_at(until, pump.next()).await {
                Err(_elapsed) => return Ok(()),
                Ok(Some(MachineEvent::Listening(port))) if port == self.hooks.port() => return Ok(()),
                Ok(Some(
                    MachineEvent::Listening(_) | MachineEvent::Activity(_) | MachineEvent::DiskFailed { .. } | MachineEvent::Log(_),
                )) => {}
                Ok(Some(MachineEvent::AppExited(status))) => {
                    return Err(CheckError::App(app_exited(status)));
                }
                Ok(Some(MachineEvent::Died { reason })) => return Err(CheckError::Machine(reason)),
                Ok(None) => return Err(CheckError::Machine("the machine's events ended".to_owned())),
            }
        }
    }

    fn timed_out(&self, limit: Duration) -> CheckError {
        CheckError::App(format!("{} hook invocation timed out after {}", self.hook.title(), iso_8601(limit)))
    }

    /// The first two are the service's own words, with the class for the status.
    fn refused(&self, status: u16) -> CheckError {
        match status {
            400..=499 => self.failed("the application returned a client error (HTTP 4xx) response."),
            500..=599 => self.failed("the application returned a server error (HTTP 5xx) response."),
            _ => self.failed(&format!("the application returned an unexpected (HTTP {status}) response.")),
        }
    }

    fn failed(&self, what: &str) -> CheckError {
        CheckError::App(format!("{} hook check failed: {what}", self.hook.title()))
    }

    async fn say(&self, text: String) {
        self.log.append(LogLine::now(LogOrigin::Build, text)).await;
    }
}
