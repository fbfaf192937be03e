//! How much one MicroVM's endpoint may be used: connections at once, requests in a second, bytes in a second (SPEC 10.4). All of them grow
//! with the MicroVM's memory, as AWS's do.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use hearth_control::plane::Admission;
use tokio::time::{Instant, Sleep, sleep};

/// What a MicroVM may use for each GiB of memory that its image asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Connections of clients at once, however many streams each carries. 16384; AWS has 16.
    pub connections_per_gib: u32,
    /// Requests in a second, and as many at once after a quiet one. No limit; AWS has 20.
    pub requests_per_second_per_gib: Option<u32>,
    /// Bytes in a second, both directions together. No limit; AWS has 2 MB.
    pub bytes_per_second_per_gib: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections_per_gib: 16_384, requests_per_second_per_gib: None, bytes_per_second_per_gib: None }
    }
}

/// Use of a MicroVM's endpoint is at its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Rate limit exceeded")]
pub(crate) struct Exceeded;

/// How long the use of a MicroVM without connections is remembered: no bucket takes longer to fill.
const MEMORY: Duration = Duration::from_secs(2);

/// Everyone's use.
pub(crate) struct Limiter {
    limits: Limits,
    used: Mutex<HashMap<String, Arc<Usage>>>,
}

impl Limiter {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, used: Mutex::default() }
    }

    /// Counts a request, and the connection that it came by if it is the first one there for its MicroVM.
    pub(crate) fn admit(&self, admission: &Admission, slots: &Slots) -> Result<Option<Pace>, Exceeded> {
        let mut slots = slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = match slots.iter().find(|slot| slot.microvm_id == admission.microvm_id) {
            Some(slot) => Arc::clone(&slot.usage),
            None => {
                let usage = self.usage(admission);
                slots.push(Slot::take(admission, Arc::clone(&usage))?);
                usage
            }
        };
        if let Some(requests) = &usage.requests {
            requests.take()?;
        }
        Ok(usage.bytes.clone().map(Pace::new))
    }

    fn usage(&self, admission: &Admission) -> Arc<Usage> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(usage) = used.get(&admission.microvm_id) {
            return Arc::clone(usage);
        }
        used.retain(|_, usage| Arc::strong_count(usage) > 1 || usage.is_recent());
        let usage = Arc::new(Usage::new(&self.limits, admission.memory_mib));
        used.insert(admission.microvm_id.clone(), Arc::clone(&usage));
        usage
    }
}

/// The MicroVMs that the requests of one connection were for. Nearly always one: clients share a connection between names only if a
/// certificate has both.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<Vec<Slot>>);

/// A connection's place among those of a MicroVM, until it is dropped.
#[derive(Debug)]
struct Slot {
    microvm_id: String,
    usage: Arc<Usage>,
}

impl Slot {
    fn take(admission: &Admission, usage: Arc<Usage>) -> Result<Self, Exceeded> {
        let mut connections = usage.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.open >= usage.most_connections {
            return Err(Exceeded);
        }
        connections.open += 1;
        drop(connections);
        Ok(Self { microvm_id: admission.microvm_id.clone(), usage })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connections = self.usage.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.open -= 1;
        connections.last = Instant::now();
    }
}

/// The use of one MicroVM's endpoint.
#[derive(Debug)]
struct Usage {
    most_connections: u32,
    connections: Mutex<Connections>,
    requests: Option<Bucket>,
    bytes: Option<Arc<Bucket>>,
}

#[derive(Debug)]
struct Connections {
    open: u32,
    /// When the last one ended.
    last: Instant,
}

impl Usage {
    fn new(limits: &Limits, memory_mib: u32) -> Self {
        let gib = f64::from(memory_mib) / 1024.0;
        // Whatever the size, something gets through.
        let scaled = |per_gib: f64| (per_gib * gib).max(1.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at least 1; a float's conversion saturates")]
        let most_connections = scaled(limits.connections_per_gib.into()) as u32;
        #[expect(clippy::cast_precision_loss, reason = "a rate in bytes; 2^53 of them in a second is no limit")]
        let bytes = limits.bytes_per_second_per_gib.map(|bytes| Arc::new(Bucket::new(scaled(bytes as f64))));
        Self {
            most_connections,
            connections: Mutex::new(Connections { open: 0, last: Instant::now() }),
            requests: limits.requests_per_second_per_gib.map(|requests| Bucket::new(scaled(requests.into()))),
            bytes,
        }
    }

    fn is_recent(&self) -> bool {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).last.elapsed() < MEMORY
    }
}

