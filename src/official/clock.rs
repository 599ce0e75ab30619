//! Where the time of a collective network's requests goes: in queueing them, until they are seen done, and, while none is
//! under way, in NCCL. Three readings of the clock for each request.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The times of one communicator. NCCL uses it from one thread.
#[derive(Default)]
pub struct Clock {
    totals: [AtomicU64; 4],
    /// Requests under way, and when the first of them was queued or the last one was seen done.
    open: AtomicU64,
    since: AtomicU64,
}

/// Those of all communicators of this process.
static PROCESS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Requests, and nanoseconds of queueing, under way, and between the last one done and the next.
pub fn totals() -> [u64; 4] {
    PROCESS.each_ref().map(|total| total.load(Ordering::Relaxed))
}

fn stamp(at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(*START).as_nanos()).unwrap_or(u64::MAX)
}

impl Clock {
    /// At the start of a communicator.
    pub fn new() -> Self {
        let _ = *START;
        Self::default()
    }

    fn add(&self, which: usize, value: u64) {
        self.totals[which].fetch_add(value, Ordering::Relaxed);
        PROCESS[which].fetch_add(value, Ordering::Relaxed);
    }

    /// A request has been queued between these moments.
    pub fn issued(&self, begun: Instant, ended: Instant) {
        let (begun, ended) = (stamp(begun), stamp(ended));
        if self.open.fetch_add(1, Ordering::Relaxed) == 0 {
            let last = self.since.swap(ended, Ordering::Relaxed);
            self.add(3, if last == 0 { 0 } else { begun.saturating_sub(last) });
        }
        self.add(0, 1);
        self.add(1, ended.saturating_sub(begun));
    }

    /// A request is seen done.
    pub fn done(&self, at: Instant) {
        if self.open.fetch_sub(1, Ordering::Relaxed) == 1 {
            let at = stamp(at).max(1);
            self.add(2, at.saturating_sub(self.since.swap(at, Ordering::Relaxed)));
        }
    }

    /// As [`totals`], of this communicator.
    pub fn totals(&self) -> [u64; 4] {
        self.totals.each_ref().map(|total| total.load(Ordering::Relaxed))
    }
}

/// The times for people.
pub struct Text(pub [u64; 4]);

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [requests, issuing, under_way, between] = self.0;
        let mean = |total: u64| total as f64 / 1e3 / requests.max(1) as f64;
        let (issuing, under_way, between) = (mean(issuing), mean(under_way), mean(between));
        write!(
            f,
            "{requests}, each {issuing:.1} us to queue, then {under_way:.1} us under way alone or with others, and \
             {between:.1} us with none"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn time_is_counted_once_however_many_requests_are_under_way() {
        let clock = Clock::new();
        let start = Instant::now() + Duration::from_secs(1);
        let at = |us| start + Duration::from_micros(us);
        clock.issued(at(0), at(5));
        clock.issued(at(7), at(10));
        clock.done(at(20));
        clock.done(at(25));
        // NCCL's own time.
        clock.issued(at(55), at(59));
        clock.done(at(70));
        assert_eq!(clock.totals(), [3, 12_000, 31_000, 30_000]);
        let text = "3, each 4.0 us to queue, then 10.3 us under way alone or with others, and 10.0 us with none";
        assert_eq!(Text(clock.totals()).to_string(), text);
        assert_eq!(Text([0; 4]).to_string().matches("0.0 us").count(), 3);
        assert!(totals().iter().zip(clock.totals()).all(|(all, own)| *all >= own));
    }
}
