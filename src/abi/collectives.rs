//! `ncclAllReduce` and the other collectives. The others are stock's; they pass here because a communicator is set up
//! at its first collective of any kind, so that all ranks do it at the same call.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use super::deferred::{self, First, defers, refused};
use super::exchange::{StockExchange, retain};
use super::order::behind_earlier_stock;
use super::{Code, code, group, guard, inside, record_at_exit, result_of, stock, thread, transparent, watch_forks};
use crate::call::{Call, DataType, ReduceOp};
use crate::comm::{self, Buffers, Communicator, Ready, State, lost};
use crate::config::Config;
use crate::driver::{RawStream, capturing, with_relaxed_capture};
use crate::intercept::{CallConfig, Comm, Stock, Stream};
use crate::route::{Plan, Reason, Route, decide, decide_scaled};
use crate::stats::{row_of, row_of_stock};
use crate::warning;

/// Sets the communicator up if this is the moment: its first collective outside captures; in a group, at the group's
/// end. All ranks come by here at the same call, because NCCL wants the same collectives in the same order on all of
/// them; its creation would not do, since the first communicator of a process is made before this library is loaded.
pub(super) fn set_up(
    stock: &Stock,
    communicator: &Arc<Communicator>,
    comm: Comm,
    stream: RawStream,
) -> Result<(), Code> {
    if !matches!(communicator.state(), State::New) || capturing(stream) || !communicator.claim() {
        return Ok(());
    }
    // Nothing is freed on the way, nor collected: what the program has queued may wait for peers that come to their part
    // only behind this call. And the capture of some other thread is none of it.
    let claimed = || set_up_claimed(stock, communicator, comm, stream);
    let result = with_relaxed_capture(|| communicator.remains.keep(claimed));
    if communicator.cancelled() {
        // Its abort has come by meanwhile, or does not wait any more.
        communicator.remains.lay_aside();
    }
    result
}

fn set_up_claimed(stock: &Stock, communicator: &Arc<Communicator>, comm: Comm, stream: RawStream) -> Result<(), Code> {
    watch_forks();
    record_at_exit();
    let functions = &stock.nccl;
    let (mut rank, mut ranks, mut device) = (0, 0, 0);
    // SAFETY: the caller's communicator, which stock NCCL checks, and valid out-pointers.
    let known = unsafe {
        (functions.comm_user_rank)(comm, &mut rank) == code::SUCCESS
            && (functions.comm_count)(comm, &mut ranks) == code::SUCCESS
            && (functions.comm_cu_device)(comm, &mut device) == code::SUCCESS
    };
    let (Ok(rank), Ok(ranks), true) = (u32::try_from(rank), u32::try_from(ranks), known) else {
        // Not a communicator, or not complete yet: stock NCCL tells the caller.
        communicator.unclaim();
        comm::dismiss(comm as usize);
        return Ok(());
    };
    if ranks < 2 {
        communicator.decline();
        return Ok(());
    }
    let bound = super::binding::again();
    let _settled = Settled(communicator);
    let deadline = Duration::from_millis(Config::get().setup_timeout_ms);
    let outcome = inside(
        |_| {
            let context = retain(device, deadline);
            let own = context.as_ref().ok().map(Arc::clone);
            let mut exchange =
                StockExchange::new(stock, (communicator, comm), device, (rank, ranks), own, stream, deadline)?;
            communicator.set_up(&mut exchange, device, context, (stock.version, bound))
        },
        stock,
    );
    outcome.map_err(|error| {
        warning!(device, "rank {rank}/{ranks}: {error}");
        result_of(&error)
    })
}

/// Whatever way a set-up ends, the communicator is in a state behind it.
struct Settled<'a>(&'a Communicator);

impl Drop for Settled<'_> {
    fn drop(&mut self) {
        self.0.settle();
    }
}

