//! Rate limits: bytes and operations per second, for one disk or for a group of them, changeable while they work.
//!
//! Each operation takes the next position on a line that is as long as all operations so far, in bytes or operations. A
//! budget grows along that line at the asked rate, and an operation may begin when the budget has reached its position
//! (the generic cell rate algorithm, counted in positions instead of times). So an operation is never split: a long
//! one begins with the least budget and the next one waits the longer. Numbers are whole, so that nothing drifts, and
//! late timers lose nothing, because the budget grows meanwhile. A disk that does nothing saves up a burst at most.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use crate::runtime::Runtime;

const NANOS: u128 = 1_000_000_000;

/// A rate, in bytes or operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many per second, at least 1.
    pub per_second: u64,
    /// How many may follow each other at once after a rest. At least what the rate makes in 10 ms, so that late timers
    /// lose nothing.
    pub burst: u64,
}

impl Rate {
    /// A rate with the burst that a tenth of a second makes.
    pub fn per_second(per_second: u64) -> Self {
        Self {
            per_second: per_second.max(1),
            burst: per_second / 10,
        }
    }

    fn burst_in_use(&self) -> u128 {
        u128::from(self.burst.max(self.per_second / 100))
    }
}

/// What is limited. Both hold at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes read and written; discarding and zeroing count as operations only.
    pub bytes: Option<Rate>,
    /// Operations of any kind but flushes.
    pub operations: Option<Rate>,
}

/// The budget of one rate.
#[derive(Clone, Copy, Debug)]
struct Budget {
    rate: Option<Rate>,
    /// The budget was `base` at `origin`.
    origin: Instant,
    base: u128,
    /// Where the line ends.
    taken: u128,
}

impl Budget {
    fn new(rate: Option<Rate>, now: Instant) -> Self {
        Self {
            rate,
            origin: now,
            base: rate.map_or(0, |rate| rate.burst_in_use()),
            taken: 0,
        }
    }

    fn at(&self, now: Instant) -> u128 {
        let Some(rate) = self.rate else {
            return self.base;
        };
        let elapsed = now.saturating_duration_since(self.origin).as_nanos();
        self.base + elapsed.saturating_mul(u128::from(rate.per_second)) / NANOS
    }

    /// Takes a position.
    fn take(&mut self, cost: u64, now: Instant) -> u128 {
        if let Some(rate) = self.rate {
            let most = self.taken + rate.burst_in_use();
            if self.at(now) > most {
                self.base = most;
                self.origin = now;
            }
        }
        let position = self.taken;
        self.taken += u128::from(cost);
        position
    }

    /// How long until the budget reaches `position`; `None` if it has.
    fn wait(&self, position: u128, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        if self.at(now) >= position {
            return None;
        }
        let nanos = (position.saturating_sub(self.base) * NANOS)
            .div_ceil(u128::from(rate.per_second.max(1)));
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        let due = self.origin.checked_add(Duration::from_nanos(nanos));
        let left = due.map(|due| due.saturating_duration_since(now));
        // Rounding may say zero; a nanosecond later it is true.
        Some(left.unwrap_or(Duration::MAX).max(Duration::from_nanos(1)))
    }

    /// What is left of the budget, or by how much it is overdrawn.
    fn credit(&self, now: Instant) -> i64 {
        let Some(rate) = self.rate else {
            return 0;
        };
        let reached = self.at(now).min(self.taken + rate.burst_in_use());
        let whole = |n: u128| i64::try_from(n).unwrap_or(i64::MAX);
        match reached.checked_sub(self.taken) {
            Some(left) => whole(left),
            None => -whole(self.taken - reached),
        }
    }

    /// A budget with so much left, at most the burst.
    fn with_credit(rate: Option<Rate>, credit: i64, now: Instant) -> Self {
        let burst = rate.map_or(0, |rate| rate.burst_in_use());
        let amount = u128::from(credit.unsigned_abs());
        let (base, taken) = if credit < 0 {
            (0, amount)
        } else {
            (amount.min(burst), 0)
        };
        Self {
            rate,
            origin: now,
            base,
            taken,
        }
    }

