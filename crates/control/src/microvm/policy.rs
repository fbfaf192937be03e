//! What a message means in the present state. Pure: the driver does what this says.

use hearth_guest_protocol::ExitStatus;

use crate::types::MicrovmState;

use super::{Call, SuspendedBy, reason};

/// Something that happened to a MicroVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Someone with the right to asks for it.
    Call(Call),
    /// A request to the endpoint.
    Wake,
    /// No byte crossed the endpoint for as long as the idle policy allows.
    Idle,
    /// It was suspended for as long as the idle policy allows.
    SuspendedTooLong,
    /// It exists for as long as it may.
    LifetimeOver,
    /// The application's main process ended.
    AppExited(ExitStatus),
    /// The machine is gone; nobody asked for that.
    Died(String),
    /// The host stops.
    HostShutdown,
    /// What the driver had begun ended thus.
    Done(Done),
}

/// How an operation of the driver ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    Launched,
    /// With the state reason.
    LaunchFailed(String),
    /// What was suspended is still there. With the state reason.
    ResumeFailed(String),
    Suspended,
    /// The machine runs on.
    SuspendCancelled,
    /// With the state reason.
    SuspendFailed(String),
    /// The machine is killed, the files are deleted.
    Cleared,
}

/// What the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct Situation {
    pub state: MicrovmState,
    /// A request resumes it while it is suspended.
    pub wakes: bool,
    /// Idle means suspended rather than terminated.
    pub sleeps: bool,
    /// The host is stopping.
    pub stopping: bool,
}

/// What follows as soon as the present transition is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Suspend(SuspendedBy),
    Resume,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Nothing,
    /// The call comes too late.
    Refuse,
    /// This, and nothing else, follows the present transition.
    Remember(Option<Next>),
    /// Cancel the suspend if there is still time; if there is not, a resume follows it.
    Cancel,
    /// `SUSPENDED` ─▶ `PENDING`, and launch.
    Resume,
    /// `PENDING` or `SUSPENDING` ─▶ `RUNNING`.
    EnterRunning,
    /// `RUNNING` ─▶ `SUSPENDING`, and suspend.
    Suspend(SuspendedBy),
    /// `SUSPENDING` ─▶ `SUSPENDED`.
    EnterSuspended,
    /// `PENDING` ─▶ `SUSPENDED`, as before the resume, with this state reason.
    ReturnToSuspended(String),
    /// `RUNNING` ─▶ `TERMINATING` with this state reason: ask the app to end, then clear away.
    Stop(String),
    /// ─▶ `TERMINATING` with this state reason, and clear away as soon as nothing else is going on. Hooks that are being called do not count.
    End(String),
    /// Wait for no app any more.
    Hurry,
    /// Kill the machine if there is one, and delete the files.
    Clear,
    /// `TERMINATING` ─▶ `TERMINATED`.
    EnterTerminated,
}

