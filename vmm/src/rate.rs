//! Token buckets: how much a device may do. Whoever is about to do something asks how long to rest first, and pays when it
//! begins; what is paid too much is a debt that the next one waits for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{Flow, Rate};

/// Tokens are counted in parts of a billion, so that what is gained in a nanosecond is a whole number of them.
const PARTS: i128 = 1_000_000_000;
/// A rest is a multiple of this: who waits for less would hardly wait at all, and ask again and again.
const STEP: Duration = Duration::from_millis(1);

/// One flow's bucket.
struct Bucket {
    flow: Flow,
    /// Parts of tokens; below 0 it is in debt.
    level: i128,
}

impl Bucket {
    fn full(flow: Flow) -> Bucket {
        Bucket { flow, level: i128::from(flow.burst) * PARTS }
    }

    fn gain(&mut self, past: Duration) {
        let gained = i128::from(self.flow.per_second).saturating_mul(past.as_nanos() as i128);
        self.level = self.level.saturating_add(gained).min(i128::from(self.flow.burst) * PARTS);
    }

    /// Nanoseconds until there is a token again, or a part of one.
    fn rest(&self) -> u128 {
        let missing = u128::try_from(1 - self.level).unwrap_or(0);
        missing.div_ceil(u128::from(self.flow.per_second))
    }
}

struct State {
    rate: Rate,
    ops: Vec<Bucket>,
    bytes: Vec<Bucket>,
    /// What was gained until then is in the buckets.
    at: Instant,
}

impl State {
    fn gain(&mut self, now: Instant) {
        let past = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.ops.iter_mut().chain(&mut self.bytes).for_each(|bucket| bucket.gain(past));
    }
}

/// Holds what a device does to a [`Rate`]. All of its threads share it.
pub struct Limiter {
    /// There is any flow: without one nobody has to ask for the time, or for the lock.
    limits: AtomicBool,
    state: Mutex<State>,
}

