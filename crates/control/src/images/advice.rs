//! What a build that failed because its app ended says beside the service's own words (SPEC 2.1): what to do about it.

use hearth_guest_protocol::ExitStatus;

use crate::{architecture::Architecture, microvm::reason};

/// The state reason of a build whose app ended before it was ready.
pub fn app_exited(status: ExitStatus) -> String {
    let reason = reason::app_exited(status);
    match advice(status) {
        Some(advice) => format!("{reason}. {advice}"),
        None => reason,
    }
}

/// Shells end with 126 and 127 for commands that they cannot execute or find.
fn advice(status: ExitStatus) -> Option<String> {
    let host = Architecture::HOST;
    match status {
        ExitStatus { out_of_memory: true, .. } => None,
        ExitStatus { code: 0, .. } => Some(
            "The image's main process must keep running: start the application in the foreground, not as a daemon or in the background."
                .to_owned(),
        ),
        ExitStatus { code: 126, .. } => Some(format!(
            "A command was found and could not be executed: it needs the permission (RUN chmod +x, or COPY --chmod=755), and must be for this \
             host's architecture, {host} ({}).",
            host.platform()
        )),
        ExitStatus { code: 127, .. } => Some("A command was not found: it must be in the image, and in its PATH.".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_exited_begins_with_the_service_s_words_and_says_what_to_do() {
        for (code, part) in [(0, "must keep running"), (126, Architecture::HOST.platform()), (127, "not found")] {
            let reason = app_exited(ExitStatus { code, out_of_memory: false });
            assert!(reason.starts_with(&format!("Container Stopped with Exit Code: {code}. ")) && reason.contains(part), "{reason}");
        }
        assert_eq!(app_exited(ExitStatus { code: 3, out_of_memory: false }), "Container Stopped with Exit Code: 3");
        let lacking = ExitStatus { code: 137, out_of_memory: true };
        assert_eq!(app_exited(lacking), reason::app_exited(lacking));
    }
}
