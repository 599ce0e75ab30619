//! The life of a communicator: its creation is noted, its end releases what is ours first. Groups and asynchronous
//! errors.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::collectives::fault_code;
use super::deferred::{refused, refused_by_handle};
use super::{Code, absent, code, group, guard, inside, preload, stock, transparent};
use crate::comm::{self, Communicator, Hints, State};
use crate::config::Config as Settings;
use crate::info;
use crate::intercept::{Comm, Config, Functions, UniqueId};
use crate::record;

/// How long a destroy waits for the communicator's own last call. Its caller has synchronised, so it is done.
const DESTROY_PATIENCE: Duration = Duration::from_secs(10);
/// How long an abort waits for a set-up that another thread is in.
const SETUP_PATIENCE: Duration = Duration::from_secs(2);
/// How long an abort waits for its own kernels to see the abort word.
const ABORT_PATIENCE: Duration = Duration::from_secs(3);

/// The fields of `ncclConfig_t` that all versions since 2.17 share: the head says how much of it the caller knows.
#[repr(C)]
struct ConfigHead {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
}

const MAGIC: u32 = 0xcafe_beef;
/// `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: c_int = c_int::MIN;
/// `NCCL_SHRINK_ABORT`.
const SHRINK_ABORT: c_int = 1;

/// What a configuration says; without one, what the parent's said.
fn hints(config: Config, parent: Option<Comm>) -> Hints {
    let inherited = || parent.and_then(|parent| comm::known(parent as usize)).map(|parent| parent.hints());
    let inherited = inherited().unwrap_or_default();
    let head = config.cast::<ConfigHead>();
    // SAFETY: a configuration begins with its own size and a magic number; the rest is read only if both say so.
    let readable = !head.is_null() && unsafe { (*head).size >= size_of::<ConfigHead>() && (*head).magic == MAGIC };
    if !readable {
        return inherited;
    }
    // SAFETY: just checked.
    let (blocking, max_ctas) = unsafe { ((*head).blocking, (*head).max_ctas) };
    Hints {
        // NCCL's "undefined" is the smallest integer, so only positive numbers are limits.
        max_blocks: u32::try_from(max_ctas).ok().filter(|blocks| *blocks > 0).or(inherited.max_blocks),
        non_blocking: blocking == 0 || (blocking == UNDEFINED && inherited.non_blocking),
    }
}

fn non_blocking(comm: Comm) -> bool {
    comm::known(comm as usize).is_some_and(|communicator| communicator.hints().non_blocking)
}