    fn set(&mut self, rate: Option<Rate>, now: Instant) {
        let reached = self.at(now);
        *self = match (self.rate, rate) {
            // Who waits, waits at the new rate from here on.
            (Some(_), Some(rate)) => Self {
                rate: Some(rate),
                origin: now,
                base: reached.min(self.taken + rate.burst_in_use()),
                taken: self.taken,
            },
            (_, rate) => Self {
                base: self.taken + rate.map_or(0, |rate| rate.burst_in_use()),
                rate,
                origin: now,
                taken: self.taken,
            },
        };
    }
}

struct State {
    bytes: Budget,
    operations: Budget,
    next: u64,
    waiting: HashMap<u64, Waker>,
}

impl State {
    fn wait(&self, at: (u128, u128), now: Instant) -> Option<Duration> {
        let bytes = self.bytes.wait(at.0, now);
        bytes.max(self.operations.wait(at.1, now))
    }
}

/// A limit as it is saved with a machine: a guest gains nothing by being saved and restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitState {
    /// What is limited.
    pub limits: Limits,
    /// How many bytes may follow at once; negative: how many were taken in advance.
    pub bytes: i64,
    /// The same of operations.
    pub operations: i64,
}

/// A limit that one disk or several share. Clones are the same limit.
#[derive(Clone)]
pub struct RateLimit {
    state: Arc<Mutex<State>>,
}

