//! The receiving end: it says which buffers wait, hears which have been filled straight, and takes what the sender puts
//! into the window's slots.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::announce::Announcements;
use super::link::{Link, SLOTS};
use super::request::{GROUP, Progress, REQUESTS, Request};
use super::send::lost;
use super::wire::{Frame, NO_MEMORY, NO_SLOT};
use crate::driver::{HandleType, Place, copy};
use crate::error::{Error, Result};

/// Receives that the sender knows of, above which it can do without the next one for a moment.
const ENOUGH: usize = 2;
/// Slots that it can do without.
const SPARE: usize = SLOTS / 4;

/// One buffer of a receive, as NCCL states it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Buffer {
    /// Its address.
    pub address: u64,
    /// Whether it is host memory.
    pub host: bool,
    /// Its size.
    pub size: u64,
    /// The tag of the message for it.
    pub tag: i32,
    /// The number of its registration, where there is one that the sender may write to.
    pub registration: Option<u32>,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    buffer: Buffer,
    /// The sender was told where it can write to.
    open: bool,
    total: Option<u64>,
    /// Bytes that lie in slots or are there.
    due: u64,
    got: u64,
}

struct Receive {
    seq: u32,
    request: usize,
    count: usize,
    entries: [Entry; GROUP],
}

impl Receive {
    fn done(&self) -> bool {
        self.entries[..self.count].iter().all(|entry| entry.total == Some(entry.got))
    }
}

/// A piece on its way out of a slot.
struct Flight {
    slot: u32,
    seq: u32,
    index: usize,
    bytes: u64,
}

struct State {
    link: Link,
    next: u32,
    receives: VecDeque<Receive>,
    flying: VecDeque<Flight>,
    /// Copies since the last batch.
    copies: usize,
    /// Slots given back that the sender may not have heard of.
    credits: usize,
    broken: bool,
}

/// The receiving end of a connection.
pub struct RecvComm {
    state: Mutex<Option<State>>,
    announcements: Mutex<Option<Announcements>>,
    requests: Vec<Arc<Request>>,
}

/// Connections that are closed here and not yet at the other end, where memory may still be written to by its name.
static LINGERING: Mutex<Vec<(Link, Option<Announcements>)>> = Mutex::new(Vec::new());

/// Lets go of memory whose senders have gone.
pub fn reap() {
    LINGERING.lock().retain_mut(|(link, _)| !link.pipe.ended());
}

impl RecvComm {
    /// Takes over a connection.
    pub fn new((link, announcements): (Link, Announcements), owner: &Weak<dyn Progress>) -> Self {
        let state = State {
            link,
            next: 0,
            receives: VecDeque::with_capacity(REQUESTS),
            flying: VecDeque::with_capacity(SLOTS),
            copies: 0,
            credits: 0,
            broken: false,
        };
        let announcements = Mutex::new(Some(announcements));
        Self { state: Mutex::new(Some(state)), announcements, requests: Request::all(owner) }
    }

    /// Registers device memory: a number, where the sender may write to it.
    pub fn register(&self, address: u64, bytes: u64) -> Option<u32> {
        self.announcements.lock().as_mut()?.register(address, bytes)
    }

    /// Ends a registration.
    pub fn deregister(&self, number: u32) {
        if let Some(announcements) = &mut *self.announcements.lock() {
            announcements.deregister(number);
        }
    }

    /// Where the sender can write to: the memory of a buffer, and where in it.
    fn target(&self, buffer: &Buffer) -> Option<(u32, u64)> {
        let number = buffer.registration?;
        let mut announcements = self.announcements.lock();
        let announcements = announcements.as_mut()?;
        announcements.go_on();
        announcements.find(number, buffer.address, buffer.size)
    }

    /// Waits for a message in each of `buffers`, by tag; `None`: try again.
    pub fn receive(&self, buffers: &[Buffer]) -> Result<Option<&Arc<Request>>> {
        let mut state = self.state.lock();
        let state = state.as_mut().filter(|state| !state.broken).ok_or_else(lost)?;
        if buffers.is_empty() || buffers.len() > GROUP {
            return Err(Error::Protocol("a grouped receive of another number of buffers than announced"));
        }
        let Some(request) = Request::take(&self.requests) else { return Ok(None) };
        let seq = state.next;
        state.next = seq.wrapping_add(1);
        let mut entries = [Entry::default(); GROUP];
        for (index, (entry, buffer)) in (0..).zip(entries.iter_mut().zip(buffers)) {
            let target = self.target(buffer);
            (entry.buffer, entry.open) = (*buffer, target.is_some());
            let (memory, at) = target.unwrap_or((NO_MEMORY, 0));
            state.link.pipe.put(&Frame::Post { seq, index, tag: buffer.tag, size: buffer.size, memory, at })?;
        }
        state.receives.push_back(Receive { seq, request, count: buffers.len(), entries });
        state.advance(&self.requests)?;
        Ok(Some(&self.requests[request]))
    }