/// Sets up several at once, each on a thread of its own: one thread may drive all ranks, none of which can be set up alone,
/// and this one may have a group open. The first code that is no success counts.
pub(super) fn set_up_all(stock: &'static Stock, firsts: &[First]) -> Code {
    let mut result = code::SUCCESS;
    std::thread::scope(|scope| {
        let threads: Vec<_> = firsts
            .iter()
            .map(|First { communicator, comm, stream }| {
                let (comm, stream) = (*comm as usize, *stream);
                let work = || move || set_up(stock, communicator, comm as Comm, stream);
                // Peers are in set-up already, or will be: a rank that stays away is lost to them.
                let thread = thread::start(scope, "twoshot-group", work);
                if let Err(error) = &thread {
                    warning!(-1, "a thread for the set-up of a communicator could not be started: {error}");
                    communicator.settle();
                }
                thread
            })
            .collect();
        for thread in threads {
            let outcome = match thread {
                Ok(thread) => thread.join().unwrap_or(Err(code::INTERNAL)),
                Err(_) => Err(code::SYSTEM),
            };
            if let (code::SUCCESS, Err(failed)) = (result, outcome) {
                result = failed;
            }
        }
    });
    result
}

/// What every other collective does before it goes to stock.
fn passing(stock: &'static Stock, comm: Comm, stream: Stream, call: impl FnOnce() -> Code + 'static) -> Code {
    if comm.is_null() || transparent() {
        return call();
    }
    let communicator = comm::find(comm as usize);
    let queue = RawStream(stream as usize);
    if group::open() {
        return group::pass(stock, &communicator, (comm, queue), true, call);
    }
    if let Some(refused) = refused(&communicator) {
        return refused;
    }
    if defers(&communicator, queue) && communicator.deferral.begin() {
        let own = Arc::clone(&communicator);
        let calls = Box::new(move || in_order(&own, queue, call));
        return deferred::start(stock, vec![First { communicator, comm, stream: queue }], calls);
    }
    match set_up(stock, &communicator, comm, queue) {
        Ok(()) => in_order(&communicator, queue, call),
        Err(code) => code,
    }
}

/// Makes a call of stock NCCL so that it runs in its turn among the routed ones. Stock NCCL orders its own.
pub(super) fn in_order(communicator: &Communicator, stream: RawStream, call: impl FnOnce() -> Code) -> Code {
    if let Err(failed) = before_stock(communicator, stream) {
        return failed;
    }
    let result = call();
    match behind_stock(communicator, stream, result == code::IN_PROGRESS) {
        Err(failed) if result == code::SUCCESS => failed,
        _ => result,
    }
}

/// Before stock NCCL queues something of this communicator on a stream.
pub(super) fn before_stock(communicator: &Communicator, stream: RawStream) -> Result<(), Code> {
    match communicator.state() {
        State::Ready(ready) => ready.before_stock(stream).map_err(|error| failed(&error)),
        _ => Ok(()),
    }
}

/// Behind it. `late`: stock NCCL queues it in its own time.
pub(super) fn behind_stock(communicator: &Communicator, stream: RawStream, late: bool) -> Result<(), Code> {
    match communicator.state() {
        State::Ready(ready) => ready.behind_stock(stream, late).map_err(|error| failed(&error)),
        _ => Ok(()),
    }
}

/// What `ncclAllReduce` was given.
#[derive(Clone, Copy)]
pub(super) struct Arguments {
    pub send: *const c_void,
    pub receive: *mut c_void,
    pub count: usize,
    pub dtype: c_int,
    pub op: c_int,
    pub comm: Comm,
    pub stream: Stream,
}

impl Arguments {
    /// What all ranks give alike.
    fn call(&self) -> Call {
        Call { count: self.count as u64, dtype: DataType(self.dtype), op: ReduceOp(self.op) }
    }

