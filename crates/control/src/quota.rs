//! What an account may have and how often it may call, in each region (SPEC section 14).
//!
//! Amounts are checked by the store in the transaction that would exceed them. Rates are kept here, in memory: a bucket of calls for each kind
//! of call, which fills at the rate and holds the burst. A restart fills all of them.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::time::Instant;

use crate::{error::ControlError, types::Caller};

/// Peak memory of a MicroVM as a multiple of what its image asks for (SPEC 6.3).
const PEAK: u32 = 4;

/// What one account may have and do in one region.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quotas {
    /// Memory of all MicroVMs that are not terminated and of all builds that run, in MiB. Nothing more is run once it is reached.
    pub allocated_memory_mib: u64,
    /// How much of it a MicroVM takes.
    pub memory_accounting: MemoryAccounting,
    /// Images.
    pub images: u32,
    /// Versions of an image.
    pub versions_per_image: u32,
    /// Network connectors.
    pub connectors: u32,
    /// Calls of RunMicrovm.
    pub run: Rate,
    /// Calls of SuspendMicrovm.
    pub suspend: Rate,
    /// Calls of ResumeMicrovm.
    pub resume: Rate,
    /// Calls of TerminateMicrovm.
    pub terminate: Rate,
    /// Calls of GetMicrovm.
    pub get: Rate,
    /// Calls of CreateMicrovmAuthToken.
    pub auth_token: Rate,
    /// Calls of CreateMicrovmShellAuthToken.
    pub shell_token: Rate,
}

/// How the memory of a MicroVM is counted, whatever its guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryAccounting {
    /// As much as its image asks for.
    Baseline,
    /// Four times that, which is what AWS counts.
    Peak,
}

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Calls in a second, in the long run; above 0.
    pub per_second: f64,
    /// Calls at once after a quiet time; at least 1.
    pub burst: u32,
}

impl Default for Quotas {
    /// AWS's amounts where it has them, and rates that one machine's user does not meet.
    fn default() -> Self {
        let rate = |per_second, burst| Rate { per_second, burst };
        Self {
            allocated_memory_mib: 400 * 1024,
            memory_accounting: MemoryAccounting::Baseline,
            images: 100,
            versions_per_image: 50,
            connectors: 100,
            run: rate(50.0, 100),
            suspend: rate(50.0, 100),
            resume: rate(50.0, 100),
            terminate: rate(100.0, 200),
            get: rate(10_000.0, 20_000),
            auth_token: rate(1_000.0, 2_000),
            shell_token: rate(100.0, 200),
        }
    }
}

impl MemoryAccounting {
    /// What a MicroVM of this size counts for, in MiB.
    pub(crate) fn count(self, memory_mib: u32) -> u32 {
        match self {
            Self::Baseline => memory_mib,
            Self::Peak => memory_mib.saturating_mul(PEAK),
        }
    }
}

/// Kinds of calls that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Counted {
    Run,
    Suspend,
    Resume,
    Terminate,
    Get,
    AuthToken,
    ShellToken,
}

impl Quotas {
    fn rate(&self, of: Counted) -> Rate {
        match of {
            Counted::Run => self.run,
            Counted::Suspend => self.suspend,
            Counted::Resume => self.resume,
            Counted::Terminate => self.terminate,
            Counted::Get => self.get,
            Counted::AuthToken => self.auth_token,
            Counted::ShellToken => self.shell_token,
        }
    }
}

/// Everyone's buckets.
pub(crate) struct Throttle {
    quotas: Quotas,
    buckets: Mutex<HashMap<Key, Bucket>>,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    account: String,
    region: String,
    counted: Counted,
}

struct Bucket {
    calls: f64,
    filled: Instant,
}

impl Throttle {
    pub fn new(quotas: Quotas) -> Self {
        Self { quotas, buckets: Mutex::default() }
    }

    /// Takes a call out of the caller's bucket, or says when there will be one.
    pub fn admit(&self, caller: &Caller, counted: Counted) -> Result<(), ControlError> {
        let rate = self.quotas.rate(counted);
        let now = Instant::now();
        let key = Key { account: caller.account.clone(), region: caller.region.clone(), counted };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = buckets.entry(key).or_insert_with(|| Bucket { calls: f64::from(rate.burst), filled: now });
        bucket.calls = (bucket.calls + (now - bucket.filled).as_secs_f64() * rate.per_second).min(f64::from(rate.burst));
        bucket.filled = now;
        if bucket.calls >= 1.0 {
            bucket.calls -= 1.0;
            return Ok(());
        }
        // Whole seconds, because that is what the header has.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "above 0; a float's conversion saturates")]
        let retry_after_seconds = ((1.0 - bucket.calls) / rate.per_second).ceil() as u64;
        Err(ControlError::Throttled { retry_after_seconds })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn caller(account: &str, region: &str) -> Caller {
        Caller { account: account.to_owned(), region: region.to_owned(), principal: String::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_through_and_then_the_rate() {
        let quotas = Quotas { run: Rate { per_second: 0.5, burst: 3 }, ..Quotas::default() };
        let throttle = Throttle::new(quotas);
        let run = || throttle.admit(&caller("000000000000", "us-east-1"), Counted::Run);
        for _ in 0..3 {
            run().unwrap();
        }
        assert!(matches!(run(), Err(ControlError::Throttled { retry_after_seconds: 2 })));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(matches!(run(), Err(ControlError::Throttled { retry_after_seconds: 1 })), "a refused call costs nothing");
        tokio::time::advance(Duration::from_secs(1)).await;
        run().unwrap();
        run().unwrap_err();
        tokio::time::advance(Duration::from_secs(3600)).await;
        for _ in 0..3 {
            run().unwrap();
        }
        run().unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn accounts_regions_and_calls_have_their_own() {
        let one = Rate { per_second: 1.0, burst: 1 };
        let throttle = Throttle::new(Quotas { run: one, suspend: one, ..Quotas::default() });
        let us = caller("000000000000", "us-east-1");
        throttle.admit(&us, Counted::Run).unwrap();
        throttle.admit(&us, Counted::Run).unwrap_err();
        throttle.admit(&us, Counted::Suspend).unwrap();
        throttle.admit(&caller("000000000000", "eu-west-1"), Counted::Run).unwrap();
        throttle.admit(&caller("111111111111", "us-east-1"), Counted::Run).unwrap();
    }

    #[test]
    fn peak_is_four_times_the_baseline() {
        assert_eq!((MemoryAccounting::Baseline.count(512), MemoryAccounting::Peak.count(512)), (512, 2048));
    }
}
