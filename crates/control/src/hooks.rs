//! Lifecycle hooks: which of them an image has, how each is called, and how a call ends (SPEC 8).

use std::time::Duration;

use hearth_guest_protocol::{ExitStatus, HookCall, HookReply};
use hearth_machine::{Dial, HookError, MachineEvent};
use serde_json::Value;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{pump::Pump, types::ImageSpec};

/// How long the machine may take to say that the app, or itself, came to its end while a hook was called.
const EXPLANATION: Duration = Duration::from_secs(2);

/// A hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    Ready,
    Validate,
    Run,
    Suspend,
    Resume,
    Terminate,
}

impl Hook {
    /// As its path ends with it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Validate => "validate",
            Self::Run => "run",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Terminate => "terminate",
        }
    }

    /// As state reasons begin with it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Validate => "Validate",
            Self::Run => "Run",
            Self::Suspend => "Suspend",
            Self::Resume => "Resume",
            Self::Terminate => "Terminate",
        }
    }

    fn group(self) -> &'static str {
        match self {
            Self::Ready | Self::Validate => "microvmImageHooks",
            _ => "microvmHooks",
        }
    }

    /// For a hook that is enabled without a timeout of its own.
    fn default_timeout(self) -> Duration {
        match self {
            Self::Ready => Duration::from_secs(60),
            _ => Duration::from_secs(1),
        }
    }

    fn path(self) -> String {
        format!("/aws/lambda-microvms/runtime/v1/{}", self.name())
    }
}

/// The hooks of an image version: the structure `Hooks` as it was sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Hooks(Option<Value>);

impl Hooks {
    pub fn new(sent: Option<Value>) -> Self {
        Self(sent)
    }

    /// The hooks of an image version.
    pub fn of(spec: &ImageSpec) -> Self {
        Self::new(spec.echoed.get("hooks").cloned())
    }

    /// The structure as it was sent.
    pub fn sent(&self) -> Option<&Value> {
        self.0.as_ref()
    }

    /// How long a hook may take, if it is enabled.
    pub fn timeout(&self, hook: Hook) -> Option<Duration> {
        let group = &self.0.as_ref()?[hook.group()];
        if group[hook.name()] != "ENABLED" {
            return None;
        }
        let own = group[format!("{}TimeoutInSeconds", hook.name())].as_u64();
        Some(own.map_or(hook.default_timeout(), Duration::from_secs))
    }

    /// Where the hook server listens. The API sees to it that an image with an enabled hook has a port.
    pub fn port(&self) -> u16 {
        self.0.as_ref().and_then(|hooks| hooks["port"].as_u64()).and_then(|port| u16::try_from(port).ok()).unwrap_or(0)
    }

    /// A call of a hook that has no body. The app can tell it from a request through the endpoint, which always has an `x-amzn-requestid`.
    pub fn runtime_call(&self, hook: Hook, limit: Duration) -> HookCall {
        self.call(hook, limit, vec![("Host".to_owned(), format!("localhost:{}", self.port()))], Vec::new())
    }

    /// The call of the run hook.
    pub fn run_call(&self, limit: Duration, microvm_id: &str, payload: Option<&str>) -> HookCall {
        let mut body = serde_json::Map::from_iter([("microvmId".to_owned(), microvm_id.into())]);
        if let Some(payload) = payload {
            body.insert("runHookPayload".to_owned(), payload.into());
        }
        let mut call = self.runtime_call(Hook::Run, limit);
        call.headers.push(("Content-Type".to_owned(), "application/json".to_owned()));
        call.body = Value::Object(body).to_string().into_bytes();
        call
    }

    /// A call of a hook during a build, which is made in the name of an endpoint.
    pub fn build_call(&self, hook: Hook, limit: Duration, endpoint: &str) -> HookCall {
        let headers = [("Host", endpoint.to_owned()), ("x-amzn-requestid", Uuid::new_v4().to_string())];
        self.call(hook, limit, headers.map(|(name, value)| (name.to_owned(), value)).to_vec(), Vec::new())
    }

    fn call(&self, hook: Hook, limit: Duration, headers: Vec<(String, String)>, body: Vec<u8>) -> HookCall {
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        HookCall { port: self.port(), path: hook.path(), headers, body, timeout_ms }
    }
}

/// How a call of a hook ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Called {
    Replied(HookReply),
    /// The app's main process ended meanwhile.
    AppExited(ExitStatus),
    /// The machine ended meanwhile.
    Died(String),
}

