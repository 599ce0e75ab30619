//! What the communicators of one device share in a process: blocks that may be resident at once, and memory.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::let_go;

/// Most devices told apart; more would share.
const DEVICES: usize = 64;

/// Blocks that one launch may take where so many communicators of a device are ready.
///
/// A kernel waits for its peers' with the multiprocessors it holds. If the launches of all communicators that can be
/// under way at once did not fit the device together, two ranks could each hold what the other's kernel needs. So each
/// gets a share, with one share in reserve: a communicator that becomes ready fits beside what was launched before. Alone
/// it may have two launches resident at once, one of which waits for the other.
pub fn blocks(capacity: u32, communicators: u32) -> u32 {
    (capacity / communicators.max(1).saturating_add(1)).max(1)
}

/// Bytes of windows taken, by device.
static USED: [AtomicU64; DEVICES] = [const { AtomicU64::new(0) }; DEVICES];

/// Memory that a communicator may take, given back when dropped.
#[derive(Debug)]
pub struct Memory {
    used: &'static AtomicU64,
    bytes: u64,
}

/// The part of `full` that the next communicator gets of a budget: all of it up to half of the budget, then halves,
/// quarters and so on, so that something is left for many more; `None` when less than `least` is, the device's granule.
/// Powers of two, because communicators of the same size share multicast objects.
pub fn part(full: u64, least: u64, used: u64, budget: u64) -> Option<u64> {
    if used.saturating_add(full) <= budget / 2 {
        return Some(full);
    }
    let left = budget.saturating_sub(used);
    if left < least {
        return None;
    }
    let mut bytes = full;
    while bytes > (left / 16).max(least) {
        bytes /= 2;
    }
    Some(bytes)
}

impl Memory {
    /// Takes a part for a window of `full` bytes.
    pub fn take(device: i32, full: u64, least: u64, budget: u64) -> Option<Self> {
        Self::take_from(&USED[device.unsigned_abs() as usize % DEVICES], full, least, budget)
    }

    fn take_from(used: &'static AtomicU64, full: u64, least: u64, budget: u64) -> Option<Self> {
        let grow = |now: u64| Some(now + part(full, least, now, budget)?);
        let before = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, grow).ok()?;
        Some(Self { used, bytes: part(full, least, before, budget)? })
    }

    /// What it may take.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// States what is really taken: less where another rank had less to give, more by the granularity.
    pub fn settle(&mut self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
        self.used.fetch_sub(std::mem::replace(&mut self.bytes, bytes), Ordering::AcqRel);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (used, bytes) = (self.used, self.bytes);
        // As late as the window itself.
        let_go(move || {
            used.fetch_sub(bytes, Ordering::AcqRel);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        #[test]
        fn the_launches_of_all_communicators_fit_the_device_together(
            capacity in 1u32..1000, communicators in 1u32..300,
        ) {
            let resident = if communicators == 1 { 2 } else { communicators };
            let share = blocks(capacity, communicators);
            // More communicators than blocks do not fit in any way.
            prop_assert!(share == 1 || share * resident <= capacity);
        }

        #[test]
        fn a_communicator_that_becomes_ready_fits_beside_what_is_under_way(
            capacity in 10u32..1000, communicators in 1u32..300,
        ) {
            let (old, new) = (blocks(capacity, communicators), blocks(capacity, communicators + 1));
            prop_assert!(new == 1 || communicators * old + new <= capacity);
        }

        #[test]
        fn what_is_taken_never_exceeds_the_budget(full in 1u64..1 << 40, least in 1u64..1 << 30, budget in 0u64..1 << 40) {
            let mut used = 0;
            for _ in 0..200 {
                let Some(bytes) = part(full, least, used, budget) else { break };
                prop_assert!(bytes > 0 && bytes <= full);
                used += bytes;
                prop_assert!(used <= budget);
            }
        }
    }

    #[test]
    fn fifty_communicators_fit_the_default_budget_and_the_first_ones_are_whole() {
        let mut parts = Vec::new();
        while let Some(bytes) = part(28 * MIB, 2 * MIB, parts.iter().sum(), 512 * MIB) {
            // As the device rounds it.
            parts.push(bytes.next_multiple_of(2 * MIB));
        }
        assert!(parts.len() >= 50, "{}", parts.len());
        assert!(parts[..8].iter().all(|bytes| *bytes == 28 * MIB));
        let mut sizes = parts.clone();
        sizes.dedup();
        assert!(sizes.len() <= 5 && sizes.is_sorted_by(|a, b| a > b), "few sizes: {sizes:?}");
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        static OWN: AtomicU64 = AtomicU64::new(0);
        let take = || Memory::take_from(&OWN, 10, 10, 25);
        let mut first = take().unwrap();
        first.settle(12);
        let second = take().unwrap();
        assert!(take().is_none());
        drop((first, second));
        assert_eq!(OWN.load(Ordering::Relaxed), 0);
        assert!(take().is_some());
    }
}
