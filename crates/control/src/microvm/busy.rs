//! Whether a MicroVM works although no byte crosses its endpoint: the extensions of `[activity]`. What it uses is read when the idle timer is
//! set anew and when it fires, so that a window is never longer than the idle time, and nothing is counted in between.

use std::time::Duration;

use hearth_machine::Usage;
use tokio::time::Instant;

use crate::settings::ActivitySettings;

/// Bytes sent in a window that are no work of the application's: what a kernel says to its network of its own accord, and keep-alives.
const NOISE: u64 = 1024;

/// The present window.
#[derive(Debug)]
pub struct Busy {
    settings: ActivitySettings,
    since: Option<(Instant, Usage)>,
}

impl Busy {
    pub fn new(settings: ActivitySettings) -> Self {
        Self { settings, since: None }
    }

    /// Whether it matters what the machine uses.
    pub fn measures(&self) -> bool {
        self.settings.outbound || self.settings.cpu_percent.is_some()
    }

    /// Ends the window and begins the next; tells whether the machine worked in it. What could not be measured is no work.
    pub fn next(&mut self, now: Instant, used: Option<Usage>) -> bool {
        let window = std::mem::replace(&mut self.since, used.map(|used| (now, used)));
        let (Some((since, before)), Some(used)) = (window, used) else { return false };
        let sent = used.sent_bytes.saturating_sub(before.sent_bytes);
        let worked = used.cpu.saturating_sub(before.cpu);
        let enough = |percent: u8| (now - since).mul_f64(f64::from(percent) / 100.0);
        (self.settings.outbound && sent > NOISE)
            || self.settings.cpu_percent.is_some_and(|percent| worked > Duration::ZERO && worked >= enough(percent))
    }

    /// Whether requests that are open are work.
    pub fn counts_requests(&self) -> bool {
        self.settings.open_requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(cpu_ms: u64, sent_bytes: u64) -> Option<Usage> {
        Some(Usage { cpu: Duration::from_millis(cpu_ms), sent_bytes })
    }

    #[test]
    fn work_is_what_was_used_in_the_window() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let both = ActivitySettings { outbound: true, cpu_percent: Some(10), open_requests: false };
        let mut busy = Busy::new(both);
        assert!(!busy.next(start, usage(5_000, 1 << 20)), "what was used before is not work of the window");
        assert!(!busy.next(start + second, usage(5_099, (1 << 20) + NOISE)));
        assert!(busy.next(start + 2 * second, usage(5_199, 1 << 21)), "it sends");
        assert!(busy.next(start + 3 * second, usage(5_299, 1 << 21)), "it computes");
        assert!(!busy.next(start + 4 * second, usage(5_300, 1 << 21)));
        assert!(!busy.next(start + 5 * second, None));
        assert!(!busy.next(start + 6 * second, usage(9_000, 1 << 30)), "there is nothing to compare it with");

        let mut off = Busy::new(ActivitySettings::default());
        off.next(start, usage(0, 0));
        assert!(!off.measures() && !off.next(start + second, usage(1_000, 1 << 30)));
    }
}
