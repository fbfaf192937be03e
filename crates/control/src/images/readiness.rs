//! When the machine of a build may be captured, for an application without a `/ready` hook: when it listens, and its container has come to rest.
//!
//! ```text
//!                           listens where it should   only on other ports   on no port
//!   at rest                 at once                   after 5 s             after 3 s; 15 s if the image EXPOSEs a port
//!   busy                    after 60 s                at the limit          at the limit, or a failure if the image EXPOSEs a port
//! ```
//!
//! An image that EXPOSEs no port listens where it should on any. The limit is the setting `ready_timeout_seconds`, counted from the start of
//! the application; none of the other times is longer. An application that is busy may be loading: before it listens, only the limit ends the
//! wait. One that sleeps before it listens looks like one that never will, and is given a little time. One that works now and then is never at
//! rest for that long: 30 s of rest altogether are enough.

use std::{collections::BTreeSet, time::Duration};

use hearth_guest_protocol::Activity;
use tokio::time::Instant;

use crate::hooks::iso_8601;

/// How long a container that listens may be busy.
const SETTLE: Duration = Duration::from_secs(60);
/// How long a container must have been at rest that listens, but on no port that its image EXPOSEs, which may come from a base image.
const REST_ELSEWHERE: Duration = Duration::from_secs(5);
/// How long one must have been that listens on no port although its image EXPOSEs some.
const REST_EXPOSED: Duration = Duration::from_secs(15);
/// How long one must have been that listens on no port, and need not.
const REST_UNEXPOSED: Duration = Duration::from_secs(3);
/// How long one that does not listen where it should must have been at rest altogether, if it was never at rest for as long as the above.
const REST_ALTOGETHER: Duration = Duration::from_secs(30);

/// What an application has been seen to do since its start.
#[derive(Debug)]
pub struct Readiness {
    exposed: Vec<u16>,
    limit: Duration,
    started: Instant,
    /// Where it should, and since when.
    listens: Option<(u16, Instant)>,
    elsewhere: BTreeSet<u16>,
    at_rest_since: Option<Instant>,
    /// Rest before that.
    rested: Duration,
}

/// What follows from that.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The machine may be captured. The text says why, for the log.
    Ready(String),
    /// It may not, and will not become ready. The text is the build's state reason.
    Failed(String),
    /// Nothing yet. At this time at the latest something follows, whatever is seen until then.
    Wait(Instant),
}

impl Readiness {
    /// Of an application that starts now. `exposed` are the TCP ports that its image EXPOSEs.
    pub fn new(exposed: &[u16], limit: Duration) -> Self {
        let started = Instant::now();
        let exposed = exposed.to_vec();
        Self { exposed, limit, started, listens: None, elsewhere: BTreeSet::new(), at_rest_since: None, rested: Duration::ZERO }
    }

    /// A port began to listen. Returns what to say of it.
    pub fn listening(&mut self, port: u16) -> String {
        if self.exposed.is_empty() || self.exposed.contains(&port) {
            self.listens.get_or_insert((port, Instant::now()));
            return format!("The application listens on port {port}.");
        }
        self.elsewhere.insert(port);
        format!("The application listens on port {port}, which the image does not EXPOSE.")
    }

    /// The container has come to rest, or is busy again.
    pub fn activity(&mut self, activity: Activity) {
        match activity {
            Activity::AtRest => {
                self.at_rest_since.get_or_insert_with(Instant::now);
            }
            Activity::Busy => self.rested += self.at_rest_since.take().map_or(Duration::ZERO, |since| since.elapsed()),
        }
    }

    /// What follows at this moment.
    pub fn verdict(&self) -> Verdict {
        let now = Instant::now();
        let due = self.due();
        if now < due {
            return Verdict::Wait(due);
        }
        match (self.listens, self.at_rest_since) {
            (Some(_), Some(_)) => Verdict::Ready("The application is at rest.".to_owned()),
            (Some(_), None) => Verdict::Ready(format!(
                "The application listens, but has not come to rest within {}. Its snapshot is taken as it is. {HOOK}",
                iso_8601(self.limit.min(SETTLE))
            )),
            (None, Some(since)) => {
                let rested = (self.rested + (now - since)).as_secs();
                Verdict::Ready(format!("The application has been at rest for {rested} s and listens on {}. {EARLY}", self.missing()))
            }
            (None, None) if !self.exposed.is_empty() && self.elsewhere.is_empty() => {
                let limit = iso_8601(self.limit);
                Verdict::Failed(format!("The application did not accept connections on an exposed port within {limit}."))
            }
            (None, None) => Verdict::Ready(format!(
                "The application has not come to rest within {} and listens on {}. Its snapshot is taken as it is. {HOOK}",
                iso_8601(self.limit),
                self.missing()
            )),
        }
    }

    /// When something follows, if nothing else is seen.
    fn due(&self) -> Instant {
        let limit = self.started + self.limit;
        match (self.listens, self.at_rest_since) {
            (Some(_), Some(since)) => since,
            (Some((_, since)), None) => since + self.limit.min(SETTLE),
            (None, Some(since)) => limit.min(since + self.patience().min(REST_ALTOGETHER.saturating_sub(self.rested))),
            (None, None) => limit,
        }
    }

    /// How long a container must have been at rest that does not listen where it should.
    fn patience(&self) -> Duration {
        if self.exposed.is_empty() {
            REST_UNEXPOSED
        } else if self.elsewhere.is_empty() {
            REST_EXPOSED
        } else {
            REST_ELSEWHERE
        }
    }