/// Decides what a message means.
pub fn decide(now: Situation, message: Message) -> Decision {
    use MicrovmState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};
    match (now.state, message) {
        (Terminating | Terminated, message) => when_ending(now.state, &message),

        (Running, Message::Call(Call::Terminate)) => Decision::Stop(reason::TERMINATE_CALL.to_owned()),
        (Running, Message::LifetimeOver) => Decision::Stop(reason::LIFETIME_OVER.to_owned()),
        (_, Message::Call(Call::Terminate)) => Decision::End(reason::TERMINATE_CALL.to_owned()),
        (_, Message::LifetimeOver) => Decision::End(reason::LIFETIME_OVER.to_owned()),

        (Pending, Message::Call(Call::Suspend)) => Decision::Remember(Some(Next::Suspend(SuspendedBy::Call))),
        (Pending, Message::Call(Call::Resume)) if !now.stopping => Decision::Remember(None),
        (Pending, Message::HostShutdown) => Decision::Remember(Some(Next::Suspend(SuspendedBy::Host))),
        (Pending, Message::Done(Done::Launched)) => Decision::EnterRunning,
        (Pending, Message::Done(Done::LaunchFailed(reason))) => Decision::End(reason),
        (Pending, Message::Done(Done::ResumeFailed(reason))) => Decision::ReturnToSuspended(reason),

        (Running, Message::Call(Call::Suspend)) => Decision::Suspend(SuspendedBy::Call),
        (Running, Message::Idle) if now.sleeps => Decision::Suspend(SuspendedBy::Idle),
        (Running, Message::Idle) => Decision::Stop(reason::IDLE.to_owned()),
        (Running, Message::HostShutdown) => Decision::Suspend(SuspendedBy::Host),
        (Running, Message::AppExited(status)) => Decision::End(reason::app_exited(status)),
        (Running, Message::Died(what)) => Decision::End(reason::died(&what)),

        // One that has been cancelled may come back running.
        (Suspending, Message::Call(Call::Suspend)) => Decision::Remember(Some(Next::Suspend(SuspendedBy::Call))),
        (Suspending, Message::HostShutdown) => Decision::Remember(Some(Next::Suspend(SuspendedBy::Host))),
        (Suspending, Message::Call(Call::Resume)) if !now.stopping => Decision::Cancel,
        (Suspending, Message::Wake) if now.wakes && !now.stopping => Decision::Cancel,
        (Suspending, Message::Done(Done::Suspended)) => Decision::EnterSuspended,
        (Suspending, Message::Done(Done::SuspendCancelled)) => Decision::EnterRunning,
        (Suspending, Message::Done(Done::SuspendFailed(reason))) => Decision::End(reason),

        (Suspended, Message::Call(Call::Resume)) if !now.stopping => Decision::Resume,
        (Suspended, Message::Wake) if now.wakes && !now.stopping => Decision::Resume,
        (Suspended, Message::SuspendedTooLong) => Decision::End(reason::SUSPENDED_TOO_LONG.to_owned()),

        // Late news, and calls for what is already so.
        _ => Decision::Nothing,
    }
}