    /// The call as the caller made it, to stock NCCL.
    pub fn to_stock(self, stock: &Stock) -> Code {
        let Self { send, receive, count, dtype, op, comm, stream } = self;
        // SAFETY: every argument is the caller's own, untouched.
        unsafe { (stock.nccl.all_reduce)(send, receive, count, dtype, op, comm, stream) }
    }
}

/// Where one call goes.
pub(super) enum Placement {
    /// Our kernel.
    Routed(Plan),
    /// Stock NCCL, for this reason; counted.
    Stock(Reason),
    /// It fails.
    Failed(Code),
}

/// Decides one call, and counts it if it is stock NCCL's.
pub(super) fn place(communicator: &Communicator, a: &Arguments) -> Placement {
    let reason = match communicator.state() {
        State::Ready(ready) => {
            if let Some(fault) = communicator.fault(ready) {
                return Placement::Failed(fault_code(fault.kind));
            }
            if !communicator.takes_calls(ready) {
                // Revoked, finalized or suspended: stock NCCL says so.
                Reason::Declined
            } else if a.send.is_null() || a.receive.is_null() {
                // Stock NCCL answers for its own rules about arguments.
                Reason::Empty
            } else {
                match route(communicator, ready, &a.call()) {
                    Route::Stock(reason) => reason,
                    Route::Routed(plan) => return Placement::Routed(plan),
                }
            }
        }
        State::New => Reason::NotReady,
        State::Declined => Reason::Declined,
        State::Lost => return Placement::Failed(failed(&lost())),
    };
    communicator.counters.stock(reason, a.call().bytes());
    Placement::Stock(reason)
}

/// Decides one call of a ready communicator. An operation that this rank has not seen made is stock NCCL's: the ranks
/// have voted that there is none.
fn route(communicator: &Communicator, ready: &Ready, call: &Call) -> Route {
    let factor = if call.op.made() { communicator.operations.factor(call.op, call.dtype) } else { None };
    factor.map_or_else(|| decide(call, ready.agreement()), |factor| decide_scaled(call, factor, ready.agreement()))
}

/// Launches one routed call. The communicator may have met a fault since the call was placed.
pub(super) fn fault_or_launch(communicator: &Communicator, plan: Plan, a: &Arguments) -> Code {
    let State::Ready(ready) = communicator.state() else { return failed(&lost()) };
    if let Some(fault) = communicator.fault(ready) {
        return fault_code(fault.kind);
    }
    launch(communicator, ready, plan, a)
}

fn launch(communicator: &Communicator, ready: &Arc<Ready>, plan: Plan, a: &Arguments) -> Code {
    communicator.counters.routed(plan.algorithm, a.call().bytes());
    let stream = RawStream(a.stream as usize);
    let buffers = Buffers { input: a.send as u64, output: a.receive as u64, count: a.count as u64, stream };
    let way = (row_of(plan.algorithm), a.call().bytes());
    let launched = communicator.timed(way, stream, || ready.launch(plan, buffers));
    launched.map_or_else(|error| failed(&error), |()| code::SUCCESS)
}

fn all_reduce(a: Arguments) -> Code {
    let stock = match stock() {
        Ok(stock) => stock,
        Err(code) => return code,
    };
    if a.comm.is_null() || transparent() {
        return a.to_stock(stock);
    }
    let communicator = comm::find(a.comm as usize);
    if group::open() {
        return group::all_reduce(stock, communicator, a);
    }
    if let Some(refused) = refused(&communicator) {
        return refused;
    }
    let stream = RawStream(a.stream as usize);
    if defers(&communicator, stream) && communicator.deferral.begin() {
        let own = Arc::clone(&communicator);
        let calls = Box::new(move || make(stock, &own, a));
        return deferred::start(stock, vec![First { communicator, comm: a.comm, stream }], calls);
    }
    match set_up(stock, &communicator, a.comm, stream) {
        Ok(()) => make(stock, &communicator, a),
        Err(code) => code,
    }
}

