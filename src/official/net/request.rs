//! Requests of a connection: made with it, lent to NCCL one by one.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crate::error::{Error, Result};

/// Requests of one connection. NCCL keeps up to 32 in flight.
pub const REQUESTS: usize = 64;
/// Buffers of one grouped receive.
pub const GROUP: usize = 8;

const FREE: u8 = 0;
const BUSY: u8 = 1;
const DONE: u8 = 2;

/// An end of a connection that moves on when it is asked.
pub trait Progress: Send + Sync {
    /// Does what can be done now, without waiting.
    fn progress(&self) -> Result<()>;
}

/// One request.
pub struct Request {
    owner: Weak<dyn Progress>,
    state: AtomicU8,
    count: AtomicUsize,
    sizes: [AtomicU64; GROUP],
}

impl Request {
    /// The requests of one end.
    pub fn all(owner: &Weak<dyn Progress>) -> Vec<Arc<Self>> {
        let one = || Self {
            owner: Weak::clone(owner),
            state: AtomicU8::new(FREE),
            count: AtomicUsize::new(0),
            sizes: Default::default(),
        };
        (0..REQUESTS).map(|_| Arc::new(one())).collect()
    }

    /// Takes a free one.
    pub fn take(all: &[Arc<Self>]) -> Option<usize> {
        all.iter().position(|one| one.state.compare_exchange(FREE, BUSY, Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }

    /// Gives one back that NCCL never saw.
    pub fn free(&self) {
        self.state.store(FREE, Ordering::Release);
    }

    /// Notes how many bytes one buffer got.
    pub fn note(&self, index: usize, bytes: u64) {
        self.sizes[index].store(bytes, Ordering::Relaxed);
    }

    /// All of its `count` buffers are done.
    pub fn finish(&self, count: usize) {
        self.count.store(count, Ordering::Relaxed);
        self.state.store(DONE, Ordering::Release);
    }

    /// Moves its connection on. Once the request is done it is free again, and `sizes` gets its buffers' bytes; the number
    /// of them is returned.
    pub fn test(&self, sizes: &mut [u64; GROUP]) -> Result<Option<usize>> {
        if self.state.load(Ordering::Acquire) == BUSY {
            let owner = self.owner.upgrade().ok_or(Error::Bug("a request of a closed connection"))?;
            let moved = owner.progress();
            // What is done is done, whatever else has broken.
            if self.state.load(Ordering::Acquire) == BUSY {
                moved?;
            }
        }
        if self.state.load(Ordering::Acquire) != DONE {
            return Ok(None);
        }
        let count = self.count.load(Ordering::Relaxed);
        for (to, from) in sizes.iter_mut().zip(&self.sizes).take(count) {
            *to = from.load(Ordering::Relaxed);
        }
        self.free();
        Ok(Some(count))
    }
}
