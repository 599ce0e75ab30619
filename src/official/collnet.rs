//! The collective network: what NCCL's proxy hands over is reduced by the kernels, on a stream of its own.
//!
//! NCCL's kernels spin on the GPU while a request is under way, so everything that could wait for them (memory, modules,
//! events) is made at connect; a request is kernel launches and the recording of an event, and its test a question to
//! that event. Requests of one communicator come in the same order on all ranks and run in that order.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::address::{HANDLE, Handle};
use super::bootstrap::{Listener, TcpExchange};
use super::clock::{self, Clock};
use super::nics;
use crate::call::{Call, Class, DataType, ReduceOp};
use crate::comm::{Buffers, Communicator, Ready, State, collect};
use crate::config::Config;
use crate::driver::{Context, Event, Place, Scratch, Stream, copy, device_address, fill};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::route::{Agreement, Plan, Route, decide};
use crate::setup::Binding;
use crate::steps::bounded;
use crate::wire::{BLOB, Blob};
use crate::{info, record, warning};

/// Requests of one communicator. NCCL keeps up to 8 steps of up to 8 groups of channels in flight; one that finds none
/// free is told to try again.
const REQUESTS: usize = 128;
/// Private memory for windows of AllGather and ReduceScatter.
const SCRATCH: u64 = 4 << 20;
/// How long the end of a communicator waits for its own kernels.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits for the other ranks to end theirs, before it leaves its memory to a later moment.
const PARTING: Duration = Duration::from_secs(1);

/// A listener waits for the connect that NCCL announces by it. NCCL forgets it where that connect fails, so they are kept
/// here, by number.
struct Listening {
    listener: Listener,
    nic: i32,
}

static LISTENING: Mutex<Option<HashMap<usize, Listening>>> = Mutex::new(None);

/// Opens a listener: its number, and what NCCL carries to the other ranks.
pub fn listen(nic: i32) -> Result<(usize, [u8; HANDLE])> {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let listener = Listener::open(Config::get().interfaces.as_deref())?;
    let handle = listener.handle.encode();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    LISTENING.lock().get_or_insert_default().insert(number, Listening { listener, nic });
    Ok((number, handle))
}

/// Closes a listener, if it is still open.
pub fn close_listen(number: usize) {
    drop(LISTENING.lock().get_or_insert_default().remove(&number));
}

/// Whether the kernels have this type and operation.
pub fn supports(dtype: i32, op: i32) -> bool {
    Call { count: 1, dtype: DataType(dtype), op: ReduceOp(op) }.class().is_some()
}

/// One operation under way.
pub struct Request {
    busy: AtomicBool,
    bytes: AtomicU64,
    event: Event,
    ready: Arc<Ready>,
    clock: Arc<Clock>,
}

impl Request {
    /// Its bytes once it is done. The request is NCCL's to give up then.
    pub fn test(&self) -> Result<Option<u64>> {
        if let Some(fault) = self.ready.fault() {
            return Err(Error::Kernel(fault.to_string()));
        }
        if !self.event.done()? {
            return Ok(None);
        }
        let bytes = self.bytes.load(Ordering::Relaxed);
        self.clock.done(Instant::now());
        self.busy.store(false, Ordering::Release);
        Ok(Some(bytes))
    }

    fn in_flight(&self) -> bool {
        self.busy.load(Ordering::Acquire) && !self.event.done().unwrap_or(false)
    }
}

/// A part of an AllGather's output or of a ReduceScatter's input.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Device address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The window of a global buffer, one share of it per rank, that one AllGather or ReduceScatter is about.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Bytes of a rank's share.
    pub bytes_per_rank: u64,
    /// Where the window begins in the global buffer.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
}

impl Window {
    /// Where this rank's own share meets `[at, at + bytes)` of the window: offset in that piece, offset in the caller's
    /// own buffer, which begins where the share first meets the window, and bytes.
    fn own(&self, rank: u64, at: u64, bytes: u64) -> Option<(u64, u64, u64)> {
        let share = (rank * self.bytes_per_rank, (rank + 1) * self.bytes_per_rank);
        let (from, to) = (self.offset + at, self.offset + at + bytes);
        let (start, end) = (share.0.max(from), share.1.min(to));
        (start < end).then(|| (start - from, start - share.0.max(self.offset), end - start))
    }
}

/// One collective communicator.
pub struct Coll {
    // Before the requests: dropped in the order that `close` says.
    communicator: Communicator,
    ready: Arc<Ready>,
    requests: Vec<Arc<Request>>,
    clock: Arc<Clock>,
    next: AtomicUsize,
    /// Limits without the user's lower one: NCCL has chosen already.
    agreement: Agreement,
    scratch: Scratch,
    stream: Stream,
    exchange: TcpExchange,
    context: Arc<Context>,
}