/// Makes one call that no group holds back.
fn make(stock: &Stock, communicator: &Arc<Communicator>, a: Arguments) -> Code {
    let stream = RawStream(a.stream as usize);
    match (place(communicator, &a), communicator.state()) {
        (Placement::Routed(plan), State::Ready(ready)) => {
            match behind_earlier_stock(stock, communicator, a.comm, stream) {
                Ok(()) => launch(communicator, ready, plan, &a),
                Err(code) => code,
            }
        }
        (Placement::Routed(_), _) => failed(&lost()),
        (Placement::Stock(reason), _) => {
            let way = (row_of_stock(reason), a.call().bytes());
            in_order(communicator, stream, || communicator.timed(way, stream, || a.to_stock(stock)))
        }
        (Placement::Failed(code), _) => code,
    }
}

/// A routed call that cannot be launched is an error of this rank: its peers are in the kernel, so changing the path
/// alone would only move the hang.
fn failed(error: &crate::error::Error) -> Code {
    warning!(-1, "ncclAllReduce: {error}");
    result_of(error)
}

/// The code of a fault that a kernel reported.
pub(super) fn fault_code(kind: u32) -> Code {
    // Two overlapping launches of one communicator are the caller's doing, a failed one this rank's; all else is a peer's.
    match kind {
        3 => code::USAGE,
        4 => code::CUDA,
        _ => code::REMOTE,
    }
}

/// # Safety
/// NCCL's own contract: a live communicator, buffers of `count` elements that live until the work queued on `stream`
/// is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: Comm,
    stream: Stream,
) -> Code {
    guard(|| all_reduce(Arguments { send, receive, count, dtype, op, comm, stream }))
}

