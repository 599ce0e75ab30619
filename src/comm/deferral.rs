//! A non-blocking communicator between its first call and the moment when that call has been made: set-up and call are
//! on a thread of their own, and whoever asks is told that it is in progress.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use parking_lot::Mutex;

use crate::call::ReduceOp;

/// Of one communicator.
#[derive(Default)]
pub struct Deferral {
    running: AtomicBool,
    /// What became of it: a code of NCCL, 0 where all is well.
    outcome: AtomicI32,
    /// Operations that the program destroyed meanwhile: the call needs them.
    doomed: Mutex<Vec<ReduceOp>>,
}

impl Deferral {
    /// Begins; false where it has begun already.
    pub fn begin(&self) -> bool {
        !self.running.swap(true, Ordering::AcqRel)
    }

    /// Whether it is under way.
    pub fn running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// The error that it ended with.
    pub fn error(&self) -> Option<i32> {
        Some(self.outcome.load(Ordering::Acquire)).filter(|code| *code != 0)
    }

    /// Lays an operation aside until the end; false where there is nothing to wait for.
    pub fn lay_aside(&self, op: ReduceOp) -> bool {
        let mut doomed = self.doomed.lock();
        let running = self.running();
        if running {
            doomed.push(op);
        }
        running
    }

    /// Ends, when `destroy` has had every operation that was laid aside.
    pub fn end(&self, outcome: i32, mut destroy: impl FnMut(ReduceOp)) {
        self.outcome.store(outcome, Ordering::Release);
        loop {
            let ops = {
                let mut doomed = self.doomed.lock();
                if doomed.is_empty() {
                    self.running.store(false, Ordering::Release);
                    return;
                }
                std::mem::take(&mut *doomed)
            };
            ops.into_iter().for_each(&mut destroy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_wait_for_the_end_and_an_outcome_stays() {
        let deferral = Deferral::default();
        assert!(!deferral.lay_aside(ReduceOp(7)) && deferral.error().is_none());
        assert!(deferral.begin() && !deferral.begin() && deferral.running());
        assert!(deferral.lay_aside(ReduceOp(7)) && deferral.lay_aside(ReduceOp(8)));
        let mut destroyed = Vec::new();
        deferral.end(6, |op| {
            // Still under way: another thread must not use the communicator beside this one.
            assert!(deferral.running());
            destroyed.push(op);
        });
        assert_eq!(destroyed, [ReduceOp(7), ReduceOp(8)]);
        assert!(!deferral.running() && deferral.error() == Some(6) && !deferral.lay_aside(ReduceOp(9)));
    }
}
