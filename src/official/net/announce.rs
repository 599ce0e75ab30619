//! Memory that the receiver's NCCL has registered: held, exported and announced to the sender, so that it can write there
//! without a window between. Whatever cannot be shared goes through the window.
//!
//! An allocation is announced once, under a number that no other one of the connection ever has: so an address that is
//! registered again, over another allocation, is another memory. A name keeps nothing alive: memory that went by name is
//! held until the sender has said that it let go, or has ended.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use super::side::Side;
use super::traffic;
use super::wire::{Frame, NO_MEMORY};
use crate::config::Config;
use crate::driver::{Context, HandleType, Retained, Shareable};
use crate::error::{Error, Result};

/// Allocations that a connection shares at once; what is registered beyond goes through the window.
pub const MOST: usize = 256;

struct Announced {
    id: u32,
    memory: Retained,
    registrations: usize,
}

/// A registration that the sender may write to.
struct Registered {
    id: u32,
    base: u64,
    address: u64,
    bytes: u64,
}

/// What a connection's receiver has announced.
pub struct Announcements {
    context: Arc<Context>,
    handle: HandleType,
    side: Side,
    next: u32,
    memories: Vec<Announced>,
    registered: HashMap<u32, Registered>,
    /// Not registered any more, and not let go of by the sender.
    leaving: Vec<(u32, Retained)>,
}

impl Announcements {
    /// None yet.
    pub fn new(context: Arc<Context>, handle: HandleType, side: Side) -> Self {
        let (memories, leaving) = (Vec::new(), Vec::new());
        Self { context, handle, side, next: NO_MEMORY, memories, registered: HashMap::new(), leaving }
    }

    /// Registers `[address, address + bytes)`: the registration's number, if the sender may write there.
    pub fn register(&mut self, address: u64, bytes: u64) -> Option<u32> {
        self.listen();
        if !Config::get().net_direct {
            return None;
        }
        match self.share(address, bytes) {
            Ok(number) => Some(number),
            Err(error) => {
                traffic::kept_to_the_window(self.context.device().ordinal(), &error);
                None
            }
        }
    }

    fn number(&mut self) -> Result<u32> {
        self.next = self.next.checked_add(1).ok_or(Error::Unshared("the connection has no number left"))?;
        Ok(self.next)
    }

    fn share(&mut self, address: u64, bytes: u64) -> Result<u32> {
        let memory = Retained::behind(&self.context, address, bytes)?;
        let base = memory.base();
        let known = self.memories.iter_mut().find(|known| known.memory.same(&memory));
        let id = match known {
            Some(known) => {
                known.registrations += 1;
                known.id
            }
            None => {
                if self.memories.len() + self.leaving.len() >= MOST {
                    return Err(Error::Unshared("the connection shares as many allocations as it may"));
                }
                let (name, fd) = match memory.export(self.handle)? {
                    Shareable::Fd(fd) => ([0; 64], Some(fd)),
                    Shareable::Fabric(name) => (name, None),
                };
                let id = self.number()?;
                self.side.put(Frame::Memory { id, bytes: memory.bytes(), name }, fd)?;
                self.memories.push(Announced { id, memory, registrations: 1 });
                id
            }
        };
        let number = self.number()?;
        self.registered.insert(number, Registered { id, base, address, bytes });
        Ok(number)
    }

    /// Ends a registration. With the last one of an allocation the sender is told to let go of it.
    pub fn deregister(&mut self, number: u32) {
        let Some(Registered { id, .. }) = self.registered.remove(&number) else { return };
        let Some(at) = self.memories.iter().position(|known| known.id == id) else { return };
        self.memories[at].registrations -= 1;
        if self.memories[at].registrations == 0 {
            let Announced { memory, .. } = self.memories.swap_remove(at);
            let told = self.side.put(Frame::Forget { id }, None);
            // A sender that cannot be told has ended, or its connection has; then `listen` finds that out.
            if told.is_ok() && self.handle == HandleType::Fabric {
                self.leaving.push((id, memory));
            }
        }
        self.listen();
    }

    /// The memory that a buffer of a registration lies in, and where in it.
    pub fn find(&self, number: u32, address: u64, bytes: u64) -> Option<(u32, u64)> {
        let known = self.registered.get(&number)?;
        let within = address.checked_sub(known.address)?.checked_add(bytes)?;
        (within <= known.bytes).then(|| (known.id, address - known.base))
    }

    /// Goes on with what was not finished when it was begun.
    pub fn go_on(&mut self) {
        if !self.leaving.is_empty() || self.side.owing() {
            self.listen();
        }
    }

    /// Hears what the sender has let go of.
    fn listen(&mut self) {
        let _ = self.side.flush();
        loop {
            match self.side.get() {
                Ok(Some((Frame::Forgotten { id }, _))) => self.leaving.retain(|(leaving, _)| *leaving != id),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(Error::Peer { .. }) => {
                    self.leaving.clear();
                    return;
                }
                // Nonsense lets nothing go: the end of the connection does.
                Err(_) => return,
            }
        }
    }
}
