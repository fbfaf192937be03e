//! State reasons of MicroVMs: the service's own where they are known (SPEC 2.1). They reach callers, so they tell no paths of the host.

use std::time::Duration;

use hearth_guest_protocol::{ExitStatus, HookReply};
use hearth_machine::{LaunchError, SnapshotError, SuspendError};

use crate::hooks::{Hook, iso_8601};

pub const TERMINATE_CALL: &str = "Success.";
pub const LIFETIME_OVER: &str = "MicroVM exceeded maximum lifetime.";
pub const SUSPENDED_TOO_LONG: &str = "MicroVM exceeded maximum suspended duration.";
pub const IDLE: &str = "MicroVM exceeded maximum idle duration.";
pub const NO_CONNECTOR: &str = "The MicroVM could not be launched: its egress network connector cannot be read. The server's log says why.";
/// What a server says of the MicroVMs that ran when an earlier one died.
pub const HOST_STOPPED: &str = "The host stopped while the MicroVM was running.";

pub const BROKEN: &str = "The server failed to launch or suspend the MicroVM: its log says why.";

/// For the log alone: the reason that counts was there before.
pub const HURRIED: &str = "The MicroVM ended while a hook was called.";

/// A runtime hook that did not answer 200. The service's text for a status is known; the others are like it.
pub fn hook_failed(hook: Hook, reply: &HookReply, port: u16, limit: Duration) -> String {
    let what = match reply {
        HookReply::Status(status) => format!("returned HTTP status {status}"),
        HookReply::TimedOut => format!("timed out after {}", iso_8601(limit)),
        HookReply::Refused => format!("could not be called: nothing listens on port {port}"),
        HookReply::Invalid { .. } => "returned no valid HTTP response".to_owned(),
    };
    format!("{} lifecycle hook {what}. Please check your hook endpoint and application logs for more details.", hook.title())
}

pub fn app_exited(status: ExitStatus) -> String {
    let ExitStatus { code, out_of_memory } = status;
    let more = if out_of_memory {
        ". The application ran out of memory, so everything in its container was ended. Give the image more: resources.minimumMemoryInMiB."
    } else {
        ""
    };
    format!("Container Stopped with Exit Code: {code}{more}")
}

pub fn died(what: &str) -> String {
    format!("The MicroVM's machine ended unexpectedly: {what}. Run another one; if it happens again, see the server's log.")
}

pub fn launch_failed(error: &LaunchError) -> String {
    match error {
        LaunchError::Snapshot(SnapshotError::Platform { .. }) => format!("The MicroVM cannot be launched: {error}."),
        LaunchError::Snapshot(_) => {
            "The MicroVM cannot be launched: its state on disk is missing or damaged. Rebuild the image; the server's log says what is wrong."
                .to_owned()
        }
        LaunchError::Guest(error) => format!("The MicroVM could not be launched: {error}."),
        LaunchError::Host { .. } | LaunchError::Monitor(_) => {
            "The MicroVM could not be launched because of its host: the server's log and `hearth doctor` say what is missing.".to_owned()
        }
    }
}

pub fn suspend_failed(error: &SuspendError) -> String {
    match error {
        SuspendError::Host { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            "The MicroVM could not be suspended: the host's disk is full.".to_owned()
        }
        SuspendError::Guest(error) => format!("The MicroVM could not be suspended: {error}."),
        SuspendError::Host { .. } | SuspendError::Monitor(_) => {
            "The MicroVM could not be suspended because of its host: the server's log says why.".to_owned()
        }
    }
}
