//! The network over the NVLink domain: point to point, for all of NCCL's own algorithms.
//!
//! The receiver says which buffers wait, the sender's copy engines fill them. Where NCCL has registered a buffer whose
//! memory can be shared (`announce.rs`), the sender maps it (`reach.rs`) and copies straight into it, once. Everything else
//! goes through a window of slots on the receiver's GPU (`link.rs`): the sender copies into free slots, the receiver copies
//! to where the data belongs and gives the slot back. So memory of any kind can be sent. The choice is made for each
//! message, by the sender. What the ends tell each other (`wire.rs`) goes over TCP, or on one host through memory that both
//! map (`pipe.rs`, `ring.rs`); both move on when NCCL tests a request.
//!
//! Slots are used in any order, a message's pieces are issued in order, and a piece is announced after the event behind
//! its copy. A slot is free again when the receiver says so, which it does after the event behind its own copy: so no
//! copy into a slot overtakes one out of it. A message that went straight is announced after the event behind its copy
//! too: a receive is done when all its bytes are in GPU memory, and there is nothing to flush.
//!
//! Who unmaps and frees what, and when: the sender's copies hold what they go to. By a descriptor the sender has a
//! reference of its own, and the receiver may let go at any time. By name it has none: the receiver holds the memory until
//! the sender has said that it unmapped it, or has closed its end, which it does last of all.
#![forbid(unsafe_code)]

mod announce;
mod connecting;
mod greeting;
mod link;
mod pipe;
mod reach;
mod recv;
mod request;
mod ring;
mod run;
mod send;
mod side;
mod traffic;
mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::address::{HANDLE, Handle};
use super::bootstrap::Listener;
use super::nics;
use crate::config::Config;
use crate::error::{Error, Result};
use connecting::{Pending, Receiving, Sender};
pub use recv::Buffer;
use recv::RecvComm;
use request::Progress;
pub use request::{GROUP, Request};
use send::SendComm;
pub use traffic::totals;

/// One end of a connection, as NCCL has it: `regMr` is not told which.
pub enum Comm {
    /// It sends.
    Send(SendComm),
    /// It receives.
    Recv(RecvComm),
}

impl Comm {
    fn new(make: impl FnOnce(&Weak<dyn Progress>) -> Self) -> Arc<Self> {
        Arc::new_cyclic(|own: &Weak<Self>| {
            let own: Weak<dyn Progress> = Weak::<Self>::clone(own);
            make(&own)
        })
    }

    /// Registers device memory: a number, where the other end may write to it.
    pub fn register(&self, address: u64, bytes: u64) -> Option<u32> {
        match self {
            Self::Send(_) => None,
            Self::Recv(recv) => recv.register(address, bytes),
        }
    }

    /// Ends a registration.
    pub fn deregister(&self, number: u32) {
        if let Self::Recv(recv) = self {
            recv.deregister(number);
        }
    }

    /// Sends a message; `None`: try again.
    pub fn send(&self, from: u64, host: bool, size: u64, tag: i32) -> Result<Option<&Arc<Request>>> {
        match self {
            Self::Send(send) => send.send(from, host, size, tag),
            Self::Recv(_) => Err(Error::Bug("a receiver was told to send")),
        }
    }

    /// Waits for a message in each of `buffers`, by tag; `None`: try again.
    pub fn receive(&self, buffers: &[Buffer]) -> Result<Option<&Arc<Request>>> {
        match self {
            Self::Send(_) => Err(Error::Bug("a sender was told to receive")),
            Self::Recv(recv) => recv.receive(buffers),
        }
    }

    /// Ends it.
    pub fn close(&self) {
        match self {
            Self::Send(send) => send.close(),
            Self::Recv(recv) => recv.close(),
        }
    }
}

impl Progress for Comm {
    fn progress(&self) -> Result<()> {
        match self {
            Self::Send(send) => send.progress(),
            Self::Recv(recv) => recv.progress(),
        }
    }
}

/// A listener and, once NCCL has asked for the first time, its connection being set up.
struct Listening {
    listener: Arc<Listener>,
    nic: i32,
    pending: Option<Pending<Receiving>>,
}

#[derive(Default)]
struct Book {
    listening: HashMap<usize, Listening>,
    /// Connections being set up, by the token of the handle that NCCL gives at every try.
    connecting: HashMap<[u8; 16], Pending<Sender>>,
}

static BOOK: Mutex<Option<Book>> = Mutex::new(None);

/// Opens a listener: its number, and what NCCL carries to the sender.
pub fn listen(nic: i32) -> Result<(usize, [u8; HANDLE])> {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    recv::reap();
    let listener = Arc::new(Listener::open(Config::get().interfaces.as_deref())?);
    let handle = listener.handle.encode();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    BOOK.lock().get_or_insert_default().listening.insert(number, Listening { listener, nic, pending: None });
    Ok((number, handle))
}

/// Closes a listener, if it is still open.
pub fn close_listen(number: usize) {
    drop(BOOK.lock().get_or_insert_default().listening.remove(&number));
    recv::reap();
}

/// Connects to the listener of a handle; `None`: try again.
pub fn connect(nic: i32, handle: &[u8; HANDLE]) -> Result<Option<Arc<Comm>>> {
    let handle = Handle::decode(handle);
    let handle = handle.ok_or(Error::Protocol("a handle of somebody else's (is twoshot the plugin of every rank?)"))?;
    let mut book = BOOK.lock();
    let connecting = &mut book.get_or_insert_default().connecting;
    let link = match connecting.get(&handle.token) {
        Some(pending) => pending.poll(),
        None => {
            connecting.insert(handle.token, Pending::connect(handle, nics::ordinal(nic)?)?);
            Ok(None)
        }
    };
    if !matches!(link, Ok(None)) {
        connecting.remove(&handle.token);
    }
    Ok(link?.map(|link| Comm::new(|own| Comm::Send(SendComm::new(link, own)))))
}

/// Accepts the sender of a listener; `None`: try again.
pub fn accept(number: usize) -> Result<Option<Arc<Comm>>> {
    let mut book = BOOK.lock();
    let listening = book.get_or_insert_default().listening.get_mut(&number);
    let listening = listening.ok_or(Error::Protocol("an accept without its listener"))?;
    let link = match &listening.pending {
        Some(pending) => pending.poll()?,
        None => {
            let ordinal = nics::ordinal(listening.nic)?;
            listening.pending = Some(Pending::accept(Arc::clone(&listening.listener), ordinal)?);
            None
        }
    };
    Ok(link.map(|link| Comm::new(|own| Comm::Recv(RecvComm::new(link, own)))))
}
