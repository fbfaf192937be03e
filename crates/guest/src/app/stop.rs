//! Asking the application to end.

use std::{fs, io};

use nix::{libc, unistd::Pid};

/// Sends a main process its stop signal. One that would never see it is killed instead: there is nothing to wait for.
pub fn stop(main: Pid, signal: i32) -> io::Result<()> {
    let status = fs::read_to_string(format!("/proc/{main}/status")).unwrap_or_default();
    let signal = if receives(&status, signal) { signal } else { libc::SIGKILL };
    // SAFETY: takes two numbers and changes nothing in this process. nix has no names for real-time signals, which may be stop signals.
    if unsafe { libc::kill(main.as_raw(), signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a process, by its `/proc/PID/status`, gets a signal. The kernel keeps from the first process of a pid namespace whatever that
/// neither handles nor blocks, to wait for it.
fn receives(status: &str, signal: i32) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let is_init = field("NSpid").and_then(|pids| pids.split_whitespace().last()) == Some("1");
    let has = |name| {
        let set = field(name).and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or(0);
        u32::try_from(signal - 1).is_ok_and(|bit| set.checked_shr(bit).unwrap_or(0) & 1 == 1)
    };
    signal == libc::SIGKILL || !is_init || has("SigCgt") || has("SigBlk")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pids: &str, blocked: u64, caught: u64) -> String {
        format!("Name:\tapp\nNSpid:\t{pids}\nSigBlk:\t{blocked:016x}\nSigIgn:\t0000000000001000\nSigCgt:\t{caught:016x}\n")
    }

    #[test]
    fn an_init_receives_what_it_handles_or_waits_for() {
        let term = 1 << (libc::SIGTERM - 1);
        assert!(receives(&status("57\t1", 0, term), libc::SIGTERM));
        assert!(receives(&status("57\t1", term, 0), libc::SIGTERM));
        assert!(!receives(&status("57\t1", 0, term), libc::SIGINT));
        assert!(!receives(&status("57\t1", 0, 0), libc::SIGTERM));
        assert!(receives(&status("57\t1", 0, 0), libc::SIGKILL));
        // SIGRTMIN+3, which systemd wants; the highest signal there is; one that is none.
        assert!(receives(&status("57\t1", 0, 1 << 36), 37));
        assert!(receives(&status("57\t1", 0, 1 << 63), 64));
        assert!(!receives(&status("57\t1", 0, u64::MAX), 65) && !receives(&status("57\t1", 0, u64::MAX), 0));
    }

    #[test]
    fn any_other_process_receives_everything() {
        assert!(receives(&status("57\t12", 0, 0), libc::SIGTERM));
        assert!(receives(&fs::read_to_string("/proc/self/status").unwrap(), libc::SIGTERM));
    }
}
