//! An end of a connection, once it is set up: the window on the receiver's GPU, the way of frames, a stream for this
//! end's copies and the events behind them.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::pipe::Pipe;
use crate::config::Config;
use crate::driver::{Allocation, Context, Event, HandleType, Mapping, Reservation, Stream};
use crate::error::{Error, Result};
use crate::warning;

/// Slots of a window: what may be under way at once.
pub const SLOTS: usize = 16;
/// How long the end of a connection waits for its own copies, which wait for nobody.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a window between hosts, where NCCL's own buffers cannot be named to a peer: a slot takes a step of NCCL's
/// buffers of the usual size.
const LARGE: u64 = 8 << 20;
/// Of one within a host, where most data goes past it.
const MIDDLE: u64 = 4 << 20;
/// Of all windows beyond the budget.
const SMALL: u64 = 2 << 20;
/// Windows of a process take at most so much before they become small ones, and half of what the user gives windows.
const BUDGET: u64 = 256 << 20;

/// Bytes of the windows that count against the budget.
static USED: AtomicU64 = AtomicU64::new(0);

/// A window's part of the budget, given back when dropped.
pub struct Room {
    counted: u64,
    /// Bytes that the window may have.
    pub bytes: u64,
}

impl Room {
    /// For one more window.
    pub fn take(handle: HandleType) -> Self {
        let budget = Config::get().memory.map_or(BUDGET, |memory| memory / 2);
        Self::take_of(&USED, handle, budget)
    }

    fn take_of(used: &AtomicU64, handle: HandleType, budget: u64) -> Self {
        let wanted = if handle == HandleType::Fabric { LARGE } else { MIDDLE };
        let grown = |used: u64| Some(used + wanted).filter(|sum| *sum <= budget);
        match used.fetch_update(Ordering::AcqRel, Ordering::Acquire, grown) {
            Ok(_) => Self { counted: wanted, bytes: wanted },
            Err(_) => Self { counted: 0, bytes: SMALL },
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        USED.fetch_sub(self.counted, Ordering::AcqRel);
    }
}

/// Memory on the receiver's GPU, as one end sees it.
pub struct Window {
    mapping: Mapping,
    slot: u64,
    /// How its handle travelled: the name of a fabric handle does not keep the memory.
    pub handle: HandleType,
    /// The receiver's part of the budget.
    _room: Option<Room>,
}

impl Window {
    /// Maps it.
    pub fn new(
        memory: &Arc<Allocation>,
        context: &Arc<Context>,
        align: u64,
        handle: HandleType,
        room: Option<Room>,
    ) -> Result<Self> {
        // Both ends have the same size, and so the same slots.
        let slot = memory.bytes() / SLOTS as u64 / 512 * 512;
        if slot == 0 || slot > u64::from(u32::MAX) {
            return Err(Error::Protocol("a window of a size that makes no sense"));
        }
        let reservation = Reservation::new(context, memory.bytes(), align)?;
        Ok(Self { mapping: Mapping::new(&reservation, 0, memory)?, slot, handle, _room: room })
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> u64 {
        self.slot
    }

    /// Where a slot begins.
    pub fn slot(&self, slot: u32) -> u64 {
        self.mapping.address() + u64::from(slot) * self.slot
    }
}

/// Copies that were queued together, and the event behind each such batch. They end in order.
pub struct Batches {
    events: Vec<Event>,
    pieces: [usize; SLOTS],
    first: usize,
    open: usize,
}

impl Batches {
    fn new(context: &Arc<Context>) -> Result<Self> {
        let events = (0..SLOTS).map(|_| Event::new(context)).collect::<Result<_>>()?;
        Ok(Self { events, pieces: [0; SLOTS], first: 0, open: 0 })
    }

    /// Batches that have not ended, as far as is known.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Ends a batch of so many pieces behind what the stream has been given.
    pub fn close(&mut self, pieces: usize, stream: &Stream) -> Result<()> {
        let at = (self.first + self.open) % SLOTS;
        self.events[at].record(stream.as_raw())?;
        self.pieces[at] = pieces;
        self.open += 1;
        Ok(())
    }

    /// Pieces of the oldest batch, if it has ended now.
    pub fn ended(&mut self) -> Result<Option<usize>> {
        if self.open == 0 || !self.events[self.first].done()? {
            return Ok(None);
        }
        let pieces = self.pieces[self.first];
        self.first = (self.first + 1) % SLOTS;
        self.open -= 1;
        Ok(Some(pieces))
    }
}

/// One end of a connection, ready for data. Dropped in this order: who sees the connection end finds nothing mapped.
pub struct Link {
    /// Where data passes that cannot go straight.
    pub window: Window,
    /// This end's copies under way.
    pub batches: Batches,
    /// For this end's copies.
    pub stream: Stream,
    /// Of this end's GPU.
    pub context: Arc<Context>,
    /// To the other end.
    pub pipe: Pipe,
}

impl Link {
    /// Makes what an end needs for its copies.
    pub fn new(pipe: Pipe, window: Window, context: Arc<Context>) -> Result<Self> {
        let (batches, stream) = (Batches::new(&context)?, Stream::first(&context)?);
        Ok(Self { window, batches, stream, context, pipe })
    }

    /// Waits for this end's own copies, so that no memory goes under them; whether they have ended.
    pub fn settled(&self) -> bool {
        let device = self.context.device().ordinal();
        match self.stream.wait(PATIENCE) {
            Ok(true) => return true,
            Ok(false) => warning!(device, "a copy of a closed connection has not ended: its memory is kept"),
            Err(error) => warning!(device, "{error} while a connection is closed: its memory is kept"),
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_small_once_the_budget_is_used_up_and_large_again_when_it_is_given_back() {
        let used = AtomicU64::new(0);
        let take = |handle| {
            let room = std::mem::ManuallyDrop::new(Room::take_of(&used, handle, 20 << 20));
            (room.bytes, room.counted)
        };
        assert_eq!(take(HandleType::Fabric), (LARGE, LARGE));
        assert_eq!(take(HandleType::Fd), (MIDDLE, MIDDLE));
        assert_eq!(take(HandleType::Fabric), (LARGE, LARGE));
        assert_eq!(take(HandleType::Fd), (SMALL, 0));
        used.fetch_sub(MIDDLE, Ordering::Relaxed);
        assert_eq!(take(HandleType::Fabric), (SMALL, 0));
        assert_eq!(take(HandleType::Fd), (MIDDLE, MIDDLE));
    }
}
