//! Counting calls by route: relaxed additions, nothing a benchmark can see.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::Algorithm;
use crate::route::Reason;

/// Calls by algorithm and, for those left to stock NCCL, by reason.
#[derive(Debug, Default)]
pub struct Counters {
    routed: [AtomicU64; 2],
    stock: [AtomicU64; Reason::ALL.len()],
}

impl Counters {
    /// All zero.
    pub const fn new() -> Self {
        Self { routed: [const { AtomicU64::new(0) }; 2], stock: [const { AtomicU64::new(0) }; Reason::ALL.len()] }
    }

    /// One call of our kernel.
    pub fn routed(&self, algorithm: Algorithm) {
        self.routed[algorithm as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// One call left to stock.
    pub fn stock(&self, reason: Reason) {
        self.stock[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Calls routed and calls left to stock.
    pub fn totals(&self) -> (u64, u64) {
        let sum = |row: &[AtomicU64]| row.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        (sum(&self.routed), sum(&self.stock))
    }
}

impl std::fmt::Display for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for algorithm in Algorithm::ALL {
            let n = self.routed[algorithm as usize].load(Ordering::Relaxed);
            write!(f, "{} {n}, ", algorithm.name())?;
        }
        write!(f, "stock {}", self.totals().1)?;
        for reason in Reason::ALL {
            let n = self.stock[reason as usize].load(Ordering::Relaxed);
            if n > 0 {
                write!(f, " {}={n}", reason.name())?;
            }
        }
        Ok(())
    }
}

/// Of the whole process.
pub static PROCESS: Counters = Counters::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_counted_once_under_its_route() {
        let counters = Counters::new();
        counters.routed(Algorithm::TwoShot);
        for reason in Reason::ALL {
            counters.stock(reason);
        }
        assert_eq!(counters.totals(), (1, Reason::ALL.len() as u64));
        assert!(counters.to_string().starts_with("oneshot 0, twoshot 1, stock 7 empty=1 type=1"));
    }
}