impl Limiter {
    /// With all buckets full `now`.
    pub fn new(rate: &Rate, now: Instant) -> Limiter {
        let state = State { rate: Rate::default(), ops: Vec::new(), bytes: Vec::new(), at: now };
        let limiter = Limiter { limits: AtomicBool::new(false), state: Mutex::new(state) };
        limiter.set(rate, now);
        limiter
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds to `rate` from `now` on. Debts stay, and no bucket is filled by that: the same rate again changes nothing.
    pub fn set(&self, rate: &Rate, now: Instant) {
        let mut state = self.lock();
        state.gain(now);
        if state.rate == *rate {
            return;
        }
        let anew = |flows: &[Flow], old: &[Bucket]| {
            let mut buckets: Vec<_> = flows.iter().copied().map(Bucket::full).collect();
            for (bucket, old) in buckets.iter_mut().zip(old) {
                bucket.level = bucket.level.min(old.level);
            }
            buckets
        };
        state.ops = anew(&rate.ops, &state.ops);
        state.bytes = anew(&rate.bytes, &state.bytes);
        state.rate = rate.clone();
        self.limits.store(*rate != Rate::default(), Ordering::Release);
    }

    /// How long to rest before the next thing is begun; `None`: it may begin.
    pub fn rest(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        if !self.limits.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.lock();
        state.gain(now());
        let rest = state.ops.iter().chain(&state.bytes).map(Bucket::rest).max().unwrap_or(0);
        let steps = rest.div_ceil(STEP.as_nanos());
        (steps > 0).then(|| STEP * u32::try_from(steps).unwrap_or(u32::MAX))
    }

    /// Takes what is begun out of the buckets.
    pub fn charge(&self, ops: u64, bytes: u64) {
        if !self.limits.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.lock();
        let take = |buckets: &mut [Bucket], tokens: u64| {
            let tokens = i128::from(tokens) * PARTS;
            buckets.iter_mut().for_each(|bucket| bucket.level = bucket.level.saturating_sub(tokens));
        };
        take(&mut state.ops, ops);
        take(&mut state.bytes, bytes);
    }
}

impl Default for Limiter {
    /// Without a limit.
    fn default() -> Limiter {
        Limiter::new(&Rate::default(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(per_second: u64, burst: u64) -> Flow {
        Flow { per_second, burst }
    }

    /// A clock that stands still but for rests.
    struct Clock {
        start: Instant,
        now: Instant,
    }

    impl Clock {
        fn new() -> Clock {
            let start = Instant::now();
            Clock { start, now: start }
        }

        /// Does something so often, and returns how many milliseconds have passed since the beginning.
        fn does(&mut self, limiter: &Limiter, times: u32, ops: u64, bytes: u64) -> u128 {
            for _ in 0..times {
                while let Some(rest) = limiter.rest(|| self.now) {
                    assert!(rest >= STEP && rest.as_nanos().is_multiple_of(STEP.as_nanos()));
                    self.now += rest;
                }
                limiter.charge(ops, bytes);
            }
            self.past()
        }

        fn past(&self) -> u128 {
            self.now.duration_since(self.start).as_millis()
        }
    }

    #[test]
    fn after_the_burst_it_is_as_fast_as_it_may() {
        let mut clock = Clock::new();
        let limiter = Limiter::new(&Rate { ops: vec![flow(100, 10)], bytes: vec![] }, clock.start);
        assert_eq!(clock.does(&limiter, 10, 1, 1 << 40), 0, "the bucket is full, and bytes are not counted");
        // The last of them begins when the first part of its token is there.
        let past = clock.does(&limiter, 1000, 1, 0);
        assert!((9_990..=10_000).contains(&past), "{past}");
        clock.now += Duration::from_secs(3600);
        let idle = clock.past();
        assert_eq!(clock.does(&limiter, 10, 1, 0), idle, "no more than the bucket holds is saved");
        assert!(clock.does(&limiter, 1, 1, 0) > idle);
    }

    #[test]
    fn a_fast_flow_is_held_to_its_rate_in_steps() {
        let mut clock = Clock::new();
        let limiter = Limiter::new(&Rate { ops: vec![flow(16_000, 1_600)], bytes: vec![] }, clock.start);
        let past = clock.does(&limiter, 161_600, 1, 0);
        assert!((9_999..=10_001).contains(&past), "{past}");
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
        let mut clock = Clock::new();
        let limiter = Limiter::new(&Rate { ops: vec![], bytes: vec![flow(1000, 10)] }, clock.start);
        assert_eq!(clock.does(&limiter, 1, 1, 5010), 0);
        let past = clock.does(&limiter, 1, 1, 1);
        assert!((5000..=5001).contains(&past), "{past}");
    }

    #[test]
    fn every_flow_holds() {
        // gp2: credits for a while at 3000, then 300.
        let rate = Rate { ops: vec![flow(300, 27_000), flow(3000, 300)], bytes: vec![] };
        let mut clock = Clock::new();
        let limiter = Limiter::new(&rate, clock.start);
        let past = clock.does(&limiter, 30_000, 1, 0);
        assert!((9_890..=10_001).contains(&past), "{past}");
        let past = clock.does(&limiter, 3000, 1, 0) - past;
        assert!((9_900..=10_001).contains(&past), "{past}");
    }

    #[test]
    fn a_change_holds_at_once_and_fills_nothing() {
        let slow = Rate { ops: vec![flow(10, 10)], bytes: vec![] };
        let mut clock = Clock::new();
        let limiter = Limiter::new(&slow, clock.start);
        clock.does(&limiter, 10, 1, 0);
        for rate in [&slow, &Rate { ops: vec![flow(20, 1000)], bytes: vec![] }, &slow] {
            limiter.set(rate, clock.now);
            assert!(limiter.rest(|| clock.now).is_some());
        }
        limiter.set(&Rate::default(), clock.now);
        assert_eq!(limiter.rest(|| unreachable!("nobody asks for the time")), None);
        let before = clock.past();
        assert_eq!(clock.does(&limiter, 1000, 1, 1 << 30), before);
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing() {
        let mut clock = Clock::new();
        let limiter = Limiter::new(&Rate { ops: vec![flow(1, 1)], bytes: vec![] }, clock.start);
        clock.does(&limiter, 1, 1, 0);
        let later = clock.start + Duration::from_millis(500);
        assert_eq!(limiter.rest(|| later), None, "a part of a token is enough");
        limiter.charge(1, 0);
        let rest = limiter.rest(|| clock.start).unwrap();
        assert_eq!(limiter.rest(|| later), Some(rest));
    }
}
