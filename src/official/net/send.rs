//! The sending end: messages wait for the receiver's buffers, go piece by piece through the window's slots, and are done
//! when their last piece lies there and the receiver was told.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::link::{Link, SLOT, SLOTS};
use super::request::{GROUP, Progress, REQUESTS, Request};
use super::wire::{Frame, NO_SLOT};
use crate::driver::{Place, copy};
use crate::error::{Error, Result};
use crate::warning;

/// How long the end of a connection waits for its own copies, which wait for nobody.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A buffer that the receiver waits to see filled.
#[derive(Clone, Copy)]
struct Post {
    seq: u32,
    index: u32,
    tag: i32,
    size: u64,
}

struct Message {
    request: usize,
    from: u64,
    host: bool,
    size: u64,
    tag: i32,
    target: Option<(u32, u32)>,
    issued: u64,
    /// Nothing of it is left to issue.
    through: bool,
}

/// A piece on its way into a slot.
struct Flight {
    slot: u32,
    told: Frame,
    /// The request, where it is the last piece of its message.
    ends: Option<(usize, u64)>,
}

struct State {
    link: Link,
    posts: VecDeque<Post>,
    messages: VecDeque<Message>,
    free: Vec<u32>,
    flying: VecDeque<Flight>,
    /// Done, but what the receiver has to know may not have left yet.
    said: VecDeque<(usize, u64)>,
    broken: bool,
}

/// The sending end of a connection.
pub struct SendComm {
    state: Mutex<Option<State>>,
    requests: Vec<Arc<Request>>,
}

impl SendComm {
    /// Takes over a connection.
    pub fn new(link: Link) -> Arc<Self> {
        let state = State {
            link,
            posts: VecDeque::with_capacity(REQUESTS * GROUP),
            messages: VecDeque::with_capacity(REQUESTS),
            free: (0..SLOTS as u32).rev().collect(),
            flying: VecDeque::with_capacity(SLOTS),
            said: VecDeque::with_capacity(REQUESTS),
            broken: false,
        };
        Arc::new_cyclic(|own: &Weak<Self>| {
            let own: Weak<dyn Progress> = Weak::<Self>::clone(own);
            Self { state: Mutex::new(Some(state)), requests: Request::all(&own) }
        })
    }

    /// Sends a message; `None`: try again.
    pub fn send(&self, from: u64, host: bool, size: u64, tag: i32) -> Result<Option<&Arc<Request>>> {
        let mut state = self.state.lock();
        let state = state.as_mut().filter(|state| !state.broken).ok_or_else(lost)?;
        let Some(request) = Request::take(&self.requests) else { return Ok(None) };
        state.messages.push_back(Message { request, from, host, size, tag, target: None, issued: 0, through: false });
        state.advance(&self.requests)?;
        Ok(Some(&self.requests[request]))
    }

    /// Ends it.
    pub fn close(&self) {
        let Some(state) = self.state.lock().take() else { return };
        state.link.pipe.shut();
        drop(settle(state.link));
    }
}

impl Progress for SendComm {
    fn progress(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.as_mut().filter(|state| !state.broken).ok_or_else(lost)?.advance(&self.requests)
    }
}

/// Waits for this end's own copies, so that no memory goes under them; what they still use is kept for good.
pub(super) fn settle(link: Link) -> Option<Link> {
    let device = link.context.device().ordinal();
    match link.stream.wait(PATIENCE) {
        Ok(true) => return Some(link),
        Ok(false) => warning!(device, "a copy of a closed connection has not ended: its memory is kept"),
        Err(error) => warning!(device, "{error} while a connection is closed: its memory is kept"),
    }
    std::mem::forget(link);
    None
}

pub(super) fn lost() -> Error {
    Error::Peer { rank: u32::MAX, step: "the connection is broken" }
}

impl State {
    fn advance(&mut self, requests: &[Arc<Request>]) -> Result<()> {
        let advanced = self.step(requests);
        self.broken |= advanced.is_err();
        advanced
    }

    fn step(&mut self, requests: &[Arc<Request>]) -> Result<()> {
        while let Some(frame) = self.link.pipe.get()? {
            match frame {
                Frame::Post { seq, index, tag, size } => self.posts.push_back(Post { seq, index, tag, size }),
                Frame::Credit { slot } if (slot as usize) < SLOTS && !self.free.contains(&slot) => self.free.push(slot),
                _ => return Err(Error::Protocol("a frame that a sender does not get")),
            }
        }
        self.land()?;
        self.aim()?;
        self.issue()?;
        if self.link.pipe.flush()? {
            for (request, bytes) in self.said.drain(..) {
                requests[request].note(0, bytes);
                requests[request].finish(1);
            }
        }
        Ok(())
    }

    /// Tells the receiver of pieces that have arrived in their slots.
    fn land(&mut self) -> Result<()> {
        while let Some(first) = self.flying.front() {
            if !self.link.events[first.slot as usize].done()? {
                break;
            }
            self.link.pipe.put(&first.told);
            self.said.extend(first.ends);
            self.flying.pop_front();
        }
        Ok(())
    }

    /// Finds each message the oldest buffer that waits for its tag.
    fn aim(&mut self) -> Result<()> {
        for message in self.messages.iter_mut().filter(|message| message.target.is_none()) {
            let Some(at) = self.posts.iter().position(|post| post.tag == message.tag) else { continue };
            let Some(post) = self.posts.remove(at) else { continue };
            if message.size > post.size {
                return Err(Error::Protocol("a message is larger than the buffer that waits for it"));
            }
            message.target = Some((post.seq, post.index));
        }
        Ok(())
    }

    /// Copies pieces into free slots, message by message.
    fn issue(&mut self) -> Result<()> {
        let Link { pipe, window, stream, events, context } = &mut self.link;
        for message in &mut self.messages {
            let Some((seq, index)) = message.target else { continue };
            let total = message.size;
            if total == 0 {
                pipe.put(&Frame::Data { seq, index, slot: NO_SLOT, offset: 0, bytes: 0, total });
                self.said.push_back((message.request, 0));
            }
            while message.issued < total {
                let Some(slot) = self.free.pop() else { break };
                let bytes = SLOT.min(total - message.issued);
                let from = message.from + message.issued;
                let from = if message.host { Place::Host(from) } else { Place::Device(from) };
                copy(context, Place::Device(window.slot(slot)), from, bytes, stream)?;
                events[slot as usize].record(stream.as_raw())?;
                let told = Frame::Data { seq, index, slot, offset: message.issued, bytes: bytes as u32, total };
                message.issued += bytes;
                let ends = (message.issued == total).then_some((message.request, total));
                self.flying.push_back(Flight { slot, told, ends });
            }
            message.through = message.issued == total;
            if !message.through {
                break;
            }
        }
        self.messages.retain(|message| !message.through);
        Ok(())
    }
}