/// Calls a hook. The end of the app or of the machine ends the call at once. Not cancel safe: events may be lost.
pub(crate) async fn call(dialer: &dyn Dial, pump: &mut Pump, call: HookCall) -> Called {
    let reply = tokio::select! {
        reply = dialer.call_hook(call) => reply,
        end = end(pump) => return end,
    };
    match reply {
        Ok(reply) => Called::Replied(reply),
        Err(HookError::Gone(reason)) => timeout(EXPLANATION, end(pump)).await.unwrap_or(Called::Died(reason)),
    }
}

/// The end of the app, if that is why an answer was broken off: the news of it comes a little later.
pub(crate) async fn explain(pump: &mut Pump, called: Called) -> Called {
    match called {
        Called::Replied(HookReply::Invalid { .. }) => timeout(EXPLANATION, end(pump)).await.unwrap_or(called),
        _ => called,
    }
}

/// Waits for the end of the app or of the machine.
async fn end(pump: &mut Pump) -> Called {
    loop {
        match pump.next().await {
            Some(MachineEvent::AppExited(status)) => return Called::AppExited(status),
            Some(MachineEvent::Died { reason }) => return Called::Died(reason),
            Some(MachineEvent::Listening(_) | MachineEvent::Activity(_) | MachineEvent::Log(_) | MachineEvent::DiskFailed { .. }) => {}
            None => return Called::Died("its events ended".to_owned()),
        }
    }
}

/// What a guest said, for a line of a log.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 200;
    text.chars().take(LONGEST).collect()
}

/// A duration the way the service writes it: `PT5M`, `PT90S` as `PT1M30S`.
pub(crate) fn iso_8601(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let mut text = "PT".to_owned();
    for (amount, unit) in [(seconds / 3600, 'H'), (seconds / 60 % 60, 'M'), (seconds % 60, 'S')] {
        if amount > 0 {
            text.push_str(&amount.to_string());
            text.push(unit);
        }
    }
    if text.len() == 2 { "PT0S".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hooks() -> Hooks {
        Hooks::new(Some(json!({
            "port": 9000,
            "microvmHooks": {"run": "ENABLED", "runTimeoutInSeconds": 10, "suspend": "ENABLED", "resume": "DISABLED", "resumeTimeoutInSeconds": 5},
            "microvmImageHooks": {"ready": "ENABLED"},
        })))
    }

    #[test]
    fn only_enabled_hooks_have_a_timeout() {
        let seconds = |hook| hooks().timeout(hook).map(|timeout| timeout.as_secs());
        assert_eq!([seconds(Hook::Run), seconds(Hook::Suspend), seconds(Hook::Ready)], [Some(10), Some(1), Some(60)]);
        assert_eq!([seconds(Hook::Resume), seconds(Hook::Terminate), seconds(Hook::Validate)], [None; 3]);
        assert_eq!(Hooks::default().timeout(Hook::Run), None);
    }

    #[test]
    fn runtime_hooks_come_from_localhost_and_only_run_has_a_body() {
        let call = hooks().runtime_call(Hook::Suspend, Duration::from_secs(1));
        assert_eq!((call.port, call.path.as_str(), call.timeout_ms), (9000, "/aws/lambda-microvms/runtime/v1/suspend", 1000));
        assert_eq!(call.headers, [("Host".to_owned(), "localhost:9000".to_owned())]);
        assert!(call.body.is_empty());
        let run = |payload| hooks().run_call(Duration::from_secs(1), "microvm-1", payload);
        assert_eq!(run(Some("{}")).headers[1], ("Content-Type".to_owned(), "application/json".to_owned()));
        assert_eq!(run(Some("{\"a\"}")).body, br#"{"microvmId":"microvm-1","runHookPayload":"{\"a\"}"}"#);
        assert_eq!(run(None).body, br#"{"microvmId":"microvm-1"}"#);
    }

    #[test]
    fn build_hooks_come_from_an_endpoint_with_a_request_id() {
        let call = || hooks().build_call(Hook::Validate, Duration::from_secs(1), "x.lambda-microvm.us-east-1.localhost");
        assert_eq!(call().headers[0], ("Host".to_owned(), "x.lambda-microvm.us-east-1.localhost".to_owned()));
        assert_eq!(call().headers[1].0, "x-amzn-requestid");
        assert_ne!(call().headers[1], call().headers[1]);
        assert_eq!((call().headers.len(), call().body.len()), (2, 0));
    }

    #[test]
    fn durations_are_written_as_the_service_does() {
        for (seconds, text) in [(0, "PT0S"), (20, "PT20S"), (90, "PT1M30S"), (300, "PT5M"), (3600, "PT1H")] {
            assert_eq!(iso_8601(Duration::from_secs(seconds)), text);
        }
    }
}