    fn missing(&self) -> String {
        if self.exposed.is_empty() {
            return "no port".to_owned();
        }
        let list = |ports: &mut dyn Iterator<Item = &u16>| ports.map(u16::to_string).collect::<Vec<_>>().join(", ");
        let exposed = list(&mut self.exposed.iter());
        match self.elsewhere.is_empty() {
            true => format!("no port, although the image EXPOSEs {exposed}"),
            false => format!("{}, although the image EXPOSEs {exposed}", list(&mut self.elsewhere.iter())),
        }
    }
}

const EARLY: &str = "Its snapshot is taken now. If that is too early, give the image a /ready hook.";
const HOOK: &str = "A /ready hook can say when an application is ready.";

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Lets so many seconds pass, at the end of which it is ready, and not a second before. Returns the reason.
    async fn ready_after(readiness: &Readiness, after: u64) -> String {
        if after > 0 {
            tokio::time::advance(seconds(after - 1)).await;
            let Verdict::Wait(until) = readiness.verdict() else { panic!("{readiness:?} is ready a second early") };
            assert_eq!(until, Instant::now() + seconds(1));
            tokio::time::advance(seconds(1)).await;
        }
        match readiness.verdict() {
            Verdict::Ready(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_listening_and_at_rest_is_ready_at_once() {
        for exposed in [&[][..], &[8080], &[443, 8080]] {
            let mut readiness = Readiness::new(exposed, LIMIT);
            readiness.listening(8080);
            tokio::time::advance(seconds(40)).await;
            assert!(matches!(readiness.verdict(), Verdict::Wait(_)), "it loads");
            readiness.activity(Activity::AtRest);
            ready_after(&readiness, 0).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_at_rest_then_listening_is_ready_at_once() {
        let mut readiness = Readiness::new(&[8080], LIMIT);
        readiness.activity(Activity::AtRest);
        tokio::time::advance(seconds(10)).await;
        assert!(matches!(readiness.verdict(), Verdict::Wait(_)), "it sleeps");
        assert_eq!(readiness.listening(8080), "The application listens on port 8080.");
        ready_after(&readiness, 0).await;
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_listening_and_never_at_rest_is_ready_after_a_minute() {
        let mut readiness = Readiness::new(&[], LIMIT);
        tokio::time::advance(seconds(299)).await;
        readiness.listening(8080);
        readiness.activity(Activity::AtRest);
        readiness.activity(Activity::Busy);
        assert!(ready_after(&readiness, 60).await.contains("has not come to rest within PT1M"));
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_at_rest_without_listener_is_ready_after_seconds() {
        for (exposed, elsewhere, after, says) in [
            (&[][..], None, 3, "listens on no port."),
            (&[80, 81], None, 15, "no port, although the image EXPOSEs 80, 81."),
            (&[80], Some(9000), 5, "9000, although the image EXPOSEs 80."),
        ] {
            let mut readiness = Readiness::new(exposed, LIMIT);
            tokio::time::advance(seconds(100)).await;
            if let Some(port) = elsewhere {
                assert!(readiness.listening(port).contains("does not EXPOSE"));
            }
            readiness.activity(Activity::AtRest);
            readiness.activity(Activity::AtRest);
            let why = ready_after(&readiness, after).await;
            assert!(why.contains(says) && why.contains("/ready hook"), "{why}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_busy_again_waits_for_another_rest() {
        let mut readiness = Readiness::new(&[], LIMIT);
        readiness.activity(Activity::AtRest);
        tokio::time::advance(seconds(2)).await;
        readiness.activity(Activity::Busy);
        tokio::time::advance(seconds(20)).await;
        assert!(matches!(readiness.verdict(), Verdict::Wait(_)));
        readiness.activity(Activity::AtRest);
        ready_after(&readiness, 3).await;
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_of_periodic_worker_is_ready_after_enough_rest_altogether() {
        let mut readiness = Readiness::new(&[80], LIMIT);
        for _ in 0..3 {
            tokio::time::advance(seconds(2)).await;
            readiness.activity(Activity::AtRest);
            tokio::time::advance(seconds(9)).await;
            assert!(matches!(readiness.verdict(), Verdict::Wait(_)));
            readiness.activity(Activity::Busy);
        }
        tokio::time::advance(seconds(2)).await;
        readiness.activity(Activity::AtRest);
        assert!(ready_after(&readiness, 3).await.contains("at rest for 30 s"));
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_busy_without_listener_is_decided_at_the_limit() {
        for (exposed, elsewhere) in [(&[][..], None), (&[80], Some(9000))] {
            let mut readiness = Readiness::new(exposed, LIMIT);
            if let Some(port) = elsewhere {
                readiness.listening(port);
            }
            assert!(ready_after(&readiness, 300).await.contains("within PT5M"));
        }
        let readiness = Readiness::new(&[80], LIMIT);
        tokio::time::advance(LIMIT).await;
        let reason = "The application did not accept connections on an exposed port within PT5M.";
        assert_eq!(readiness.verdict(), Verdict::Failed(reason.to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn verdict_waits_no_longer_than_a_short_limit() {
        let mut readiness = Readiness::new(&[80], seconds(8));
        readiness.activity(Activity::AtRest);
        ready_after(&readiness, 8).await;
        let mut readiness = Readiness::new(&[80], seconds(8));
        readiness.listening(80);
        assert!(ready_after(&readiness, 8).await.contains("within PT8S"));
    }
}
