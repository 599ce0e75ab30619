//! Setting a connection up: the receiver's GPU gets a window, which the sender maps. Done on a thread of its own at both
//! ends, because NCCL's `connect` and `accept` must not block, and the two ends wait for each other.
#![forbid(unsafe_code)]

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use super::super::address::Handle;
use super::super::bootstrap::{Listener, connect, read_exact, system, write_all};
use super::announce::Announcements;
use super::greeting::{Apart, GREETING, Greeting};
use super::link::{Link, Room, Window};
use super::pipe::Pipe;
use super::reach::Reached;
use super::ring::Ring;
use super::side::Side;
use crate::config::Config;
use crate::driver::{Allocation, Context, HandleType, Imported, Shareable, granularity, with_relaxed_capture};
use crate::error::{Error, Result};
use crate::handoff::{Channel, Desk, Peer};

/// A sender's end.
pub type Sender = (Link, Reached);
/// A receiver's.
pub type Receiving = (Link, Announcements);

/// A set-up in progress on a thread of its own.
pub struct Pending<T> {
    result: Receiver<Result<T>>,
    given_up: Arc<AtomicBool>,
}

impl<T: Send + 'static> Pending<T> {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Result<Self> {
        let (sender, result) = sync_channel(1);
        let given_up = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&given_up);
        let run = move || {
            let work = std::panic::AssertUnwindSafe(|| with_relaxed_capture(|| work(&seen)));
            let result = std::panic::catch_unwind(work).unwrap_or(Err(Error::Bug("setting a connection up panicked")));
            // Nobody may be listening any more; what was set up is released here then.
            let _ = sender.send(result);
        };
        let thread = std::thread::Builder::new().name("twoshot-net".into()).stack_size(1 << 20).spawn(run);
        thread.map_err(system("starting a thread"))?;
        Ok(Self { result, given_up })
    }

    /// The link once it is there.
    pub fn poll(&self) -> Result<Option<T>> {
        match self.result.try_recv() {
            Ok(result) => result.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Error::Bug("setting a connection up vanished")),
        }
    }
}

impl Pending<Sender> {
    /// The sender's side.
    pub fn connect(handle: Handle, ordinal: i32) -> Result<Self> {
        Self::start(move |_| connecting(handle, ordinal))
    }
}

impl Pending<Receiving> {
    /// The receiver's side.
    pub fn accept(listener: Arc<Listener>, ordinal: i32) -> Result<Self> {
        Self::start(move |given_up| accepting(&listener, ordinal, given_up))
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn deadline() -> Duration {
    Duration::from_millis(Config::get().setup_timeout_ms)
}

/// The receiver's answer: how to open its window.
const ANSWER: usize = 1 + 8 + 64 + 16 + 16;
/// Or what keeps the two apart.
const REFUSED: u8 = 0;
const BY_FD: u8 = 1;
const BY_NAME: u8 = 2;
/// What the first two descriptors on the way beside the connection are of.
const OF_WINDOW: u8 = 1;
const OF_RING: u8 = 2;

fn said<T>(result: std::io::Result<T>) -> Result<T> {
    result.map_err(|_| Error::Peer { rank: u32::MAX, step: "setting a connection up" })
}

fn soon() -> Instant {
    Instant::now() + deadline()
}

fn connecting(handle: Handle, ordinal: i32) -> Result<Sender> {
    let mut greeting = Greeting::of(handle.token, ordinal)?;
    let context = crate::setup::context(ordinal)?;
    let mut socket = connect(handle.address, soon())?;
    said(write_all(&mut socket, &greeting.encode(), soon()))?;
    // The other end accepts when its NCCL comes to it: as long as it lives it is waited for, as NCCL would.
    let mut answer = [0; ANSWER];
    said(read_exact(&mut socket, &mut answer, Instant::now() + Duration::from_secs(1 << 30)))?;
    let opened = open(&answer, &context);
    said(write_all(&mut socket, &[u8::from(opened.is_ok())], soon()))?;
    let (window, local) = opened?;
    let kind = window.handle;
    let (side, ring) = match local {
        Some((channel, ring)) => (Side::Local(channel, Default::default()), Some(ring)),
        None => {
            greeting.beside = true;
            let mut beside = connect(handle.address, soon())?;
            said(write_all(&mut beside, &greeting.encode(), soon()))?;
            (Side::Remote(Box::new(pipe(beside, None)?)), None)
        }
    };
    let link = Link::new(pipe(socket, ring)?, window, Arc::clone(&context))?;
    Ok((link, Reached::new(context, kind, side)?))
}

fn pipe(socket: TcpStream, ring: Option<Ring>) -> Result<Pipe> {
    Pipe::new(socket, ring).map_err(system("a connection"))
}

/// The receiver's window and, on one host, the ways beside it.
fn open(answer: &[u8; ANSWER], context: &Arc<Context>) -> Result<(Window, Option<(Channel, Ring)>)> {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&answer[1..9]);
    let bytes = u64::from_le_bytes(bytes);
    let (mut name, mut desk, mut token) = ([0; 64], [0; 16], [0; 16]);
    name.copy_from_slice(&answer[9..73]);
    desk.copy_from_slice(&answer[73..89]);
    token.copy_from_slice(&answer[89..]);
    let (handle, memory, local) = match answer[0] {
        BY_FD => {
            let peer = [Peer { rank: 0, name: desk, token }];
            let mut fds = Desk::open(1)?.trade(1, 0, None, &peer, deadline())?;
            let channel = Channel::of(fds.pop().ok_or(Error::Bug("a descriptor got lost"))?);
            let until = soon();
            let fd_of = |what: u8| {
                let mut word = [0];
                let fd = channel.wait(&mut word, until)?.filter(|_| word == [what]);
                fd.ok_or(Error::Protocol("a descriptor of something else"))
            };
            let (window, ring) = (fd_of(OF_WINDOW)?, fd_of(OF_RING)?);
            let memory = Allocation::import(context, bytes, Imported::Fd(window.as_fd()))?;
            (HandleType::Fd, memory, Some((channel, Ring::open(ring.as_fd())?)))
        }
        BY_NAME => (HandleType::Fabric, Allocation::import(context, bytes, Imported::Fabric(&name))?, None),
        refusal => {
            let failed = Error::Protocol("the receiver could not offer its memory (its log says why)");
            return Err(Apart::from_code(refusal).map_or(failed, Apart::error));
        }
    };
    Ok((Window::new(&memory, context, granularity(context, handle)?, handle, None)?, local))
}

/// Waits for a caller that knows the token and calls for this.
fn called(
    listener: &Listener,
    beside: bool,
    until: Option<Instant>,
    given_up: &AtomicBool,
) -> Result<(TcpStream, Greeting)> {
    loop {
        if given_up.load(Ordering::Relaxed) {
            return Err(Error::Protocol("the listener was closed"));
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Error::Peer { rank: u32::MAX, step: "setting a connection up" });
        }
        let Ok((mut socket, _)) = listener.socket.accept() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let prepared = socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true));
        let mut bytes = [0; GREETING];
        // A stranger may call and say anything, or nothing for a while.
        let greeted = prepared.and_then(|()| read_exact(&mut socket, &mut bytes, soon()));
        let Some(greeting) = greeted.ok().and_then(|()| Greeting::decode(&bytes)) else { continue };
        if greeting.token == listener.handle.token && greeting.beside == beside {
            return Ok((socket, greeting));
        }
    }
}

