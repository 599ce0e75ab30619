//! Timing some calls on the device (`TWOSHOT_SAMPLE`): two events around every n-th, read when a later one is taken.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::counters::Counters;
use crate::driver::{Context, RawStream, Stopwatch, capturing, with_relaxed_capture};
use crate::warning;

/// Samples that can be under way at once; what comes while all are is not timed.
const UNDER_WAY: usize = 8;

/// What a sample is of: a row of the counters, and the payload.
#[derive(Clone, Copy)]
struct Of {
    row: usize,
    bytes: u64,
    stopped: bool,
}

/// The samples of one communicator.
pub struct Sampler {
    every: u32,
    calls: AtomicU32,
    watches: Mutex<Vec<(Stopwatch, Option<Of>)>>,
    device: i32,
}

impl Sampler {
    /// For every `every`-th call; nothing where that is 0 or where the driver has no events left.
    pub fn new(context: &Arc<Context>, every: u32) -> Option<Self> {
        let device = context.device().ordinal();
        if every == 0 {
            return None;
        }
        match (0..UNDER_WAY).map(|_| Ok((Stopwatch::new(context)?, None))).collect::<crate::error::Result<_>>() {
            Ok(watches) => Some(Self { every, calls: AtomicU32::new(0), watches: Mutex::new(watches), device }),
            Err(error) => {
                warning!(device, "calls are not timed: {error}");
                None
            }
        }
    }

    /// Before a call is queued: the number of its sample, if it is one.
    pub fn begin(&self, counters: &Counters, (row, bytes): (usize, u64), stream: RawStream) -> Option<usize> {
        if !self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.every) || capturing(stream) {
            return None;
        }
        self.read(counters);
        let mut watches = self.watches.lock();
        let free = watches.iter().position(|(_, of)| of.is_none())?;
        let (watch, of) = &mut watches[free];
        watch.start(stream).ok()?;
        *of = Some(Of { row, bytes, stopped: false });
        Some(free)
    }

    /// Behind it.
    pub fn end(&self, sample: usize, stream: RawStream) {
        let mut watches = self.watches.lock();
        let Some((watch, of)) = watches.get_mut(sample) else { return };
        match (watch.stop(stream), of.as_mut()) {
            (Ok(()), Some(of)) => of.stopped = true,
            _ => *of = None,
        }
    }

    /// Counts the samples whose work is done.
    pub fn read(&self, counters: &Counters) {
        with_relaxed_capture(|| {
            for (watch, of) in self.watches.lock().iter_mut() {
                let Some(Of { row, bytes, stopped: true }) = *of else { continue };
                match watch.read() {
                    Ok(None) => continue,
                    Ok(Some(nanoseconds)) => counters.timed(row, bytes, nanoseconds),
                    Err(error) => warning!(self.device, "a call was not timed: {error}"),
                }
                *of = None;
            }
        });
    }
}
