//! The receiving end: it says which buffers wait, and takes what the sender puts into the window's slots.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::link::{Link, SLOT, SLOTS};
use super::request::{GROUP, Progress, REQUESTS, Request};
use super::send::{lost, settle};
use super::wire::{Frame, NO_SLOT};
use crate::driver::{HandleType, Place, copy};
use crate::error::{Error, Result};

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
}

#[derive(Clone, Copy, Default)]
struct Entry {
    buffer: Buffer,
    total: Option<u64>,
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
    broken: bool,
}

/// The receiving end of a connection.
pub struct RecvComm {
    state: Mutex<Option<State>>,
    requests: Vec<Arc<Request>>,
}

/// Connections that are closed here and not yet at the other end, where a window may still be written to by its name.
static LINGERING: Mutex<Vec<Link>> = Mutex::new(Vec::new());

/// Lets go of windows whose senders have gone.
pub fn reap() {
    LINGERING.lock().retain_mut(|link| !link.pipe.ended());
}

impl RecvComm {
    /// Takes over a connection.
    pub fn new(link: Link) -> Arc<Self> {
        let state = State {
            link,
            next: 0,
            receives: VecDeque::with_capacity(REQUESTS),
            flying: VecDeque::with_capacity(SLOTS),
            broken: false,
        };
        Arc::new_cyclic(|own: &Weak<Self>| {
            let own: Weak<dyn Progress> = Weak::<Self>::clone(own);
            Self { state: Mutex::new(Some(state)), requests: Request::all(&own) }
        })
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
            entry.buffer = *buffer;
            state.link.pipe.put(&Frame::Post { seq, index, tag: buffer.tag, size: buffer.size });
        }
        state.receives.push_back(Receive { seq, request, count: buffers.len(), entries });
        state.advance(&self.requests)?;
        Ok(Some(&self.requests[request]))
    }

    /// Ends it. A window that the sender knows by name stays until the sender has ended too.
    pub fn close(&self) {
        let Some(state) = self.state.lock().take() else { return };
        state.link.pipe.shut();
        if let Some(link) = settle(state.link)
            && link.window.handle == HandleType::Fabric
        {
            LINGERING.lock().push(link);
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
        let ended = loop {
            match self.link.pipe.get() {
                Ok(Some(Frame::Data { seq, index, slot, offset, bytes, total })) => {
                    self.take((seq, index), slot, (offset, bytes.into()), total)?;
                }
                Ok(Some(_)) => return Err(Error::Protocol("a frame that a receiver does not get")),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.land()?;
        self.receives.retain(|receive| {
            if receive.done() {
                for (index, entry) in receive.entries[..receive.count].iter().enumerate() {
                    requests[receive.request].note(index, entry.got);
                }
                requests[receive.request].finish(receive.count);
            }
            !receive.done()
        });
        let flushed = self.link.pipe.flush();
        if self.flying.is_empty() && !self.receives.is_empty() {
            ended?;
            flushed?;
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
        let index = index as usize;
        let entry = self.entry(seq, index)?;
        let fits = total <= entry.buffer.size && offset.checked_add(bytes).is_some_and(|end| end <= total);
        if !fits || bytes > SLOT || entry.total.is_some_and(|known| known != total) {
            return Err(Error::Protocol("a piece outside its buffer"));
        }
        entry.total = Some(total);
        let to = entry.buffer.address + offset;
        let to = if entry.buffer.host { Place::Host(to) } else { Place::Device(to) };
        if slot == NO_SLOT && bytes == 0 {
            return Ok(());
        }
        if slot as usize >= SLOTS || bytes == 0 || self.flying.iter().any(|flight| flight.slot == slot) {
            return Err(Error::Protocol("a piece in a slot that is none"));
        }
        let Link { window, stream, events, context, .. } = &self.link;
        copy(context, to, Place::Device(window.slot(slot)), bytes, stream)?;
        events[slot as usize].record(stream.as_raw())?;
        self.flying.push_back(Flight { slot, seq, index, bytes });
        Ok(())
    }

    /// Gives slots back whose pieces lie where they belong.
    fn land(&mut self) -> Result<()> {
        while let Some(&Flight { slot, seq, index, bytes }) = self.flying.front() {
            if !self.link.events[slot as usize].done()? {
                break;
            }
            self.flying.pop_front();
            self.link.pipe.put(&Frame::Credit { slot });
            self.entry(seq, index)?.got += bytes;
        }
        Ok(())
    }
}