impl Coll {
    /// Connects the ranks whose handles these are and sets the communicator up. `None`: the ranks agreed that they have
    /// no NVLink domain in common, and said why.
    pub fn connect(handles: &[[u8; HANDLE]], rank: u32, listening: usize) -> Result<Option<Self>> {
        let Some(Listening { listener, nic }) = LISTENING.lock().get_or_insert_default().remove(&listening) else {
            return Err(Error::Protocol("a connect without its listener"));
        };
        let ranks = u32::try_from(handles.len()).map_err(|_| Error::Protocol("too many ranks"))?;
        let root = handles.first().and_then(Handle::decode);
        let root = root.ok_or(Error::Protocol("a handle of somebody else's (is twoshot the plugin of every rank?)"))?;
        collect();
        let deadline = Duration::from_millis(Config::get().setup_timeout_ms);
        let device = nics::ordinal(nic)?;
        let mut exchange = TcpExchange::connect(root, ranks, rank, &listener, deadline)?;
        let context = bounded("retaining the primary context", deadline, move || crate::setup::context(device));
        let own = context.as_ref().ok().map(Arc::clone);
        let communicator = Communicator::default();
        // Which NCCL it is cannot be told here; a program may hold it in itself.
        // Operations are NCCL's own matter here.
        communicator.set_up(&mut exchange, device, context, (0, Binding { unseen: true, ..Binding::default() }))?;
        let (State::Ready(ready), Some(context)) = (communicator.state(), own) else { return Ok(None) };
        let ready = Arc::clone(ready);
        if let Err(error) = alike(&mut exchange) {
            drop(communicator);
            ready.release(PATIENCE, false);
            return Err(error);
        }
        Self::new(communicator, Arc::clone(&ready), exchange, context)
            .map(Some)
            .inspect_err(|_| ready.release(PATIENCE, false))
    }

    fn new(
        communicator: Communicator,
        ready: Arc<Ready>,
        exchange: TcpExchange,
        context: Arc<Context>,
    ) -> Result<Self> {
        let agreement = Agreement { min_bytes: 0, ..*ready.agreement() };
        let room = |class: Class| class.packing().payload(staged(&agreement)).max(agreement.bulk_bytes);
        if Class::ALL.into_iter().any(|class| room(class) < 8) {
            return Err(Error::Protocol("TWOSHOT_MAX_BYTES leaves no room for a single element"));
        }
        let stream = Stream::first(&context)?;
        let clock = Arc::new(Clock::new());
        let request = |_| {
            Ok(Arc::new(Request {
                busy: AtomicBool::new(false),
                bytes: AtomicU64::new(0),
                event: Event::new(&context)?,
                ready: Arc::clone(&ready),
                clock: Arc::clone(&clock),
            }))
        };
        let requests = (0..REQUESTS).map(request).collect::<Result<_>>()?;
        let scratch = Scratch::new(&context, SCRATCH)?;
        let next = AtomicUsize::new(0);
        Ok(Self { communicator, ready, requests, clock, next, agreement, scratch, stream, exchange, context })
    }