impl RateLimit {
    /// A limit, with its burst saved up.
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        Self {
            state: Arc::new(Mutex::new(State {
                bytes: Budget::new(limits.bytes, now),
                operations: Budget::new(limits.operations, now),
                next: 0,
                waiting: HashMap::new(),
            })),
        }
    }

    /// The limit as it is now. Operations that wait are not in it: what is saved with them under way takes its place again.
    pub fn save(&self) -> LimitState {
        let state = self.state();
        let now = Instant::now();
        LimitState {
            limits: Limits {
                bytes: state.bytes.rate,
                operations: state.operations.rate,
            },
            bytes: state.bytes.credit(now),
            operations: state.operations.credit(now),
        }
    }

    /// A limit that goes on where another was saved. Any state is taken; none gives more than one burst at once.
    pub fn restore(saved: &LimitState) -> Self {
        let now = Instant::now();
        let (bytes, operations) = (saved.limits.bytes, saved.limits.operations);
        let limit = Self::new(saved.limits);
        {
            let mut state = limit.state();
            state.bytes = Budget::with_credit(bytes, saved.bytes, now);
            state.operations = Budget::with_credit(operations, saved.operations, now);
        }
        limit
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the limit, also for who waits already.
    pub fn set(&self, limits: Limits) {
        let wakers: Vec<Waker> = {
            let mut state = self.state();
            let now = Instant::now();
            state.bytes.set(limits.bytes, now);
            state.operations.set(limits.operations, now);
            state.waiting.drain().map(|(_, waker)| waker).collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }

    /// Waits until an operation of `bytes` bytes may begin. The order is that of the first polls.
    pub async fn pass(&self, runtime: &Runtime, bytes: u64) {
        let (id, at) = {
            let mut state = self.state();
            let now = Instant::now();
            let at = (state.bytes.take(bytes, now), state.operations.take(1, now));
            if state.wait(at, now).is_none() {
                return;
            }
            state.next += 1;
            (state.next, at)
        };
        loop {
            let now = Instant::now();
            let left = self.state().wait(at, now);
            let Some(left) = left else {
                break;
            };
            // A change of the limit may come sooner than any wait for a rate of almost nothing ends.
            let until = now + left.min(Duration::from_secs(3600));
            let mut timer = Box::pin(runtime.sleep_until(until));
            let mut armed = false;
            poll_fn(|cx| {
                self.state().waiting.insert(id, cx.waker().clone());
                let due = timer.as_mut().poll(cx).is_ready();
                let again = std::mem::replace(&mut armed, true);
                if due || again {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
        }
        self.state().waiting.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    /// Runs operations of `cost` that begin as soon as they may, `late` after that; how much passed in ten seconds.
    fn passed(rate: Option<Rate>, cost: u64, late: Duration) -> u64 {
        let start = Instant::now();
        let mut budget = Budget::new(rate, start);
        let (mut now, mut sum) = (start, 0);
        while now < start + Duration::from_secs(10) {
            let position = budget.take(cost, now);
            if let Some(left) = budget.wait(position, now) {
                now += left + late;
                assert_eq!(budget.wait(position, now), None);
            }
            sum += cost;
        }
        sum
    }

    #[test]
    fn any_rate_is_held_within_three_percent() {
        for per_second in [1, 7, 100, 4096, 1_000_003, 5 << 30] {
            for cost in [1, 512, 65_536] {
                if cost > per_second || per_second / cost > 200_000 {
                    continue;
                }
                for late in [0, 1_000, 200_000] {
                    let late = Duration::from_nanos(late);
                    let sum = passed(rate(per_second, 0), cost, late);
                    let burst = per_second / 100 + cost;
                    let asked = per_second * 10;
                    assert!(
                        sum * 100 >= asked * 97 && sum * 100 <= asked * 103 + burst * 100,
                        "{sum} of {asked} at {cost}, {late:?} late"
                    );
                }
            }
        }
    }

    #[test]
    fn a_rest_saves_up_one_burst() {
        let start = Instant::now();
        let mut budget = Budget::new(rate(1000, 50), start);
        let later = start + Duration::from_secs(3600);
        let at_once = (0..)
            .take_while(|_| {
                let position = budget.take(1, later);
                budget.wait(position, later).is_none()
            })
            .count();
        assert_eq!(at_once, 51);
    }

    #[test]
    fn a_new_rate_holds_for_who_waits() {
        let start = Instant::now();
        let mut budget = Budget::new(rate(10, 0), start);
        budget.take(100, start);
        let position = budget.take(1, start);
        assert_eq!(budget.wait(position, start), Some(Duration::from_secs(10)));
        budget.set(rate(1000, 0), start + Duration::from_secs(5));
        let now = start + Duration::from_secs(5);
        assert_eq!(budget.wait(position, now), Some(Duration::from_millis(50)));
        budget.set(None, now);
        assert_eq!(budget.wait(position, now), None);
        budget.set(rate(10, 0), now);
        assert_eq!(budget.wait(position, now), None);
    }

    #[test]
    fn a_saved_budget_goes_on_where_it_was() {
        let start = Instant::now();
        let mut budget = Budget::new(rate(1000, 50), start);
        assert_eq!(budget.credit(start), 50);
        budget.take(80, start);
        assert_eq!(budget.credit(start), -30);
        let later = start + Duration::from_secs(100);
        let mut restored = Budget::with_credit(rate(1000, 50), budget.credit(start), later);
        let position = restored.take(1, later);
        assert_eq!(
            restored.wait(position, later),
            Some(Duration::from_millis(30))
        );
        // Nobody gets more than a burst, whatever a file says.
        for credit in [i64::MAX, 51, 50] {
            let budget = Budget::with_credit(rate(1000, 50), credit, later);
            assert_eq!(budget.credit(later), 50);
        }
        let budget = Budget::with_credit(rate(1000, 50), i64::MIN, later);
        assert_eq!(budget.credit(later), -i64::MAX);
        let limit = RateLimit::restore(&LimitState {
            limits: Limits {
                bytes: rate(1, 10),
                operations: None,
            },
            bytes: -5000,
            operations: 7,
        });
        let again = limit.save();
        assert!(
            (-5000..-4000).contains(&again.bytes) && again.operations == 0,
            "{again:?}"
        );
    }

    #[test]
    fn numbers_do_not_overflow() {
        let start = Instant::now();
        let mut budget = Budget::new(rate(u64::MAX, u64::MAX), start);
        for _ in 0..4 {
            budget.take(u64::MAX, start);
        }
        let far = start + Duration::from_secs(1 << 32);
        let position = budget.take(u64::MAX, far);
        assert!(budget.wait(position, far).is_none());
        let mut slow = Budget::new(rate(1, 0), start);
        slow.take(u64::MAX, start);
        let position = slow.take(1, start);
        assert!(slow.wait(position, start).is_some());
    }
}