/// Calls a stock function that makes a communicator, and notes what it made.
fn make(config: Config, parent: Option<Comm>, made: *mut Comm, call: impl FnOnce(&Functions) -> Option<Code>) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        let transparent = transparent();
        // A parent that is being aborted has been told so already.
        if let Some(refused) = parent.and_then(refused_by_handle) {
            return refused;
        }
        if !transparent {
            super::collect();
            preload::here();
        }
        // SAFETY: null, or the caller's own variable, which may hold anything.
        let before = if made.is_null() { std::ptr::null_mut() } else { unsafe { made.read_volatile() } };
        let Some(result) = inside(call, stock) else { return absent("a function that makes communicators this way") };
        if !transparent && (result == code::SUCCESS || result == code::IN_PROGRESS) && !made.is_null() {
            // SAFETY: the caller's out-pointer, which stock NCCL has just accepted.
            let comm = unsafe { *made };
            // Inside a group NCCL fills some in at once, others when they are complete. A value that was there before
            // may be an older communicator's.
            let grouped = group::open();
            if !comm.is_null() && (!grouped || comm != before) {
                comm::created(comm as usize, hints(config, parent));
            } else if grouped || result == code::IN_PROGRESS || parent.is_some_and(non_blocking) {
                // Of a parent that does not block NCCL says success at once, and is in progress behind it.
                comm::expected(hints(config, parent));
            } // Else none was made: a split without a colour.
        }
        result
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(out: *mut Comm, ranks: c_int, id: UniqueId, rank: c_int) -> Code {
    // SAFETY: the caller's own arguments.
    make(std::ptr::null_mut(), None, out, |nccl| Some(unsafe { (nccl.comm_init_rank)(out, ranks, id, rank) }))
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    out: *mut Comm,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: Config,
) -> Code {
    // SAFETY: the caller's own arguments.
    make(config, None, out, |nccl| Some(unsafe { (nccl.comm_init_rank_config)(out, ranks, id, rank, config) }))
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankScalable(
    out: *mut Comm,
    ranks: c_int,
    rank: c_int,
    count: c_int,
    ids: *mut UniqueId,
    config: Config,
) -> Code {
    make(config, None, out, |nccl| {
        let init = nccl.comm_init_rank_scalable?;
        // SAFETY: the caller's own arguments.
        Some(unsafe { init(out, ranks, rank, count, ids, config) })
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitAll(comms: *mut Comm, count: c_int, devices: *const c_int) -> Code {
    guard(|| {
        if !transparent() {
            // SAFETY: null, or the caller's array of `count` ordinals.
            let device = |i: c_int| if devices.is_null() { i } else { unsafe { *devices.add(i as usize) } };
            // Up to the first that does not exist: stock NCCL says what is wrong with such a list.
            let _ = (0..count).all(|i| preload::on(device(i)));
        }
        let result = make(std::ptr::null_mut(), None, comms, |nccl| {
            // SAFETY: the caller's own arguments.
            Some(unsafe { (nccl.comm_init_all)(comms, count, devices) })
        });
        if result == code::SUCCESS && !transparent() {
            // The first one is noted already.
            for i in 1..usize::try_from(count).unwrap_or(0) {
                // SAFETY: the caller's array of `count` communicators, which stock NCCL has just filled.
                let comm = unsafe { *comms.add(i) };
                if !comm.is_null() {
                    comm::created(comm as usize, Hints::default());
                }
            }
        }
        result
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommSplit(comm: Comm, color: c_int, key: c_int, out: *mut Comm, config: Config) -> Code {
    // SAFETY: the caller's own arguments.
    make(config, Some(comm), out, |nccl| Some(unsafe { (nccl.comm_split)(comm, color, key, out, config) }))
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommShrink(
    comm: Comm,
    excluded: *mut c_int,
    count: c_int,
    out: *mut Comm,
    config: Config,
    flags: c_int,
) -> Code {
    if flags & SHRINK_ABORT != 0 && !comm.is_null() && !transparent() {
        // Its operations end, ours too: some of them may wait for a rank that is dead.
        set_abort_word(comm);
    }
    make(config, Some(comm), out, |nccl| {
        let shrink = nccl.comm_shrink?;
        // SAFETY: the caller's own arguments.
        Some(unsafe { shrink(comm, excluded, count, out, config, flags) })
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGrow(
    comm: Comm,
    ranks: c_int,
    id: *const UniqueId,
    rank: c_int,
    out: *mut Comm,
    config: Config,
) -> Code {
    // SAFETY: the caller's own arguments.
    make(config, Some(comm), out, |nccl| nccl.comm_grow.map(|grow| unsafe { grow(comm, ranks, id, rank, out, config) }))
}

/// Releases our part of a communicator.
fn end(comm: Comm, communicator: Arc<Communicator>, patience: Duration, abort: bool) {
    if let State::Ready(ready) = communicator.state() {
        let ready = Arc::clone(ready);
        communicator.last_word(&ready);
        communicator.read_samples();
        info!(-1, "communicator {comm:p} ends: {}", communicator.counters);
        drop(communicator);
        ready.release(patience, abort);
    } else {
        if abort {
            communicator.remains.lay_aside();
        }
        drop(communicator);
    }
    if let Some(path) = &Settings::get().stats {
        record::write(path);
    }
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(comm: Comm) -> Code {
    guard(|| match stock() {
        Ok(stock) => {
            if let Some(communicator) =
                (!comm.is_null() && !transparent()).then(|| comm::known(comm as usize)).flatten()
            {
                if let Some(refused) = refused(&communicator) {
                    return refused;
                }
                communicator.finalize();
            }
            // Nothing of ours is flushed here: a routed call is done when its stream says so.
            // SAFETY: the caller's own argument.
            inside(|nccl| unsafe { (nccl.comm_finalize)(comm) }, stock)
        }
        Err(code) => code,
    })
}

/// Suspends or resumes: stock NCCL's answer decides, and while it stands every call is stock NCCL's to refuse.
fn suspend(comm: Comm, suspended: bool, name: &'static str, call: impl FnOnce(&Functions) -> Option<Code>) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        if let Some(refused) = refused_by_handle(comm) {
            return refused;
        }
        let Some(result) = inside(call, stock) else { return absent(name) };
        if result == code::SUCCESS
            && !transparent()
            && let Some(communicator) = comm::known(comm as usize)
        {
            communicator.suspend(suspended);
        }
        result
    })
}

/// # Safety
/// As for this function in NCCL. It gives stock NCCL's memory back; the windows stay.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommSuspend(comm: Comm, flags: c_int) -> Code {
    suspend(comm, true, "ncclCommSuspend", |nccl| {
        // SAFETY: the caller's own arguments.
        nccl.comm_suspend.map(|suspend| unsafe { suspend(comm, flags) })
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommResume(comm: Comm) -> Code {
    suspend(comm, false, "ncclCommResume", |nccl| {
        // SAFETY: the caller's own argument.
        nccl.comm_resume.map(|resume| unsafe { resume(comm) })
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(comm: Comm) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        if let Some(refused) = refused_by_handle(comm) {
            return refused;
        }
        if !comm.is_null() && !transparent() {
            super::collect();
            if let Some(communicator) = comm::remove(comm as usize) {
                end(comm, communicator, DESTROY_PATIENCE, false);
            }
        }
        // SAFETY: the caller's own argument.
        inside(|nccl| unsafe { (nccl.comm_destroy)(comm) }, stock)
    })
}

/// # Safety
/// As for this function in NCCL. May be called from any thread while the communicator's kernels spin.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(comm: Comm) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        let ours = !comm.is_null() && !transparent();
        // Forgotten first: behind stock's abort the address may be a new communicator's.
        let communicator = if ours { comm::remove(comm as usize) } else { None };
        if let Some(communicator) = &communicator {
            communicator.cancel();
            leave_set_up(communicator);
        }
        // SAFETY: the caller's own argument.
        let result = inside(|nccl| unsafe { (nccl.comm_abort)(comm) }, stock);
        if let Some(communicator) = communicator {
            // Freeing what stock NCCL served would wait for stock NCCL's kernels of others.
            let routed = matches!(communicator.state(), State::Ready(_));
            end(comm, communicator, ABORT_PATIENCE, true);
            if routed && comm::only_aborted_are_left() {
                super::collect();
            }
        }
        result
    })
}

/// Waits until the thread that is setting the communicator up has seen that it is being aborted: it asks stock NCCL about
/// the communicator, which is freed next. Bounded, because that thread may be inside stock NCCL, where only stock's own
/// abort reaches it.
fn leave_set_up(communicator: &Communicator) {
    let start = Instant::now();
    while (communicator.setting_up() || communicator.deferral.running()) && start.elapsed() < SETUP_PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Tells our kernels to leave, before stock NCCL does anything that may wait for them.
fn set_abort_word(comm: Comm) {
    if let Some(communicator) = comm::known(comm as usize) {
        communicator.cancel();
        if communicator.deferral.running() {
            leave_set_up(&communicator);
        }
    }
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommRevoke(comm: Comm, flags: c_int) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        if !comm.is_null() && !transparent() {
            set_abort_word(comm);
        }
        // SAFETY: the caller's own arguments.
        inside(|nccl| nccl.comm_revoke.map(|revoke| unsafe { revoke(comm, flags) }), stock)
            .unwrap_or_else(|| absent("ncclCommRevoke"))
    })
}

/// # Safety
/// As for this function in NCCL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: Comm, error: *mut Code) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        // What stock NCCL says meanwhile is about our own exchange.
        if !comm.is_null()
            && !error.is_null()
            && !transparent()
            && comm::known(comm as usize).is_some_and(|communicator| communicator.deferral.running())
        {
            // SAFETY: the caller's out-pointer.
            unsafe { *error = code::IN_PROGRESS };
            return code::SUCCESS;
        }
        // SAFETY: the caller's own arguments.
        let result = unsafe { (stock.nccl.comm_get_async_error)(comm, error) };
        if result != code::SUCCESS || error.is_null() || transparent() {
            return result;
        }
        // SAFETY: the caller's out-pointer, which stock NCCL has just written.
        if unsafe { *error } == code::SUCCESS
            && let Some(communicator) = comm::known(comm as usize)
        {
            let ours = match communicator.state() {
                State::Ready(ready) => communicator.fault(ready).map(|fault| fault_code(fault.kind)),
                State::Lost => Some(code::REMOTE),
                State::New | State::Declined => None,
            };
            if let Some(ours) = ours.or(communicator.deferral.error()) {
                // SAFETY: as above.
                unsafe { *error = ours };
            }
        }
        result
    })
}

/// Names and addresses for the call slots.
pub(super) fn targets() -> Vec<(&'static CStr, *const c_void)> {
    vec![
        (c"ncclCommInitRank", ncclCommInitRank as *const c_void),
        (c"ncclCommInitRankConfig", ncclCommInitRankConfig as *const c_void),
        (c"ncclCommInitRankScalable", ncclCommInitRankScalable as *const c_void),
        (c"ncclCommInitAll", ncclCommInitAll as *const c_void),
        (c"ncclCommSplit", ncclCommSplit as *const c_void),
        (c"ncclCommShrink", ncclCommShrink as *const c_void),
        (c"ncclCommGrow", ncclCommGrow as *const c_void),
        (c"ncclCommFinalize", ncclCommFinalize as *const c_void),
        (c"ncclCommSuspend", ncclCommSuspend as *const c_void),
        (c"ncclCommResume", ncclCommResume as *const c_void),
        (c"ncclCommDestroy", ncclCommDestroy as *const c_void),
        (c"ncclCommAbort", ncclCommAbort as *const c_void),
        (c"ncclCommRevoke", ncclCommRevoke as *const c_void),
        (c"ncclCommGetAsyncError", ncclCommGetAsyncError as *const c_void),
    ]
}