    /// Ends it. Memory that the sender knows by name stays until the sender has ended too; what it knows by a descriptor
    /// it holds itself.
    pub fn close(&self) {
        let Some(State { link, .. }) = self.state.lock().take() else { return };
        let announcements = self.announcements.lock().take();
        link.pipe.shut();
        if !link.settled() {
            std::mem::forget((link, announcements));
        } else if link.window.handle == HandleType::Fabric {
            LINGERING.lock().push((link, announcements));
        }
        reap();
    }
}

impl Progress for RecvComm {
    fn progress(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.as_mut().filter(|state| !state.broken).ok_or_else(lost)?.advance(&self.requests)
    }
}

impl State {
    fn advance(&mut self, requests: &[Arc<Request>]) -> Result<()> {
        let advanced = self.step(requests);
        self.broken |= advanced.is_err();
        advanced
    }

    fn step(&mut self, requests: &[Arc<Request>]) -> Result<()> {
        self.land()?;
        // What has ended needs no other end any more: it may have closed right after its last word.
        let ended = self.link.pipe.fill();
        let heard = self.hear();
        // What was queued is waited for, also behind nonsense.
        if self.copies > 0 {
            self.link.batches.close(std::mem::take(&mut self.copies), &self.link.stream)?;
        }
        heard?;
        self.receives.retain(|receive| {
            if receive.done() {
                for (index, entry) in receive.entries[..receive.count].iter().enumerate() {
                    requests[receive.request].note(index, entry.got);
                }
                requests[receive.request].finish(receive.count);
            }
            !receive.done()
        });
        let flushed = if self.receives.len() <= ENOUGH || self.credits > SPARE {
            self.credits = 0;
            self.link.pipe.flush().map(drop)
        } else {
            self.link.pipe.flush_lazily()
        };
        if self.flying.is_empty() && !self.receives.is_empty() {
            ended?;
            flushed?;
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<()> {
        while let Some(frame) = self.link.pipe.get()? {
            match frame {
                Frame::Data { seq, index, slot, offset, bytes, total } => {
                    self.take((seq, index), slot, (offset, bytes.into()), total)?;
                }
                Frame::Direct { seq, index, total } => {
                    let entry = self.entry(seq, index as usize)?;
                    if !entry.open || entry.total.is_some() || total > entry.buffer.size {
                        return Err(Error::Protocol("a message straight into a buffer that was not opened for it"));
                    }
                    (entry.total, entry.due, entry.got) = (Some(total), total, total);
                }
                _ => return Err(Error::Protocol("a frame that a receiver does not get")),
            }
        }
        Ok(())
    }

    fn entry(&mut self, seq: u32, index: usize) -> Result<&mut Entry> {
        let receive = self.receives.iter_mut().find(|receive| receive.seq == seq);
        let entry = receive.filter(|receive| index < receive.count).map(|receive| &mut receive.entries[index]);
        entry.ok_or(Error::Protocol("a message for a buffer that nobody waits with"))
    }

    /// Copies a piece out of its slot.
    fn take(&mut self, (seq, index): (u32, u32), slot: u32, (offset, bytes): (u64, u64), total: u64) -> Result<()> {
        let (index, most) = (index as usize, self.link.window.slot_bytes());
        let entry = self.entry(seq, index)?;
        let fits = total <= entry.buffer.size && offset.checked_add(bytes).is_some_and(|end| end <= total);
        // Pieces of a message come in order.
        if !fits || bytes > most || offset != entry.due || entry.total.is_some_and(|known| known != total) {
            return Err(Error::Protocol("a piece outside its buffer"));
        }
        entry.total = Some(total);
        entry.due += bytes;
        let to = entry.buffer.address + offset;
        let to = if entry.buffer.host { Place::Host(to) } else { Place::Device(to) };
        if slot == NO_SLOT && bytes == 0 && total == 0 {
            return Ok(());
        }
        if slot as usize >= SLOTS || bytes == 0 || self.flying.iter().any(|flight| flight.slot == slot) {
            return Err(Error::Protocol("a piece in a slot that is none"));
        }
        let Link { window, stream, context, .. } = &self.link;
        copy(context, to, Place::Device(window.slot(slot)), bytes, stream)?;
        self.flying.push_back(Flight { slot, seq, index, bytes });
        self.copies += 1;
        Ok(())
    }

    /// Gives slots back whose pieces lie where they belong.
    fn land(&mut self) -> Result<()> {
        while let Some(pieces) = self.link.batches.ended()? {
            for _ in 0..pieces {
                let Some(Flight { slot, seq, index, bytes }) = self.flying.pop_front() else { break };
                self.link.pipe.put(&Frame::Credit { slot })?;
                self.credits += 1;
                self.entry(seq, index)?.got += bytes;
            }
        }
        Ok(())
    }
}
