//! The first call of a non-blocking communicator: its caller must not wait for peers, so the set-up and the call run on a
//! thread of their own, and until both are over every question is answered with `ncclInProgress`, as stock NCCL does
//! while it connects. Nothing else may be asked of the communicator meanwhile; what is asked gets stock NCCL's answer for
//! that, `ncclInvalidArgument`.
//!
//! Whether a rank defers is its own matter: the ranks meet in the same votes at the same collective.

use std::sync::Arc;

use parking_lot::Mutex;

use super::collectives::{set_up, set_up_all};
use super::operations::destroy_now;
use super::{Code, code};
use crate::comm::{Communicator, State};
use crate::driver::{Context, RawStream, capturing, relax_thread};
use crate::intercept::{Comm, Stock};
use crate::warning;

/// A communicator whose first call waits.
#[derive(Clone)]
pub(super) struct First {
    pub communicator: Arc<Communicator>,
    pub comm: Comm,
    pub stream: RawStream,
}

/// Whether a first call of this communicator on this stream is made later. The per-thread stream is another one on every
/// thread; a communicator whose creation was not seen is taken for one that blocks.
pub(super) fn defers(communicator: &Communicator, stream: RawStream) -> bool {
    communicator.hints().non_blocking
        && matches!(communicator.state(), State::New)
        && stream != RawStream::PER_THREAD
        && !capturing(stream)
}

/// The answer to a call of a communicator that is in progress.
pub(super) fn refused(communicator: &Communicator) -> Option<Code> {
    communicator.deferral.running().then(|| {
        warning!(-1, "a communicator was used before its previous call was over (ncclCommGetAsyncError says when)");
        code::ARGUMENT
    })
}

/// The same by handle.
pub(super) fn refused_by_handle(comm: Comm) -> Option<Code> {
    if comm.is_null() || super::transparent() {
        return None;
    }
    crate::comm::known(comm as usize).and_then(|communicator| refused(&communicator))
}

struct Job {
    firsts: Vec<First>,
    calls: Box<dyn FnOnce() -> Code>,
    context: Option<Arc<Context>>,
}

// SAFETY: handles of communicators and streams, and addresses that the caller's contract keeps alive until the call is
// over; NCCL itself takes them to a thread of its own. None of it belongs to a thread: the per-thread stream is never here.
unsafe impl Send for Job {}

/// Sets communicators up, which must have begun to defer, and makes the calls that were held for them.
pub(super) fn start(stock: &'static Stock, firsts: Vec<First>, calls: Box<dyn FnOnce() -> Code>) -> Code {
    // A caller's stream may mean "the current context's".
    let context = Context::current(-1).ok();
    let job = Arc::new(Mutex::new(Some(Job { firsts, calls, context })));
    let handed = Arc::clone(&job);
    let body = move || {
        relax_thread();
        let job = handed.lock().take();
        if let Some(job) = job {
            run(stock, job);
        }
    };
    if let Err(error) =
        std::thread::Builder::new().name("twoshot-first".into()).stack_size(super::thread::STACK).spawn(body)
    {
        warning!(-1, "a thread for the set-up of a communicator could not be started: {error}");
        // Then its caller waits, which is better than not to answer.
        let job = job.lock().take();
        if let Some(job) = job {
            run(stock, job);
        }
    }
    code::IN_PROGRESS
}

fn run(stock: &'static Stock, job: Job) {
    let Job { firsts, calls, context } = job;
    let work = || {
        let _entered = context.as_ref().map(|context| context.enter());
        let ready = match &firsts[..] {
            [First { communicator, comm, stream }] => set_up(stock, communicator, *comm, *stream).err(),
            several => Some(set_up_all(stock, several)),
        }
        .unwrap_or(code::SUCCESS);
        // Whoever aborts it is about to free it, or has been told to leave by its own word.
        if firsts.iter().any(|first| first.communicator.cancelled()) {
            return code::REMOTE;
        }
        if ready == code::SUCCESS { calls() } else { ready }
    };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(code::INTERNAL);
    let outcome = if outcome == code::IN_PROGRESS { code::SUCCESS } else { outcome };
    for First { communicator, comm, .. } in &firsts {
        communicator.deferral.end(outcome, |op| {
            if !communicator.cancelled() {
                destroy_now(stock, op.0, *comm);
            }
        });
    }
}
