//! The network over the NVLink domain: point to point, for all of NCCL's own algorithms.
//!
//! A connection has a window of a few slots on the receiver's GPU, which the sender maps (`link.rs`). The receiver says
//! which buffers wait; the sender copies into free slots with its GPU's copy engines and says so; the receiver copies to
//! where the data belongs and gives the slot back. So memory of any kind can be sent, and nothing of the program's is
//! mapped anywhere. What the ends tell each other goes over TCP (`wire.rs`); both move on when NCCL tests a request.
//!
//! Slots are used in any order, a message's pieces are issued in order, and a piece is announced after the event behind
//! its copy. A slot is free again when the receiver says so, which it does after the event behind its own copy: so no
//! copy into a slot overtakes one out of it.
#![forbid(unsafe_code)]

mod link;
mod recv;
mod request;
mod send;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::address::{HANDLE, Handle};
use super::bootstrap::Listener;
use super::nics;
use crate::config::Config;
use crate::error::{Error, Result};
use link::{Link, Pending};
pub use recv::{Buffer, RecvComm};
pub use request::{GROUP, Request};
pub use send::SendComm;

/// A listener and, once NCCL has asked for the first time, its connection being set up.
struct Listening {
    listener: Arc<Listener>,
    nic: i32,
    pending: Option<Pending>,
}

#[derive(Default)]
struct Book {
    listening: HashMap<usize, Listening>,
    /// Connections being set up, by the token of the handle that NCCL gives at every try.
    connecting: HashMap<[u8; 16], Pending>,
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
pub fn connect(nic: i32, handle: &[u8; HANDLE]) -> Result<Option<Arc<SendComm>>> {
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
    Ok(link?.map(SendComm::new))
}

/// Accepts the sender of a listener; `None`: try again.
pub fn accept(number: usize) -> Result<Option<Arc<RecvComm>>> {
    let mut book = BOOK.lock();
    let listening = book.get_or_insert_default().listening.get_mut(&number);
    let listening = listening.ok_or(Error::Protocol("an accept without its listener"))?;
    let link: Option<Link> = match &listening.pending {
        Some(pending) => pending.poll()?,
        None => {
            let ordinal = nics::ordinal(listening.nic)?;
            listening.pending = Some(Pending::accept(Arc::clone(&listening.listener), ordinal)?);
            None
        }
    };
    Ok(link.map(RecvComm::new))
}
