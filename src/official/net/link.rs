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
use super::wire::Pipe;
use crate::config::Config;
use crate::domain::MIN_ARCH;
use crate::driver::{
    Allocation, Context, Device, Event, FabricFacts, HandleType, Imported, Mapping, Reservation, Shareable, Stream,
    fabric_facts, granularity, with_relaxed_capture,
};
use crate::error::{Error, Result};
use crate::handoff::{Desk, Peer};
use crate::setup::{HostIdentity, build, overridden};

/// Bytes of a slot of the window.
pub const SLOT: u64 = 512 << 10;
/// Slots of a window: what may be under way at once.
pub const SLOTS: usize = 4;

/// Memory on the receiver's GPU, as one end sees it.
pub struct Window {
    mapping: Mapping,
    /// How its handle travelled: the name of a fabric handle does not keep the memory.
    pub handle: HandleType,
}

impl Window {
    fn new(memory: &Arc<Allocation>, context: &Arc<Context>, align: u64, handle: HandleType) -> Result<Self> {
        let reservation = Reservation::new(context, memory.bytes(), align)?;
        Ok(Self { mapping: Mapping::new(&reservation, 0, memory)?, handle })
    }

    /// Where a slot begins.
    pub fn slot(&self, slot: u32) -> u64 {
        self.mapping.address() + u64::from(slot) * SLOT
    }
}

/// One end of a connection, ready for data.
pub struct Link {
    /// To the other end.
    pub pipe: Pipe,
    /// Where data passes.
    pub window: Window,
    /// For this end's copies.
    pub stream: Stream,
    /// One for each slot.
    pub events: Vec<Event>,
    /// Of this end's GPU.
    pub context: Arc<Context>,
}

impl Link {
    fn new(socket: TcpStream, window: Window, context: Arc<Context>) -> Result<Self> {
        let events = (0..SLOTS).map(|_| Event::new(&context)).collect::<Result<_>>()?;
        let stream = Stream::first(&context)?;
        Ok(Self { pipe: Pipe::new(socket).map_err(system("a connection"))?, window, stream, events, context })
    }
}

/// A set-up in progress on a thread of its own.
pub struct Pending {
    result: Receiver<Result<Link>>,
    given_up: Arc<AtomicBool>,
}

