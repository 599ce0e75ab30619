//! `ncclAllReduce` and the other collectives. The others are stock's; they pass here because a communicator is set up
//! at its first collective of any kind, so that all ranks do it at the same call.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use super::exchange::{StockExchange, retain};
use super::{Code, GROUPS, code, guard, inside, result_of, stock, transparent, watch_forks};
use crate::call::{Call, DataType, ReduceOp};
use crate::comm::{self, Buffers, Communicator, State, lost};
use crate::config::Config;
use crate::counters::PROCESS;
use crate::driver::{RawStream, capturing, reap};
use crate::intercept::{Comm, Stock, Stream};
use crate::route::{Reason, Route, decide};
use crate::warning;

fn grouped() -> bool {
    GROUPS.try_with(|depth| depth.get() > 0).unwrap_or(true)
}

/// Sets the communicator up if this is the moment: its first collective outside groups and captures. All ranks come
/// by here at the same call, because NCCL wants the same collectives in the same order on all of them; its creation
/// would not do, since the first communicator of a process is made before this library is loaded.
fn set_up(stock: &Stock, communicator: &Arc<Communicator>, comm: Comm, stream: RawStream) -> Result<(), Code> {
    if !matches!(communicator.state(), State::New) || grouped() || capturing(stream) || !communicator.claim() {
        return Ok(());
    }
    watch_forks();
    reap();
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
        return Ok(());
    };
    if ranks < 2 {
        communicator.decline();
        return Ok(());
    }
    super::bind_again();
    let _settled = Settled(communicator);
    let deadline = Duration::from_millis(Config::get().setup_timeout_ms);
    let outcome = inside(
        |_| {
            let context = retain(device, deadline);
            let own = context.as_ref().ok().map(Arc::clone);
            let mut exchange =
                StockExchange::new(stock, (communicator, comm), device, (rank, ranks), own, stream, deadline)?;
            communicator.set_up(&mut exchange, device, context)
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

/// What every other collective does before it goes to stock.
fn passing(comm: Comm, stream: Stream) -> Result<&'static Stock, Code> {
    let stock = stock()?;
    if !comm.is_null() && !transparent() {
        let communicator = comm::find(comm as usize);
        set_up(stock, &communicator, comm, RawStream(stream as usize))?;
    }
    Ok(stock)
}

struct Arguments {
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: Comm,
    stream: Stream,
}

fn all_reduce(a: &Arguments) -> Code {
    let stock = match stock() {
        Ok(stock) => stock,
        Err(code) => return code,
    };
    let to_stock = || {
        // SAFETY: every argument is the caller's own, untouched.
        unsafe { (stock.nccl.all_reduce)(a.send, a.receive, a.count, a.dtype, a.op, a.comm, a.stream) }
    };
    if a.comm.is_null() || transparent() {
        return to_stock();
    }
    let communicator = comm::find(a.comm as usize);
    let stream = RawStream(a.stream as usize);
    if let Err(code) = set_up(stock, &communicator, a.comm, stream) {
        return code;
    }
    let call = Call { count: a.count as u64, dtype: DataType(a.dtype), op: ReduceOp(a.op) };
    let reason = match communicator.state() {
        State::Ready(ready) => {
            if let Some(fault) = communicator.fault(ready) {
                return fault_code(fault.kind);
            }
            if grouped() {
                Reason::Group
            } else if ready.aborted() {
                // Revoked: stock NCCL says so.
                Reason::Declined
            } else if a.send.is_null() || a.receive.is_null() {
                // Stock NCCL answers for its own rules about arguments.
                Reason::Empty
            } else {
                match decide(&call, ready.agreement()) {
                    Route::Stock(reason) => reason,
                    Route::Routed(plan) => {
                        communicator.counters.routed(plan.algorithm);
                        PROCESS.routed(plan.algorithm);
                        let (input, output) = (a.send as u64, a.receive as u64);
                        let launched = ready.launch(plan, Buffers { input, output, count: call.count, stream });
                        return launched.map_or_else(|error| failed(&error), |()| code::SUCCESS);
                    }
                }
            }
        }
        State::New => Reason::NotReady,
        State::Declined => Reason::Declined,
        State::Lost => return failed(&lost()),
    };
    communicator.counters.stock(reason);
    PROCESS.stock(reason);
    to_stock()
}

/// A routed call that cannot be launched is an error of this rank: its peers are in the kernel, so changing the path
/// alone would only move the hang.
fn failed(error: &crate::error::Error) -> Code {
    warning!(-1, "ncclAllReduce: {error}");
    result_of(error)
}

/// The code of a fault that a kernel reported.
pub(super) fn fault_code(kind: u32) -> Code {
    // Two overlapping launches of one communicator are the caller's doing; all else is a peer's.
    if kind == 3 { code::USAGE } else { code::REMOTE }
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
    guard(|| all_reduce(&Arguments { send, receive, count, dtype, op, comm, stream }))
}

macro_rules! passing {
    ($($name:ident = $field:ident ( $($arg:ident: $type:ty),* ) $($optional:ident)?;)*) => {
        $(
            /// # Safety
            /// As for the function of this name in NCCL: every argument is passed on untouched.
            #[unsafe(no_mangle)]
            #[allow(clippy::too_many_arguments)]
            pub unsafe extern "C" fn $name($($arg: $type,)* comm: Comm, stream: Stream) -> Code {
                guard(|| match passing(comm, stream) {
                    Ok(stock) => {
                        let function = passing!(@function stock.nccl.$field, $($optional)?);
                        // SAFETY: the caller's own arguments.
                        unsafe { function($($arg,)* comm, stream) }
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