fn when_ending(state: MicrovmState, message: &Message) -> Decision {
    match message {
        Message::Call(Call::Suspend | Call::Resume) => Decision::Refuse,
        Message::HostShutdown => Decision::Hurry,
        Message::Done(Done::Cleared) if state == MicrovmState::Terminating => Decision::EnterTerminated,
        Message::Done(_) if state == MicrovmState::Terminating => Decision::Clear,
        _ => Decision::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use MicrovmState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};

    const STATES: [MicrovmState; 6] = [Pending, Running, Suspending, Suspended, Terminating, Terminated];

    fn messages() -> Vec<(&'static str, Message)> {
        vec![
            ("suspend", Message::Call(Call::Suspend)),
            ("resume", Message::Call(Call::Resume)),
            ("terminate", Message::Call(Call::Terminate)),
            ("wake", Message::Wake),
            ("idle", Message::Idle),
            ("too long", Message::SuspendedTooLong),
            ("lifetime", Message::LifetimeOver),
            ("exited", Message::AppExited(ExitStatus { code: 3, out_of_memory: false })),
            ("died", Message::Died("x".to_owned())),
            ("host", Message::HostShutdown),
            ("launched", Message::Done(Done::Launched)),
            ("launch failed", Message::Done(Done::LaunchFailed("l".to_owned()))),
            ("resume failed", Message::Done(Done::ResumeFailed("r".to_owned()))),
            ("suspended", Message::Done(Done::Suspended)),
            ("cancelled", Message::Done(Done::SuspendCancelled)),
            ("suspend failed", Message::Done(Done::SuspendFailed("s".to_owned()))),
            ("cleared", Message::Done(Done::Cleared)),
        ]
    }

    fn situation(state: MicrovmState) -> Situation {
        Situation { state, wakes: true, sleeps: true, stopping: false }
    }

    fn short(decision: &Decision) -> &'static str {
        match decision {
            Decision::Nothing => "-",
            Decision::Refuse => "refuse",
            Decision::Remember(None) => "forget",
            Decision::Remember(Some(Next::Suspend(_))) => "then suspend",
            Decision::Remember(Some(Next::Resume)) => "then resume",
            Decision::Cancel => "cancel",
            Decision::Resume => "resume",
            Decision::EnterRunning => "RUNNING",
            Decision::Suspend(_) => "suspend",
            Decision::EnterSuspended => "SUSPENDED",
            Decision::ReturnToSuspended(_) => "back",
            Decision::Stop(_) => "stop",
            Decision::End(_) => "end",
            Decision::Hurry => "hurry",
            Decision::Clear => "clear",
            Decision::EnterTerminated => "TERMINATED",
        }
    }

    #[test]
    fn every_message_in_every_state() {
        #[rustfmt::skip]
        let expected = [
            //                  PENDING         RUNNING    SUSPENDING     SUSPENDED    TERMINATING   TERMINATED
            ("suspend",        ["then suspend", "suspend", "then suspend", "-",        "refuse",     "refuse"]),
            ("resume",         ["forget",       "-",       "cancel",      "resume",    "refuse",     "refuse"]),
            ("terminate",      ["end",          "stop",    "end",         "end",       "-",          "-"]),
            ("wake",           ["-",            "-",       "cancel",      "resume",    "-",          "-"]),
            ("idle",           ["-",            "suspend", "-",           "-",         "-",          "-"]),
            ("too long",       ["-",            "-",       "-",           "end",       "-",          "-"]),
            ("lifetime",       ["end",          "stop",    "end",         "end",       "-",          "-"]),
            ("exited",         ["-",            "end",     "-",           "-",         "-",          "-"]),
            ("died",           ["-",            "end",     "-",           "-",         "-",          "-"]),
            ("host",           ["then suspend", "suspend", "then suspend", "-",        "hurry",      "hurry"]),
            ("launched",       ["RUNNING",      "-",       "-",           "-",         "clear",      "-"]),
            ("launch failed",  ["end",          "-",       "-",           "-",         "clear",      "-"]),
            ("resume failed",  ["back",         "-",       "-",           "-",         "clear",      "-"]),
            ("suspended",      ["-",            "-",       "SUSPENDED",   "-",         "clear",      "-"]),
            ("cancelled",      ["-",            "-",       "RUNNING",     "-",         "clear",      "-"]),
            ("suspend failed", ["-",            "-",       "end",         "-",         "clear",      "-"]),
            ("cleared",        ["-",            "-",       "-",           "-",         "TERMINATED", "-"]),
        ];
        for ((name, message), (row, decisions)) in messages().into_iter().zip(expected) {
            assert_eq!(name, row);
            for (state, expected) in STATES.into_iter().zip(decisions) {
                assert_eq!(short(&decide(situation(state), message.clone())), expected, "{name} in {state:?}");
            }
        }
    }

    #[test]
    fn a_request_wakes_only_what_may_be_woken() {
        for state in [Suspending, Suspended] {
            let asleep = Situation { wakes: false, ..situation(state) };
            assert_eq!(decide(asleep, Message::Wake), Decision::Nothing);
            assert_ne!(decide(asleep, Message::Call(Call::Resume)), Decision::Nothing, "a call does");
        }
    }

    #[test]
    fn nothing_is_resumed_while_the_host_stops() {
        for state in [Pending, Suspending, Suspended] {
            let stopping = Situation { stopping: true, ..situation(state) };
            for message in [Message::Wake, Message::Call(Call::Resume)] {
                assert_eq!(decide(stopping, message), Decision::Nothing, "{state:?}");
            }
        }
    }

    #[test]
    fn without_a_suspended_duration_idle_terminates() {
        let now = Situation { sleeps: false, ..situation(Running) };
        assert_eq!(decide(now, Message::Idle), Decision::Stop("MicroVM exceeded maximum idle duration.".to_owned()));
        assert_eq!(decide(now, Message::Call(Call::Suspend)), Decision::Suspend(SuspendedBy::Call), "a call suspends all the same");
    }

    #[test]
    fn the_reasons_are_the_service_s() {
        for (message, reason) in
            [(Message::Call(Call::Terminate), "Success."), (Message::LifetimeOver, "MicroVM exceeded maximum lifetime.")]
        {
            assert_eq!(decide(situation(Running), message.clone()), Decision::Stop(reason.to_owned()));
            assert_eq!(decide(situation(Suspended), message), Decision::End(reason.to_owned()), "there is no app to ask");
        }
        let exited = Message::AppExited(ExitStatus { code: 137, out_of_memory: false });
        assert_eq!(decide(situation(Running), exited), Decision::End("Container Stopped with Exit Code: 137".to_owned()));
        let exited = Message::AppExited(ExitStatus { code: 137, out_of_memory: true });
        let Decision::End(reason) = decide(situation(Running), exited) else { panic!("it ends") };
        assert!(reason.starts_with("Container Stopped with Exit Code: 137. The application ran out of memory"), "{reason}");
    }
}