impl Pending {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<Link> + Send + 'static) -> Result<Self> {
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
    pub fn poll(&self) -> Result<Option<Link>> {
        match self.result.try_recv() {
            Ok(result) => result.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Error::Bug("setting a connection up vanished")),
        }
    }

    /// The sender's side.
    pub fn connect(handle: Handle, ordinal: i32) -> Result<Self> {
        Self::start(move |_| connecting(handle, ordinal))
    }

    /// The receiver's side.
    pub fn accept(listener: Arc<Listener>, ordinal: i32) -> Result<Self> {
        Self::start(move |given_up| accepting(&listener, ordinal, given_up))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn deadline() -> Duration {
    Duration::from_millis(Config::get().setup_timeout_ms)
}

/// What an end says of itself.
struct Greeting {
    token: [u8; 16],
    build: u64,
    host: [u8; 16],
    fabric: FabricFacts,
    fabric_handles: bool,
}

const GREETING: usize = 16 + 8 + 16 + 1 + 16 + 4 + 1;

impl Greeting {
    fn of(token: [u8; 16], ordinal: i32) -> Result<Self> {
        let config = Config::get();
        let facts = Device::new(ordinal)?.facts()?;
        if facts.arch < MIN_ARCH || !facts.vmm || !facts.fd_handles {
            return Err(Error::Protocol("this GPU cannot share memory as the network needs it"));
        }
        let fabric = overridden(fabric_facts(&facts.bus_id).unwrap_or_default(), config);
        let host = HostIdentity::read(config)?.bytes();
        Ok(Self { token, build: build(), host, fabric, fabric_handles: facts.fabric_handles })
    }

    fn encode(&self) -> [u8; GREETING] {
        let mut out = [0; GREETING];
        out[..16].copy_from_slice(&self.token);
        out[16..24].copy_from_slice(&self.build.to_le_bytes());
        out[24..40].copy_from_slice(&self.host);
        out[40] = u8::from(self.fabric.completed);
        out[41..57].copy_from_slice(&self.fabric.uuid);
        out[57..61].copy_from_slice(&self.fabric.clique.to_le_bytes());
        out[61] = u8::from(self.fabric_handles);
        out
    }

    fn decode(bytes: &[u8; GREETING]) -> Option<Self> {
        let mut clique = [0; 4];
        clique.copy_from_slice(&bytes[57..61]);
        Some(Self {
            token: bytes[..16].try_into().ok()?,
            build: u64::from_le_bytes(bytes[16..24].try_into().ok()?),
            host: bytes[24..40].try_into().ok()?,
            fabric: FabricFacts {
                completed: bytes[40] == 1,
                uuid: bytes[41..57].try_into().ok()?,
                clique: u32::from_le_bytes(clique),
            },
            fabric_handles: bytes[61] == 1,
        })
    }

    /// How memory can be shared with another end.
    fn way_to(&self, other: &Self) -> Result<HandleType> {
        if self.build != other.build {
            return Err(Error::Protocol("the ranks run different versions of twoshot"));
        }
        if self.host == other.host {
            return Ok(HandleType::Fd);
        }
        let one_fabric = self.fabric.completed
            && other.fabric.completed
            && self.fabric.uuid != [0; 16]
            && (self.fabric.uuid, self.fabric.clique) == (other.fabric.uuid, other.fabric.clique);
        if one_fabric && self.fabric_handles && other.fabric_handles {
            return Ok(HandleType::Fabric);
        }
        Err(Error::Protocol("two ranks are in no NVLink domain in common: set TWOSHOT_NET to the network between them"))
    }
}

/// The receiver's answer: how to open its window.
const ANSWER: usize = 1 + 8 + 64 + 16 + 16;
const REFUSED: u8 = 0;
const BY_FD: u8 = 1;
const BY_NAME: u8 = 2;

fn said<T>(result: std::io::Result<T>) -> Result<T> {
    result.map_err(|_| Error::Peer { rank: u32::MAX, step: "setting a connection up" })
}

fn connecting(handle: Handle, ordinal: i32) -> Result<Link> {
    let greeting = Greeting::of(handle.token, ordinal)?;
    let context = crate::setup::context(ordinal)?;
    let mut socket = connect(handle.address, Instant::now() + deadline())?;
    said(write_all(&mut socket, &greeting.encode(), Instant::now() + deadline()))?;
    // The other end accepts when its NCCL comes to it: as long as it lives it is waited for, as NCCL would.
    let mut answer = [0; ANSWER];
    said(read_exact(&mut socket, &mut answer, Instant::now() + Duration::from_secs(1 << 30)))?;
    let opened = open(&answer, &context);
    said(write_all(&mut socket, &[u8::from(opened.is_ok())], Instant::now() + deadline()))?;
    Link::new(socket, opened?, context)
}

fn open(answer: &[u8; ANSWER], context: &Arc<Context>) -> Result<Window> {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&answer[1..9]);
    let bytes = u64::from_le_bytes(bytes);
    let (mut name, mut desk, mut token) = ([0; 64], [0; 16], [0; 16]);
    name.copy_from_slice(&answer[9..73]);
    desk.copy_from_slice(&answer[73..89]);
    token.copy_from_slice(&answer[89..]);
    let (handle, memory) = match answer[0] {
        BY_FD => {
            let peer = [Peer { rank: 0, name: desk, token }];
            let fds = Desk::open(1)?.trade(1, 0, None, &peer, deadline())?;
            let fd = fds.first().ok_or(Error::Bug("a descriptor got lost"))?;
            (HandleType::Fd, Allocation::import(context, bytes, Imported::Fd(fd.as_fd()))?)
        }
        BY_NAME => (HandleType::Fabric, Allocation::import(context, bytes, Imported::Fabric(&name))?),
        _ => return Err(Error::Protocol("the receiver could not offer its memory (its log says why)")),
    };
    if bytes < SLOT * SLOTS as u64 {
        return Err(Error::Protocol("a window of another size"));
    }
    Window::new(&memory, context, granularity(context, handle)?, handle)
}

