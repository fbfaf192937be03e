//! Turns of builds: so many run at once, and no account keeps others waiting longer than its share of them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// Hands out turns. A free one goes to the account with the fewest builds that run; of several, to the one that had its last turn longest ago; of
/// an account's, to the one that came first.
#[derive(Debug, Clone)]
pub(crate) struct Turns(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    free: usize,
    /// Those that have builds which run or wait.
    accounts: HashMap<String, Account>,
    /// Turns that were handed out.
    count: u64,
    /// In the order in which they came.
    waiting: Vec<Waiter>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Account {
    /// Builds that run.
    running: usize,
    /// Number of its last turn.
    last: u64,
}

#[derive(Debug)]
struct Waiter {
    account: String,
    give: oneshot::Sender<Turn>,
}

/// A build may run as long as this lives.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Turns,
    account: String,
}

impl Turns {
    /// So many turns at once.
    pub fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(State { free: count.max(1), accounts: HashMap::new(), count: 0, waiting: Vec::new() })))
    }

    /// Waits for a turn. Who stops waiting is out of the queue.
    pub async fn take(&self, account: &str) -> Turn {
        let (give, given) = oneshot::channel();
        {
            let mut state = self.lock();
            // Who comes anew is before those who have had the last turn, and behind those who have waited since.
            let last = state.count.saturating_sub(1);
            state.accounts.entry(account.to_owned()).or_insert(Account { running: 0, last });
            state.waiting.push(Waiter { account: account.to_owned(), give });
        }
        self.hand_out();
        given.await.expect("a waiter is dropped only after it was given its turn, or has gone")
    }

    fn hand_out(&self) {
        while let Some((turn, give)) = self.next() {
            // Given back, a turn is handed out again.
            drop(give.send(turn));
        }
    }

    /// The next turn and whose it is.
    fn next(&self) -> Option<(Turn, oneshot::Sender<Turn>)> {
        let mut state = self.lock();
        let State { free, accounts, count, waiting } = &mut *state;
        waiting.retain(|waiter| !waiter.give.is_closed());
        accounts.retain(|name, account| account.running > 0 || waiting.iter().any(|waiter| waiter.account == *name));
        if *free == 0 {
            return None;
        }
        let standing = |waiter: &Waiter| accounts.get(&waiter.account).copied().unwrap_or_default();
        let (place, _) = waiting.iter().enumerate().min_by_key(|(place, waiter)| (standing(waiter), *place))?;
        let Waiter { account, give } = waiting.remove(place);
        *free -= 1;
        *count += 1;
        let standing = accounts.entry(account.clone()).or_default();
        *standing = Account { running: standing.running + 1, last: *count };
        Some((Turn { turns: self.clone(), account }, give))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut state = self.turns.lock();
            state.free += 1;
            if let Some(account) = state.accounts.get_mut(&self.account) {
                account.running -= 1;
            }
        }
        self.turns.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, future::BoxFuture};

    use super::*;

    fn wait(turns: &Turns, account: &'static str) -> BoxFuture<'static, Turn> {
        let turns = turns.clone();
        let mut waiting = async move { turns.take(account).await }.boxed();
        assert!((&mut waiting).now_or_never().is_none(), "{account} waits");
        waiting
    }

    #[tokio::test]
    async fn account_with_fewest_builds_is_next_and_then_who_came_first() {
        let turns = Turns::new(2);
        let (first, second) = (turns.take("many").await, turns.take("many").await);
        let (mut third, mut fourth, mut other) = (wait(&turns, "many"), wait(&turns, "many"), wait(&turns, "other"));
        drop(first);
        assert!((&mut third).now_or_never().is_none() && (&mut fourth).now_or_never().is_none());
        let other = (&mut other).now_or_never().expect("it has no build that runs");
        drop(second);
        assert!((&mut fourth).now_or_never().is_none());
        let third = (&mut third).now_or_never().expect("it came before the fourth");
        drop((third, other));
        fourth.now_or_never().expect("nobody else waits");
    }

    #[tokio::test]
    async fn accounts_take_turns_at_one_turn_at_a_time() {
        let turns = Turns::new(1);
        let running = turns.take("many").await;
        let mut many = [(); 3].map(|()| wait(&turns, "many"));
        let mut other = wait(&turns, "other");
        drop(running);
        let running = (&mut other).now_or_never().expect("it came last and had no turn yet");
        let mut again = wait(&turns, "other");
        drop(running);
        let running = (&mut many[0]).now_or_never().expect("the other has just had one");
        drop(running);
        let running = (&mut again).now_or_never().expect("this has just had one");
        drop(running);
        let [_, second, third] = many;
        drop(second.now_or_never().expect("nobody else waits"));
        third.now_or_never().expect("nobody else waits");
    }

    #[tokio::test]
    async fn account_that_waits_is_not_overtaken_by_others_that_come_again_and_again() {
        let turns = Turns::new(1);
        let running = turns.take("patient").await;
        let mut patient = wait(&turns, "patient");
        let mut others = [wait(&turns, "b"), wait(&turns, "c")];
        drop(running);
        for round in 0.. {
            if let Some(turn) = (&mut patient).now_or_never() {
                drop(turn);
                break;
            }
            assert!(round < 2, "each of the others has had one");
            let which = usize::from((&mut others[0]).now_or_never().map(drop).is_none());
            others[which] = wait(&turns, ["b", "c"][which]);
        }
    }

    #[tokio::test]
    async fn who_stops_waiting_costs_no_turn() {
        let turns = Turns::new(1);
        let running = turns.take("a").await;
        let (left, given, last) = (wait(&turns, "b"), wait(&turns, "b"), wait(&turns, "b"));
        drop(left);
        drop(running);
        // It has its turn and does not know yet.
        drop(given);
        last.now_or_never().expect("the turn was handed on");
        assert_eq!(turns.lock().free, 1);
        assert!(turns.lock().waiting.is_empty());
    }
}
