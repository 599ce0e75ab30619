//! One-sided calls: puts, signals and waits for them. They are stock NCCL's, and keep their turn among the routed calls of
//! their communicator as sends and receives do. NCCL has them since 2.29.

use std::ffi::{CStr, c_int, c_uint, c_void};

use super::collectives::in_order;
use super::deferred::refused;
use super::{Code, absent, group, guard, stock, transparent};
use crate::comm;
use crate::driver::RawStream;
use crate::intercept::{Comm, Functions, SignalWait, Stock, Stream};

/// Makes a call in its turn: at once, or in a group behind what is held of its communicator. It never waits for a set-up
/// outside groups: it is no collective.
fn one_sided(stock: &'static Stock, comm: Comm, stream: Stream, call: impl FnOnce() -> Code + 'static) -> Code {
    if comm.is_null() || transparent() {
        return call();
    }
    let queue = RawStream(stream as usize);
    if group::open() {
        return group::pass(stock, &comm::find(comm as usize), (comm, queue), false, call);
    }
    match comm::known(comm as usize) {
        Some(communicator) => match refused(&communicator) {
            Some(refused) => refused,
            None => in_order(&communicator, queue, call),
        },
        None => call(),
    }
}

/// The same with a function that the stock library may lack.
fn optional<F>(
    name: &'static str,
    find: impl FnOnce(&Functions) -> Option<F>,
    then: impl FnOnce(&'static Stock, F) -> Code,
) -> Code {
    guard(|| match stock() {
        Ok(stock) => find(&stock.nccl).map_or_else(|| absent(name), |function| then(stock, function)),
        Err(code) => code,
    })
}

/// # Safety
/// As for this function in NCCL: every argument is passed on untouched.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn ncclPutSignal(
    local: *const c_void,
    count: usize,
    dtype: c_int,
    peer: c_int,
    window: *mut c_void,
    offset: usize,
    signal: c_int,
    context: c_int,
    flags: c_uint,
    comm: Comm,
    stream: Stream,
) -> Code {
    optional(
        "ncclPutSignal",
        |nccl| nccl.put_signal,
        |stock, put| {
            one_sided(stock, comm, stream, move || {
                // SAFETY: the caller's own arguments.
                unsafe { put(local, count, dtype, peer, window, offset, signal, context, flags, comm, stream) }
            })
        },
    )
}

/// # Safety
/// As for this function in NCCL: every argument is passed on untouched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSignal(
    peer: c_int,
    signal: c_int,
    context: c_int,
    flags: c_uint,
    comm: Comm,
    stream: Stream,
) -> Code {
    optional(
        "ncclSignal",
        |nccl| nccl.signal,
        |stock, send| {
            // SAFETY: the caller's own arguments.
            one_sided(stock, comm, stream, move || unsafe { send(peer, signal, context, flags, comm, stream) })
        },
    )
}

/// # Safety
/// As for this function in NCCL: `waits` is null or `count` descriptions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclWaitSignal(count: c_int, waits: *mut SignalWait, comm: Comm, stream: Stream) -> Code {
    optional(
        "ncclWaitSignal",
        |nccl| nccl.wait_signal,
        |stock, wait| {
            // A held call is made at the end of its group, when the caller's array may be gone.
            let copy = usize::try_from(count).ok().filter(|count| group::open() && *count > 0 && !waits.is_null());
            // SAFETY: the caller's promise.
            let mut copy = copy.map(|count| unsafe { std::slice::from_raw_parts(waits, count) }.to_vec());
            one_sided(stock, comm, stream, move || {
                let waits = copy.as_mut().map_or(waits, |copy| copy.as_mut_ptr());
                // SAFETY: the caller's own arguments, or a copy of the same length.
                unsafe { wait(count, waits, comm, stream) }
            })
        },
    )
}

/// Names and addresses for the call slots.
pub(super) fn targets() -> Vec<(&'static CStr, *const c_void)> {
    vec![
        (c"ncclPutSignal", ncclPutSignal as *const c_void),
        (c"ncclSignal", ncclSignal as *const c_void),
        (c"ncclWaitSignal", ncclWaitSignal as *const c_void),
    ]
}