fn accepting(listener: &Listener, ordinal: i32, given_up: &AtomicBool) -> Result<Link> {
    loop {
        if given_up.load(Ordering::Relaxed) {
            return Err(Error::Protocol("the listener was closed"));
        }
        let Ok((mut socket, _)) = listener.socket.accept() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let prepared = socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true));
        let mut bytes = [0; GREETING];
        // A stranger may call and say anything, or nothing for a while.
        let greeted = prepared.and_then(|()| read_exact(&mut socket, &mut bytes, Instant::now() + deadline()));
        let Some(greeting) = greeted.ok().and_then(|()| Greeting::decode(&bytes)) else { continue };
        if greeting.token == listener.handle.token {
            return offer(socket, &greeting, ordinal);
        }
    }
}

fn offer(mut socket: TcpStream, theirs: &Greeting, ordinal: i32) -> Result<Link> {
    let until = || Instant::now() + deadline();
    let offered = Greeting::of([0; 16], ordinal).and_then(|ours| ours.way_to(theirs)).and_then(|handle| {
        let context = crate::setup::context(ordinal)?;
        let align = granularity(&context, handle)?;
        let memory = Allocation::create(&context, (SLOT * SLOTS as u64).next_multiple_of(align), handle)?;
        let window = Window::new(&memory, &context, align, handle)?;
        let shareable = memory.export(handle)?;
        Ok((context, memory, window, shareable))
    });
    let mut answer = [0; ANSWER];
    let (context, memory, window, shareable) = match offered {
        Ok(offered) => offered,
        Err(error) => {
            answer[0] = REFUSED;
            said(write_all(&mut socket, &answer, until()))?;
            return Err(error);
        }
    };
    answer[1..9].copy_from_slice(&memory.bytes().to_le_bytes());
    match &shareable {
        Shareable::Fabric(name) => {
            answer[0] = BY_NAME;
            answer[9..73].copy_from_slice(name);
            said(write_all(&mut socket, &answer, until()))?;
        }
        Shareable::Fd(fd) => {
            let desk = Desk::open(1)?;
            answer[0] = BY_FD;
            answer[73..89].copy_from_slice(&desk.name);
            answer[89..].copy_from_slice(&desk.token);
            said(write_all(&mut socket, &answer, until()))?;
            desk.trade(0, 0, Some((fd.as_fd(), 1)), &[], deadline())?;
        }
    }
    let mut opened = [0];
    said(read_exact(&mut socket, &mut opened, until()))?;
    if opened != [1] {
        return Err(Error::Protocol("the sender could not open this rank's memory (its log says why)"));
    }
    Link::new(socket, window, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting(host: u8, cluster: u8, clique: u32) -> Greeting {
        Greeting {
            token: [1; 16],
            build: 7,
            host: [host; 16],
            fabric: FabricFacts { completed: true, uuid: [cluster; 16], clique },
            fabric_handles: true,
        }
    }

    #[test]
    fn two_ends_share_by_descriptor_on_one_host_by_name_in_one_clique_and_else_not_at_all() {
        let ours = greeting(1, 5, 2);
        assert_eq!(ours.way_to(&greeting(1, 9, 9)).unwrap(), HandleType::Fd);
        assert_eq!(ours.way_to(&greeting(2, 5, 2)).unwrap(), HandleType::Fabric);
        for other in [greeting(2, 5, 3), greeting(2, 6, 2), Greeting { fabric_handles: false, ..greeting(2, 5, 2) }] {
            let error = ours.way_to(&other).unwrap_err().to_string();
            assert!(error.contains("TWOSHOT_NET"), "{error}");
        }
        assert!(greeting(1, 0, 2).way_to(&greeting(2, 0, 2)).is_err());
        assert!(ours.way_to(&Greeting { build: 8, ..greeting(1, 5, 2) }).is_err());
    }

    #[test]
    fn a_greeting_comes_back_as_it_was() {
        let said = greeting(3, 4, 0x0102_0304).encode();
        let heard = Greeting::decode(&said).expect("a greeting");
        assert_eq!(heard.encode(), said);
        assert_eq!((heard.build, heard.fabric.clique, heard.fabric_handles), (7, 0x0102_0304, true));
    }
}
