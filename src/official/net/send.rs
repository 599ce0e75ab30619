//! The sending end: messages wait for the receiver's buffers and go straight to them, in as few copies as can be, or piece
//! by piece through the window's slots. A message is done when its last copy has ended and the receiver was told.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::link::{Link, PATIENCE, SLOTS};
use super::reach::{Far, Reached};
use super::request::{GROUP, Progress, REQUESTS, Request};
use super::run::Run;
use super::traffic;
use super::wire::{Frame, NO_SLOT};
use crate::driver::{Place, copy};
use crate::error::{Error, Result};
use crate::warning;

/// Batches of copies that are always queued behind each other, so that the copy engine never waits for this thread.
const AHEAD: usize = 2;
/// And as many more where there is so much to copy; less than that waits, so that it goes together with what comes next.
const FURTHER: usize = 4;
const MUCH: u64 = 256 << 10;

/// A buffer that the receiver waits to see filled.
#[derive(Clone, Copy)]
struct Post {
    seq: u32,
    index: u32,
    tag: i32,
    size: u64,
    memory: u32,
    at: u64,
}

/// Where a message goes.
struct Target {
    seq: u32,
    index: u32,
    /// The receiver's memory and the address in it, where it can be written to.
    far: Option<(Arc<Far>, u64)>,
}

struct Message {
    request: usize,
    from: u64,
    host: bool,
    size: u64,
    tag: i32,
    target: Option<Target>,
    issued: u64,
    /// Nothing of it is left to issue.
    through: bool,
}

impl Message {
    fn place(&self) -> Place {
        let at = self.from + self.issued;
        if self.host { Place::Host(at) } else { Place::Device(at) }
    }
}

/// A copy under way, and what the receiver is told when it has ended.
struct Flight {
    told: Frame,
    /// The request, where it is the last piece of its message.
    ends: Option<(usize, u64)>,
    /// Not unmapped under the copy.
    _far: Option<Arc<Far>>,
}

struct State {
    link: Link,
    reach: Reached,
    posts: VecDeque<Post>,
    messages: VecDeque<Message>,
    free: Vec<u32>,
    flying: VecDeque<Flight>,
    /// Done, but what the receiver has to know may not have left yet.
    said: VecDeque<(usize, u64)>,
    broken: bool,
    _open: traffic::Open,
}

/// The sending end of a connection.
pub struct SendComm {
    state: Mutex<Option<State>>,
    requests: Vec<Arc<Request>>,
}

impl SendComm {
    /// Takes over a connection.
    pub fn new((link, reach): (Link, Reached), owner: &Weak<dyn Progress>) -> Self {
        let open = traffic::Open::new(link.context.device().ordinal());
        let state = State {
            link,
            reach,
            posts: VecDeque::with_capacity(REQUESTS * GROUP),
            messages: VecDeque::with_capacity(REQUESTS),
            free: (0..SLOTS as u32).rev().collect(),
            flying: VecDeque::with_capacity(REQUESTS + SLOTS),
            said: VecDeque::with_capacity(REQUESTS),
            broken: false,
            _open: open,
        };
        Self { state: Mutex::new(Some(state)), requests: Request::all(owner) }
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

    /// Ends it: first the copies, then what they go to, then the connection, which tells the receiver that nothing of its
    /// memory is in use here any more. What does not end keeps what it uses for good.
    pub fn close(&self) {
        let Some(state) = self.state.lock().take() else { return };
        if !state.link.settled() {
            std::mem::forget(state);
            return;
        }
        let State { link, reach, messages, flying, _open, .. } = state;
        drop((messages, flying));
        let device = link.context.device().ordinal();
        if !reach.close(PATIENCE) {
            warning!(device, "memory of a closed connection is not unmapped in time: it is kept");
            std::mem::forget((link, reach));
            return;
        }
        drop(reach);
        drop(link);
    }
}

impl Progress for SendComm {
    fn progress(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.as_mut().filter(|state| !state.broken).ok_or_else(lost)?.advance(&self.requests)
    }
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
        let ended = self.link.pipe.fill();
        while let Some(frame) = self.link.pipe.get()? {
            match frame {
                Frame::Post { seq, index, tag, size, memory, at } if self.posts.len() < REQUESTS * GROUP => {
                    self.posts.push_back(Post { seq, index, tag, size, memory, at });
                }
                Frame::Credit { slot } if (slot as usize) < SLOTS && !self.free.contains(&slot) => {
                    self.free.push(slot);
                }
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
        ended
    }

    /// Tells the receiver of what has arrived.
    fn land(&mut self) -> Result<()> {
        while let Some(pieces) = self.link.batches.ended()? {
            for Flight { told, ends, .. } in self.flying.drain(..pieces) {
                self.link.pipe.put(&told)?;
                self.said.extend(ends);
            }
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
            let far = self.reach.find(post.memory, post.at, message.size);
            message.target = Some(Target { seq: post.seq, index: post.index, far });
        }
        Ok(())
    }

    /// Whether copies are queued now, or wait for those under way.
    fn ready(&self) -> bool {
        let open = self.link.batches.open();
        let waiting = || {
            let aimed = self.messages.iter().filter(|message| message.target.is_some());
            aimed.map(|message| message.size - message.issued).sum::<u64>()
        };
        open < AHEAD || (open < FURTHER && waiting() >= MUCH)
    }

    /// Queues copies: whole messages straight to their buffers, pieces of the others into free slots, message by message.
    fn issue(&mut self) -> Result<()> {
        if self.messages.is_empty() || !self.ready() {
            return Ok(());
        }
        let Link { pipe, window, batches, stream, context, .. } = &mut self.link;
        let (mut pieces, mut run) = (0, None::<(Run, *const Far)>);
        for message in &mut self.messages {
            let place = message.place();
            let Some(Target { seq, index, far }) = &mut message.target else { continue };
            let (seq, index, total) = (*seq, *index, message.size);
            if total == 0 {
                let slot = NO_SLOT;
                pipe.put(&Frame::Data { seq, index, slot, offset: 0, bytes: 0, total })?;
                self.said.push_back((message.request, 0));
            } else if let Some((far, to)) = far.take() {
                let memory = Arc::as_ptr(&far);
                let taken = run.as_mut().is_some_and(|(run, before)| *before == memory && run.takes(to, place, total));
                if !taken {
                    let before = run.replace((Run::new(to, place, total), memory)).map(|(run, _)| run);
                    Run::queue(before, context, stream)?;
                }
                message.issued = total;
                let told = Frame::Direct { seq, index, total };
                self.flying.push_back(Flight { told, ends: Some((message.request, total)), _far: Some(far) });
                pieces += 1;
                traffic::direct(total);
            }
            while message.issued < total {
                let Some(slot) = self.free.pop() else { break };
                let bytes = window.slot_bytes().min(total - message.issued);
                copy(context, Place::Device(window.slot(slot)), message.place(), bytes, stream)?;
                let told = Frame::Data { seq, index, slot, offset: message.issued, bytes: bytes as u32, total };
                message.issued += bytes;
                let ends = (message.issued == total).then_some((message.request, total));
                self.flying.push_back(Flight { told, ends, _far: None });
                pieces += 1;
                if ends.is_some() {
                    traffic::through_the_window(total);
                }
            }
            message.through = message.issued == total;
            if !message.through {
                break;
            }
        }
        Run::queue(run.map(|(run, _)| run), context, stream)?;
        if pieces > 0 {
            batches.close(pieces, stream)?;
        }
        self.messages.retain(|message| !message.through);
        Ok(())
    }
}
