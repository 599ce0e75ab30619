//! Our calls behind stock NCCL's, across streams: what the driver cannot be asked for any more, stock NCCL is.
//!
//! A call of stock NCCL leaves no event behind it as long as a communicator stays on one stream, since recording one would
//! cost every such call. When a routed call then comes on another stream, the stream of the earlier one may be gone, and
//! its handle must not be used. But stock NCCL keeps its own operations of a communicator in order, whatever their streams:
//! so it is asked to send a few bytes from this rank to itself on the new stream, and our kernel goes behind that. It
//! concerns no other rank, and happens once: from then on every call of stock NCCL is marked.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use super::{Code, code, inside, thread};
use crate::comm::{Communicator, Ready, State};
use crate::config::Config;
use crate::driver::RawStream;
use crate::intercept::{Comm, Functions, Stock};
use crate::warning;

/// `ncclInt8`.
const INT8: i32 = 0;

/// Sees to it that a routed call on `stream` can go behind what stock NCCL has of this communicator. To be called where
/// stock NCCL holds no call of it that waits for the end of a group.
pub(super) fn behind_earlier_stock(
    stock: &Stock,
    communicator: &Communicator,
    comm: Comm,
    stream: RawStream,
) -> Result<(), Code> {
    let State::Ready(ready) = communicator.state() else { return Ok(()) };
    if !ready.behind_unmarked(stream) {
        return Ok(());
    }
    let result = inside(|nccl| send_to_itself(nccl, ready, comm, stream), stock);
    if result == code::SUCCESS {
        return super::collectives::behind_stock(communicator, stream, false);
    }
    warning!(ready.device(), "stock NCCL gave {result} for a message of a rank to itself, on a call's new stream");
    Err(result)
}

/// The same inside an open group of this thread: on a thread of its own, where none is open.
pub(super) fn behind_earlier_stock_in_group(
    stock: &Stock,
    communicator: &Communicator,
    comm: Comm,
    stream: RawStream,
) -> Result<(), Code> {
    let State::Ready(ready) = communicator.state() else { return Ok(()) };
    if !ready.behind_unmarked(stream) {
        return Ok(());
    }
    let comm = comm as usize;
    std::thread::scope(|scope| {
        let work = || move || behind_earlier_stock(stock, communicator, comm as Comm, stream);
        match thread::start(scope, "twoshot-order", work) {
            Ok(thread) => thread.join().unwrap_or(Err(code::INTERNAL)),
            Err(error) => {
                warning!(ready.device(), "a thread for the order of two calls could not be started: {error}");
                Err(code::SYSTEM)
            }
        }
    })
}

fn send_to_itself(nccl: &Functions, ready: &Ready, comm: Comm, stream: RawStream) -> Code {
    let (from, to) = ready.spare();
    let stream = stream.0 as *mut c_void;
    let rank = ready.rank().cast_signed();
    // SAFETY: takes nothing.
    let started = unsafe { (nccl.group_start)() };
    if started != code::SUCCESS {
        return started;
    }
    // SAFETY: the caller's communicator and stream, and a few bytes of device memory each that nobody else uses.
    let (sent, received) = unsafe {
        (
            (nccl.send)(from as *const c_void, Ready::SPARE, INT8, rank, comm, stream),
            (nccl.recv)(to as *mut c_void, Ready::SPARE, INT8, rank, comm, stream),
        )
    };
    // SAFETY: takes nothing; closes what was opened above.
    let mut result = unsafe { (nccl.group_end)() };
    // A communicator that does not block starts the group in its own time.
    let deadline = Instant::now() + Duration::from_millis(Config::get().setup_timeout_ms);
    while result == code::IN_PROGRESS && Instant::now() < deadline {
        std::thread::yield_now();
        // SAFETY: the caller's communicator and a valid out-pointer.
        let asked = unsafe { (nccl.comm_get_async_error)(comm, &mut result) };
        if asked != code::SUCCESS {
            result = asked;
        }
    }
    let early = [sent, received].into_iter().find(|code| ![code::SUCCESS, code::IN_PROGRESS].contains(code));
    early.unwrap_or(result)
}