macro_rules! passing {
    ($($name:ident = $field:ident ( $($arg:ident: $type:ty),* ) $($optional:ident)?;)*) => {
        $(
            /// # Safety
            /// As for the function of this name in NCCL: every argument is passed on untouched.
            #[unsafe(no_mangle)]
            #[allow(clippy::too_many_arguments)]
            pub unsafe extern "C" fn $name($($arg: $type,)* comm: Comm, stream: Stream) -> Code {
                guard(|| match stock() {
                    Ok(stock) => {
                        let function = passing!(@function stock.nccl.$field, $($optional)?);
                        // SAFETY: the caller's own arguments.
                        passing(stock, comm, stream, move || unsafe { function($($arg,)* comm, stream) })
                    }
                    Err(code) => code,
                })
            }
        )*

        /// Names and addresses for the call slots.
        pub(super) fn targets() -> Vec<(&'static CStr, *const c_void)> {
            const fn c(text: &'static str) -> &'static CStr {
                match CStr::from_bytes_with_nul(text.as_bytes()) {
                    Ok(text) => text,
                    Err(_) => panic!("a name without its end"),
                }
            }
            vec![
                (c"ncclAllReduce", ncclAllReduce as *const c_void),
                $((const { c(concat!(stringify!($name), "\0")) }, $name as *const c_void),)*
            ]
        }
    };
    (@function $field:expr,) => { $field };
    (@function $field:expr, optional) => {
        match $field {
            Some(function) => function,
            None => return super::absent(stringify!($field)),
        }
    };
}

passing! {
    ncclAllGather = all_gather(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int);
    ncclReduceScatter = reduce_scatter(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, op: c_int);
    ncclBroadcast = broadcast(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int);
    ncclBcast = bcast(buffer: *mut c_void, count: usize, dtype: c_int, root: c_int);
    ncclReduce = reduce(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, op: c_int, root: c_int);
    ncclAlltoAll = all_to_all(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int) optional;
    ncclGather = gather(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int) optional;
    ncclScatter = scatter(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int) optional;
}

/// A call's own configuration as far as it has to be known here: it begins with its size.
struct CallConfigCopy(Vec<u64>);

impl CallConfigCopy {
    /// Largest configuration that is believed.
    const MOST: usize = 4096;

    /// A copy that outlives the call: a held call is made at the end of its group, when the caller's own may be gone.
    /// What the configuration points to has to live until then.
    fn of(config: CallConfig) -> Option<Self> {
        // SAFETY: null, or the caller's configuration, which begins with its size.
        let size = if config.is_null() { 0 } else { unsafe { config.cast::<usize>().read() } };
        if size < size_of::<usize>() || size > Self::MOST {
            return None;
        }
        let mut copy = vec![0u64; size.div_ceil(8)];
        // SAFETY: the caller says that it is so long; the copy is at least as long.
        unsafe { std::ptr::copy_nonoverlapping(config.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size) };
        Some(Self(copy))
    }
}

/// Counts an AllReduce with a configuration of its own, where a plain one would be counted: when it is made.
fn count_configured(call: &Call, comm: Comm) {
    if comm.is_null() || transparent() {
        return;
    }
    let Some(communicator) = comm::known(comm as usize) else { return };
    let reason = match communicator.state() {
        State::New => Reason::NotReady,
        State::Ready(ready) if communicator.takes_calls(ready) => {
            if call.count == 0 {
                Reason::Empty
            } else {
                Reason::Configured
            }
        }
        State::Ready(_) | State::Declined | State::Lost => Reason::Declined,
    };
    communicator.counters.stock(reason, call.bytes());
}

macro_rules! passing_configured {
    ($($name:ident = $field:ident ( $($arg:ident: $type:ty),* ) $(counted($count:ident, $dtype:ident, $op:ident))?;)*) => {
        $(
            /// # Safety
            /// As for the function of this name in NCCL, which gets what its caller asked: a call with a
            /// configuration of its own is never routed.
            #[unsafe(no_mangle)]
            #[allow(clippy::too_many_arguments)]
            pub unsafe extern "C" fn $name($($arg: $type,)* comm: Comm, stream: Stream, config: CallConfig) -> Code {
                guard(|| match stock() {
                    Ok(stock) => {
                        let Some(function) = stock.nccl.$field else { return super::absent(stringify!($name)) };
                        // A call of a group may be made at its end, the first of a non-blocking communicator later.
                        let copy = CallConfigCopy::of(config);
                        passing(stock, comm, stream, move || {
                            $(
                                let (dtype, op) = (DataType($dtype), ReduceOp($op));
                                count_configured(&Call { count: $count as u64, dtype, op }, comm);
                            )?
                            let config = copy.as_ref().map_or(config, |copy| copy.0.as_ptr().cast());
                            // SAFETY: the caller's own arguments.
                            unsafe { function($($arg,)* comm, stream, config) }
                        })
                    }
                    Err(code) => code,
                })
            }
        )*

        /// Names and addresses for the call slots.
        pub(super) fn configured_targets() -> Vec<(&'static CStr, *const c_void)> {
            const fn c(text: &'static str) -> &'static CStr {
                match CStr::from_bytes_with_nul(text.as_bytes()) {
                    Ok(text) => text,
                    Err(_) => panic!("a name without its end"),
                }
            }
            vec![$((const { c(concat!(stringify!($name), "\0")) }, $name as *const c_void),)*]
        }
    };
}

passing_configured! {
    ncclAllReduceConfig = all_reduce_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, op: c_int)
        counted(count, dtype, op);
    ncclAllGatherConfig = all_gather_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int);
    ncclReduceScatterConfig = reduce_scatter_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, op: c_int);
    ncclBroadcastConfig = broadcast_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int);
    ncclReduceConfig = reduce_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, op: c_int, root: c_int);
    ncclAlltoAllConfig = all_to_all_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int);
    ncclGatherConfig = gather_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int);
    ncclScatterConfig = scatter_config(send: *const c_void, receive: *mut c_void, count: usize, dtype: c_int, root: c_int);
}