    fn take(&self) -> Option<&Arc<Request>> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let order = (0..REQUESTS).map(|i| &self.requests[first.wrapping_add(i) % REQUESTS]);
        order.into_iter().find(|request| !request.busy.swap(true, Ordering::AcqRel))
    }

    /// Issues one operation; `None`: try again.
    fn issue(&self, bytes: u64, queue: impl FnOnce() -> Result<()>) -> Result<Option<&Arc<Request>>> {
        if let Some(fault) = self.communicator.fault(&self.ready) {
            return Err(Error::Kernel(fault.to_string()));
        }
        let begun = Instant::now();
        let Some(request) = self.take() else { return Ok(None) };
        let queued = self.context.enter().and_then(|_entered| {
            queue()?;
            request.event.record(self.stream.as_raw())
        });
        request.bytes.store(bytes, Ordering::Relaxed);
        if let Err(error) = queued {
            request.busy.store(false, Ordering::Release);
            return Err(error);
        }
        self.clock.issued(begun, Instant::now());
        Ok(Some(request))
    }

    fn plan(&self, count: u64, dtype: DataType, op: ReduceOp) -> Result<Plan> {
        match decide(&Call { count, dtype, op }, &self.agreement) {
            Route::Routed(plan) => Ok(plan),
            Route::Stock(_) => Err(Error::Bug("a piece of a collective that the kernels do not take")),
        }
    }

    /// Elements of a piece, the most for which there is a plan, and bytes of one.
    fn piece(&self, dtype: DataType, op: ReduceOp) -> Option<(u64, u64)> {
        let class = Call { count: 1, dtype, op }.class()?;
        let size = dtype.size()?;
        let ring = self.agreement.bulk_bytes / size;
        let through_the_ring = matches!(decide(&Call { count: ring, dtype, op }, &self.agreement), Route::Routed(_));
        let stages = class.packing().payload(staged(&self.agreement)) / size;
        Some((if through_the_ring { ring.max(stages) } else { stages }, size))
    }

    fn launch(&self, plan: Plan, input: u64, output: u64, count: u64) -> Result<()> {
        self.ready.launch_alone(plan, Buffers { input, output, count, stream: self.stream.as_raw() })
    }

    /// Reduces `count` elements of all ranks; payloads that one launch does not take are cut into pieces.
    pub fn allreduce(
        &self,
        input: u64,
        output: u64,
        count: u64,
        dtype: DataType,
        op: ReduceOp,
    ) -> Result<Option<&Arc<Request>>> {
        let piece = self.piece(dtype, op).filter(|(piece, _)| *piece > 0);
        let Some((piece, size)) = piece else { return Err(Error::Protocol("a type or operation without a kernel")) };
        let Some(bytes) = count.checked_mul(size) else { return Err(Error::Protocol("a count beyond 64 bits")) };
        let issued = self.issue(bytes, || {
            let mut done = 0;
            while done < count {
                let now = piece.min(count - done);
                let plan = self.plan(now, dtype, op)?;
                self.launch(plan, input + done * size, output + done * size, now)?;
                done += now;
            }
            Ok(())
        })?;
        if issued.is_some() && count > 0 {
            let plan = self.plan(piece.min(count), dtype, op)?;
            self.communicator.counters.routed(plan.algorithm, bytes);
        }
        Ok(issued)
    }

    /// Gathers a window of all ranks' shares into `parts`. The kernels only reduce, so every rank adds its own share to
    /// zeros: exact, in whole numbers.
    pub fn allgather(&self, own: u64, parts: &[Part], window: Window) -> Result<Option<&Arc<Request>>> {
        let (dtype, op) = (DataType::U8, ReduceOp::SUM);
        let Some((most, _)) = self.piece(dtype, op) else { return Err(Error::Bug("no kernel for bytes")) };
        let rank = u64::from(self.ready.rank());
        self.issue(window.bytes, || {
            pieces(parts, most.min(SCRATCH), |address, at, bytes| {
                fill(&self.scratch, 0, bytes, 0, &self.stream)?;
                if let Some((to, from, bytes)) = window.own(rank, at, bytes) {
                    let (to, from) = (Place::Device(self.scratch.address() + to), Place::Device(own + from));
                    copy(&self.context, to, from, bytes, &self.stream)?;
                }
                self.launch(self.plan(bytes, dtype, op)?, self.scratch.address(), address, bytes)
            })
        })
    }

    /// Reduces a window of all ranks' inputs and keeps this rank's share of it.
    pub fn reduce_scatter(
        &self,
        parts: &[Part],
        own: u64,
        window: Window,
        dtype: DataType,
        op: ReduceOp,
    ) -> Result<Option<&Arc<Request>>> {
        let Some((most, size)) = self.piece(dtype, op) else {
            return Err(Error::Protocol("a type or operation without a kernel"));
        };
        if parts.iter().any(|part| !part.bytes.is_multiple_of(size)) {
            return Err(Error::Protocol("a part of a ReduceScatter that cuts an element"));
        }
        let rank = u64::from(self.ready.rank());
        self.issue(window.bytes, || {
            pieces(parts, most.min(SCRATCH / size) * size, |address, at, bytes| {
                let count = bytes / size;
                self.launch(self.plan(count, dtype, op)?, address, self.scratch.address(), count)?;
                if let Some((from, to, bytes)) = window.own(rank, at, bytes) {
                    let (to, from) = (Place::Device(own + to), Place::Device(self.scratch.address() + from));
                    copy(&self.context, to, from, bytes, &self.stream)?;
                }
                Ok(())
            })
        })
    }

    /// Whether the kernels can work on memory at this address: all device memory, and host memory that CUDA has pinned and
    /// that the device sees under the address the host uses.
    pub fn takes_memory(address: u64, host: bool) -> bool {
        !host || device_address(address) == Some(address)
    }

    /// Ends the communicator. Requests in flight are given up: their kernels are told to leave first. Where other ranks
    /// have not ended, as after an abort, their kernels may still store into this rank's memory: it goes later then.
    pub fn close(self) {
        let Self { communicator, ready, requests, clock, scratch, stream, exchange, context, .. } = self;
        collect();
        let device = context.device().ordinal();
        let marked = ready.mark(stream.as_raw());
        if requests.iter().any(|request| request.in_flight()) {
            warning!(device, "collnet: a communicator is closed with requests in flight");
            communicator.cancel();
        }
        info!(
            device,
            "collnet communicator ends: {}; requests: {}",
            communicator.counters,
            clock::Text(clock.totals())
        );
        drop(requests);
        drop(communicator);
        // Copies of gathered windows too. What does not end is reported by the release.
        let idle = matches!(stream.wait(PATIENCE), Ok(true));
        match marked {
            Err(error) if !idle => {
                warning!(device, "{error} while a collnet communicator ends: its memory is kept");
                std::mem::forget(ready);
            }
            _ => ready.release(PATIENCE, !exchange.part(PARTING)),
        }
        if !idle {
            // What is still to come works on them.
            std::mem::forget((scratch, stream));
        }
        if let Some(path) = &Config::get().stats {
            record::write(path);
        }
    }
}