fn accepting(listener: &Listener, ordinal: i32, given_up: &AtomicBool) -> Result<Receiving> {
    let (mut socket, theirs) = called(listener, false, None, given_up)?;
    let mut refusal = REFUSED;
    let way = Greeting::of([0; 16], ordinal).and_then(|ours| {
        ours.way_to(&theirs).map_err(|apart| {
            refusal = apart.code();
            apart.error()
        })
    });
    let offered = way.and_then(|handle| {
        let context = crate::setup::context(ordinal)?;
        let (align, room) = (granularity(&context, handle)?, Room::take(handle));
        let memory = Allocation::create(&context, room.bytes.next_multiple_of(align), handle)?;
        let window = Window::new(&memory, &context, align, handle, Some(room))?;
        let shareable = memory.export(handle)?;
        Ok((context, memory, window, shareable))
    });
    let mut answer = [0; ANSWER];
    let (context, memory, window, shareable) = match offered {
        Ok(offered) => offered,
        Err(error) => {
            answer[0] = refusal;
            said(write_all(&mut socket, &answer, soon()))?;
            return Err(error);
        }
    };
    answer[1..9].copy_from_slice(&memory.bytes().to_le_bytes());
    let local = match &shareable {
        Shareable::Fabric(name) => {
            answer[0] = BY_NAME;
            answer[9..73].copy_from_slice(name);
            said(write_all(&mut socket, &answer, soon()))?;
            None
        }
        Shareable::Fd(fd) => {
            let (desk, (channel, theirs)) = (Desk::open(1)?, Channel::pair()?);
            let (ring, of_ring) = Ring::create()?;
            answer[0] = BY_FD;
            answer[73..89].copy_from_slice(&desk.name);
            answer[89..].copy_from_slice(&desk.token);
            said(write_all(&mut socket, &answer, soon()))?;
            desk.trade(0, 0, Some((theirs.as_fd(), 1)), &[], deadline())?;
            drop(theirs);
            if !channel.send(&[OF_WINDOW], Some(fd.as_fd()))? || !channel.send(&[OF_RING], Some(of_ring.as_fd()))? {
                return Err(Error::Protocol("two descriptors find no room in a socket"));
            }
            Some((channel, ring))
        }
    };
    let mut opened = [0];
    said(read_exact(&mut socket, &mut opened, soon()))?;
    if opened != [1] {
        return Err(Error::Protocol("the sender could not open this rank's memory (its log says why)"));
    }
    let handle = window.handle;
    let (side, ring) = match local {
        Some((channel, ring)) => (Side::Local(channel, Default::default()), Some(ring)),
        None => {
            let (beside, _) = called(listener, true, Some(soon()), given_up)?;
            (Side::Remote(Box::new(pipe(beside, None)?)), None)
        }
    };
    let link = Link::new(pipe(socket, ring)?, window, Arc::clone(&context))?;
    Ok((link, Announcements::new(context, handle, side)))
}