/// Fills at a rate, and holds what comes in a second.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(per_second: f64) -> Self {
        Self { per_second, level: Mutex::new((per_second, Instant::now())) }
    }

    /// Takes one, if there is one.
    fn take(&self) -> Result<(), Exceeded> {
        self.change(|level| {
            let enough = *level >= 1.0;
            if enough {
                *level -= 1.0;
            }
            if enough { Ok(()) } else { Err(Exceeded) }
        })
    }

    /// Takes many, on credit if need be.
    #[expect(clippy::cast_precision_loss, reason = "the size of a buffer")]
    fn spend(&self, count: usize) {
        self.change(|level| *level -= count as f64);
    }

    /// How long until nothing is owed.
    fn debt(&self) -> Duration {
        self.change(|level| Duration::from_secs_f64((-*level / self.per_second).max(0.0)))
    }

    fn change<T>(&self, change: impl FnOnce(&mut f64) -> T) -> T {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        level.0 = (level.0 + (now - level.1).as_secs_f64() * self.per_second).min(self.per_second);
        level.1 = now;
        change(&mut level.0)
    }
}

/// Keeps one stream to its MicroVM's bytes in a second.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes: Arc<Bucket>,
    /// For reads and for writes, which may be polled by different tasks.
    rest: [Option<Pin<Box<Sleep>>>; 2],
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    In = 0,
    Out = 1,
}

impl Clone for Pace {
    /// Another stream of the same MicroVM.
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.bytes))
    }
}

impl Pace {
    fn new(bytes: Arc<Bucket>) -> Self {
        Self { bytes, rest: [None, None] }
    }

    /// Ready when bytes may move.
    pub(crate) fn poll_ready(&mut self, way: Way, cx: &mut Context<'_>) -> Poll<()> {
        let rest = &mut self.rest[way as usize];
        loop {
            if let Some(sleep) = rest {
                ready!(sleep.as_mut().poll(cx));
                *rest = None;
            }
            let debt = self.bytes.debt();
            if debt.is_zero() {
                return Poll::Ready(());
            }
            *rest = Some(Box::pin(sleep(debt)));
        }
    }

    pub(crate) fn moved(&self, bytes: usize) {
        self.bytes.spend(bytes);
    }
}

#[cfg(test)]
mod tests {
    use hearth_control::{plane::Activity, token::TokenKind};
    use tokio::time::advance;

    use super::*;

    fn admission(id: &str, memory_mib: u32) -> Admission {
        let activity = Arc::new(Activity::default());
        Admission { microvm_id: id.to_owned(), kind: TokenKind::Http, port: 8080, memory_mib, activity }
    }

    #[tokio::test(start_paused = true)]
    async fn connections_are_counted_once_for_each_microvm_until_they_end() {
        let limiter = Limiter::new(Limits { connections_per_gib: 4, ..Limits::default() });
        let small = admission("small", 512);
        let connections: Vec<Slots> = (0..3).map(|_| Slots::default()).collect();
        for _ in 0..5 {
            limiter.admit(&small, &connections[0]).unwrap();
        }
        limiter.admit(&small, &connections[1]).unwrap();
        assert_eq!(limiter.admit(&small, &connections[2]).unwrap_err(), Exceeded);
        limiter.admit(&admission("other", 512), &connections[2]).unwrap();
        drop(connections);
        limiter.admit(&small, &Slots::default()).unwrap();

        let large = admission("large", 8192);
        let taken: Vec<Slots> = (0..32).map(|_| Slots::default()).collect();
        assert!(taken.iter().all(|slots| limiter.admit(&large, slots).is_ok()));
        assert!(limiter.admit(&large, &Slots::default()).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_counted_across_connections() {
        let limiter = Limiter::new(Limits { requests_per_second_per_gib: Some(4), ..Limits::default() });
        let request = || limiter.admit(&admission("vm", 512), &Slots::default()).map(drop);
        assert_eq!([request(), request(), request()], [Ok(()), Ok(()), Err(Exceeded)]);
        advance(Duration::from_millis(500)).await;
        assert_eq!([request(), request()], [Ok(()), Err(Exceeded)]);
        advance(Duration::from_secs(60)).await;
        limiter.admit(&admission("another", 512), &Slots::default()).unwrap();
        assert_eq!(limiter.used.lock().unwrap().len(), 1, "who is long gone is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_beyond_the_rate_are_waited_for() {
        let limiter = Limiter::new(Limits { bytes_per_second_per_gib: Some(2_000), ..Limits::default() });
        let slots = Slots::default();
        let mut one = limiter.admit(&admission("vm", 512), &slots).unwrap().unwrap();
        let mut two = limiter.admit(&admission("vm", 512), &slots).unwrap().unwrap();
        let started = Instant::now();
        let ready = async |pace: &mut Pace, way| std::future::poll_fn(|cx| pace.poll_ready(way, cx)).await;
        ready(&mut one, Way::In).await;
        one.moved(4_000);
        ready(&mut two, Way::Out).await;
        assert_eq!(started.elapsed().as_secs(), 3, "a second's worth is there at once, the rest comes at 1000 in a second");
        ready(&mut one, Way::In).await;
        assert_eq!(started.elapsed().as_secs(), 3);
    }
}