/// Goes through the parts of a window in pieces of at most `most` bytes: address, offset in the window, bytes.
fn pieces(parts: &[Part], most: u64, mut visit: impl FnMut(u64, u64, u64) -> Result<()>) -> Result<()> {
    let mut at = 0;
    for part in parts {
        let mut done = 0;
        while done < part.bytes {
            let now = most.max(1).min(part.bytes - done);
            visit(part.address + done, at, now)?;
            (done, at) = (done + now, at + now);
        }
    }
    Ok(())
}

/// Whether all ranks' tuners prefer CollNet for the same sizes and ask for as many channels: else NCCL's ranks would choose differently and wait for
/// each other.
fn alike(exchange: &mut TcpExchange) -> Result<()> {
    let preferences = match &Config::get().tuning {
        Some(Ok(tuning)) => tuning.preferences(),
        Some(Err(_)) | None => 0,
    };
    let mut mine: Blob = [0; BLOB];
    mine[..8].copy_from_slice(&preferences.to_le_bytes());
    mine[8..12].copy_from_slice(&Config::get().channels.to_le_bytes());
    let all = exchange.allgather(&mine, "comparing tuning files")?;
    if all.iter().any(|theirs| theirs[..8] != mine[..8]) {
        return Err(Error::Protocol(
            "TWOSHOT_TUNING_FILE prefers CollNet for other sizes on some rank: NCCL goes without it",
        ));
    }
    if all.iter().any(|theirs| theirs[8..12] != mine[8..12]) {
        return Err(Error::Protocol("NCCL_MIN_NCHANNELS is another number on some rank: NCCL goes without CollNet"));
    }
    Ok(())
}

/// Largest payload, in bytes carried, that goes through the stages.
fn staged(agreement: &Agreement) -> u64 {
    agreement.twoshot_bytes.max(agreement.oneshot_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_type_and_operation_of_nccl_is_supported_and_no_other() {
        for dtype in -1..16 {
            for op in -1..8 {
                assert_eq!(supports(dtype, op), (0..12).contains(&dtype) && (0..5).contains(&op), "{dtype} {op}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_shares_of_all_ranks_cover_every_byte_of_a_piece_once(
            share in 1u64..50, ranks in 1u64..7, cut in prop::collection::vec(any::<prop::sample::Index>(), 4),
        ) {
            let total = share * ranks;
            let mut cut: Vec<u64> = cut.iter().map(|at| at.index(total as usize + 1) as u64).collect();
            cut.sort_unstable();
            let window = Window { bytes_per_rank: share, offset: cut[0], bytes: cut[3] - cut[0] };
            let (at, bytes) = (cut[1] - cut[0], cut[2] - cut[1]);
            let mut owner = vec![None; bytes as usize];
            for rank in 0..ranks {
                let Some((in_piece, in_own, n)) = window.own(rank, at, bytes) else { continue };
                for i in 0..n {
                    let global = window.offset + at + in_piece + i;
                    prop_assert_eq!(owner[(in_piece + i) as usize].replace(rank), None);
                    prop_assert_eq!(global / share, rank);
                    // The own buffer begins at the share's first byte inside the window.
                    prop_assert_eq!(in_own + i, global - (rank * share).max(window.offset));
                }
            }
            prop_assert!(owner.iter().all(Option::is_some));
        }
    }
}
