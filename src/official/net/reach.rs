//! The receiver's memories as the sender reaches them. One thread of the process listens to what receivers announce,
//! imports and maps it, and unmaps what they take back: so neither happens while NCCL's kernels wait for a copy, and a
//! message for memory that is not there yet goes through the window.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::announce::MOST;
use super::link::PATIENCE;
use super::side::Side;
use super::traffic;
use super::wire::{Frame, NO_MEMORY};
use crate::driver::{Allocation, Context, HandleType, Imported, Mapping, Reservation, granularity, relax_thread};
use crate::error::{Error, Result};

/// How often memory that is to be let go of, and whose copies are still under way, is looked at again.
const AGAIN: Duration = Duration::from_millis(2);
/// Larger than any memory there is.
const LARGEST: u64 = 1 << 44;

/// A memory of the receiver's, mapped here as long as somebody has it.
pub struct Far {
    mapping: Mapping,
    bytes: u64,
}

/// The memories of one connection.
pub struct Reach {
    context: Arc<Context>,
    handle: HandleType,
    table: Mutex<HashMap<u32, Arc<Far>>>,
    /// The listening thread's alone.
    side: Mutex<Side>,
    closing: AtomicBool,
    closed: Arc<Closed>,
}

/// Whether the listening thread has let go of a connection and of everything that it had of it.
#[derive(Default)]
struct Closed {
    closed: Mutex<bool>,
    told: Condvar,
}

/// The sender's hold on them.
pub struct Reached(Arc<Reach>);

impl Reached {
    /// Begins to listen.
    pub fn new(context: Arc<Context>, handle: HandleType, side: Side) -> Result<Self> {
        let reach = Arc::new(Reach {
            context,
            handle,
            table: Mutex::default(),
            side: Mutex::new(side),
            closing: AtomicBool::new(false),
            closed: Arc::default(),
        });
        enlist(&reach)?;
        Ok(Self(reach))
    }

    /// The memory of this number, and where `bytes` at `at` lie in it.
    pub fn find(&self, id: u32, at: u64, bytes: u64) -> Option<(Arc<Far>, u64)> {
        if id == NO_MEMORY {
            return None;
        }
        let table = self.0.table.lock();
        let far = table.get(&id)?;
        let fits = at.checked_add(bytes).is_some_and(|end| end <= far.bytes);
        fits.then(|| (Arc::clone(far), far.mapping.address() + at))
    }

    /// Lets go of all, when no copy is under way any more; whether that happened within `patience`.
    pub fn close(&self, patience: Duration) -> bool {
        self.0.closing.store(true, Ordering::Release);
        wake();
        let Closed { closed, told } = &*self.0.closed;
        let mut closed = closed.lock();
        told.wait_while_for(&mut closed, |closed| !*closed, patience);
        *closed
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        self.close(PATIENCE);
    }
}

impl Reach {
    fn import(&self, id: u32, bytes: u64, name: &[u8; 64], fd: Option<OwnedFd>) -> Result<()> {
        let align = granularity(&self.context, self.handle)?;
        if id == NO_MEMORY || bytes == 0 || bytes > LARGEST || !bytes.is_multiple_of(align) {
            return Err(Error::Protocol("memory that makes no sense"));
        }
        let from = match (self.handle, &fd) {
            (HandleType::Fabric, _) => Imported::Fabric(name),
            (HandleType::Fd, Some(fd)) => Imported::Fd(fd.as_fd()),
            (HandleType::Fd, None) => return Err(Error::Protocol("memory without its descriptor")),
        };
        let memory = Allocation::import(&self.context, bytes, from)?;
        let reservation = Reservation::new(&self.context, bytes, align)?;
        let far = Far { mapping: Mapping::new(&reservation, 0, &memory)?, bytes };
        let mut table = self.table.lock();
        if table.len() >= MOST || table.contains_key(&id) {
            return Err(Error::Protocol("more memory than a connection may share"));
        }
        table.insert(id, Arc::new(far));
        Ok(())
    }
}

/// A connection as the listening thread has it.
struct Heard {
    reach: Arc<Reach>,
    /// To be let go of once no copy is under way to it.
    leaving: Vec<(u32, Arc<Far>)>,
    /// The receiver says nothing more.
    over: bool,
    /// Something that it has to hear has not left yet.
    owing: bool,
}

impl Heard {
    fn serve(&mut self) {
        let Self { reach, leaving, over, owing } = self;
        let mut side = reach.side.lock();
        while !*over {
            match side.get() {
                Ok(Some((Frame::Memory { id, bytes, name }, fd))) => {
                    if let Err(error) = reach.import(id, bytes, &name, fd) {
                        traffic::kept_to_the_window(reach.context.device().ordinal(), &error);
                    }
                }
                Ok(Some((Frame::Forget { id }, _))) => match reach.table.lock().remove(&id) {
                    Some(far) => leaving.push((id, far)),
                    None => *over |= side.put(Frame::Forgotten { id }, None).is_err(),
                },
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => *over = true,
            }
        }
        for (id, far) in std::mem::take(leaving) {
            match Arc::try_unwrap(far) {
                Ok(far) => {
                    drop(far);
                    *over |= side.put(Frame::Forgotten { id }, None).is_err();
                }
                Err(far) => leaving.push((id, far)),
            }
        }
        *owing = !*over && !side.flush().unwrap_or(true);
    }

    fn end(self) {
        let Self { reach, leaving, .. } = self;
        drop(leaving);
        let table = std::mem::take(&mut *reach.table.lock());
        drop(table);
        // Said last: what the connection holds goes with its end, on the thread that ends it.
        let closed = Arc::clone(&reach.closed);
        drop(reach);
        *closed.closed.lock() = true;
        closed.told.notify_all();
    }
}

/// The listening thread, as the others see it.
struct Listening {
    new: Vec<Arc<Reach>>,
    /// Wakes it; nothing where it does not run.
    wake: Option<Arc<OwnedFd>>,
}

static LISTENING: Mutex<Listening> = Mutex::new(Listening { new: Vec::new(), wake: None });

fn enlist(reach: &Arc<Reach>) -> Result<()> {
    let mut listening = LISTENING.lock();
    if listening.wake.is_none() {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| Error::System { what: "eventfd", source: errno.into() })?;
        let wake = Arc::new(fd);
        let own = Arc::clone(&wake);
        let run = move || {
            relax_thread();
            // Should it end by a panic, nothing more is mapped, and ends of connections wait for it in vain, for a while.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| listen(&own)));
        };
        let thread = std::thread::Builder::new().name("twoshot-reach".into()).stack_size(1 << 20).spawn(run);
        thread.map_err(super::super::bootstrap::system("starting a thread"))?;
        listening.wake = Some(wake);
    }
    listening.new.push(Arc::clone(reach));
    drop(listening);
    wake();
    Ok(())
}

fn wake() {
    let wake = LISTENING.lock().wake.clone();
    if let Some(fd) = wake {
        let _ = rustix::io::write(&*fd, &1u64.to_ne_bytes());
    }
}

fn listen(wake: &OwnedFd) {
    let mut all: Vec<Heard> = Vec::new();
    loop {
        let _ = rustix::io::read(wake, &mut [0; 8]);
        {
            let mut listening = LISTENING.lock();
            let new = listening.new.drain(..);
            all.extend(new.map(|reach| Heard { reach, leaving: Vec::new(), over: false, owing: false }));
            if all.is_empty() {
                listening.wake = None;
                return;
            }
        }
        let closing = |heard: &mut Heard| heard.reach.closing.load(Ordering::Acquire);
        all.extract_if(.., closing).for_each(Heard::end);
        all.iter_mut().for_each(Heard::serve);
        wait(wake, &all);
    }
}

/// Until somebody has something to say, or it is time to look again.
fn wait(wake: &OwnedFd, all: &[Heard]) {
    let again = all.iter().any(|heard| heard.owing || !heard.leaving.is_empty());
    let sides: Vec<_> = all.iter().filter(|heard| !heard.over).map(|heard| heard.reach.side.lock()).collect();
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(sides.iter().map(|side| PollFd::from_borrowed_fd(side.as_fd(), PollFlags::IN)));
    let soon = Timespec { tv_sec: 0, tv_nsec: i64::from(AGAIN.subsec_nanos()) };
    if all.is_empty() {
        return;
    }
    let _ = poll(&mut fds, again.then_some(&soon));
}
