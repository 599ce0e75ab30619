//! The doors: exported C symbols. Null checks, `catch_unwind`, and nothing else; decisions are made below.

mod binding;
mod collectives;
mod collnet;
mod deferred;
mod exchange;
mod group;
mod lifecycle;
mod net;
mod one_sided;
mod operations;
mod order;
mod preload;
mod report;
mod table;
mod thread;
mod tuner;

pub use report::Description;

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use crate::config::{Config, Mode};
use crate::error::Error;
use crate::intercept::{self, Functions, Stock};
use crate::{info, warning};

/// `ncclResult_t`, as the open integer it is.
pub type Code = c_int;

/// Result codes of NCCL that twoshot returns itself.
pub mod code {
    use super::Code;
    /// `ncclSuccess`.
    pub const SUCCESS: Code = 0;
    /// `ncclUnhandledCudaError`.
    pub const CUDA: Code = 1;
    /// `ncclSystemError`.
    pub const SYSTEM: Code = 2;
    /// `ncclInternalError`.
    pub const INTERNAL: Code = 3;
    /// `ncclInvalidArgument`.
    pub const ARGUMENT: Code = 4;
    /// `ncclInvalidUsage`.
    pub const USAGE: Code = 5;
    /// `ncclRemoteError`.
    pub const REMOTE: Code = 6;
    /// `ncclInProgress`.
    pub const IN_PROGRESS: Code = 7;
}

/// The only translation of errors to NCCL's codes. No `_` arm: a new variant must choose before it compiles.
pub(crate) fn result_of(error: &Error) -> Code {
    match error {
        Error::Driver { .. } | Error::DriverLibrary(_) => code::CUDA,
        Error::Nvml { .. } | Error::NvmlLibrary(_) | Error::System { .. } => code::SYSTEM,
        Error::Stock { code, .. } => *code,
        Error::Peer { .. } | Error::Deadline(_) | Error::Protocol(_) | Error::Kernel(_) => code::REMOTE,
        Error::WrongAnswer(_) | Error::Unshared(_) | Error::Bug(_) => code::INTERNAL,
    }
}

/// Runs the body of an exported function: no panic leaves it.
pub(crate) fn guard(body: impl FnOnce() -> Code) -> Code {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(code::INTERNAL)
}

/// The same for what NCCL's progress thread calls, which belongs to NCCL alone.
pub(crate) fn on_progress_thread(body: impl FnOnce() -> Code) -> Code {
    guard(|| {
        crate::driver::relax_thread();
        body()
    })
}

/// The stock library, or the code that a caller gets where there is none.
pub(crate) fn stock() -> Result<&'static Stock, Code> {
    prepare();
    match intercept::stock() {
        Ok(stock) => {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                info!(-1, "twoshot {}: stock NCCL {} at {}", VERSION, stock.version, stock.path.display());
            });
            Ok(stock)
        }
        Err(error) => {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                // Without stock NCCL nothing works, and NCCL_DEBUG may be unset: this line is always written.
                eprintln!("twoshot: {error}");
            });
            Err(code::SYSTEM)
        }
    }
}

/// What a function answers that the stock library lacks: like a jump that leads nowhere, one line and invalid usage.
pub(crate) fn absent(name: &'static str) -> Code {
    static SAID: parking_lot::Mutex<Vec<&str>> = parking_lot::Mutex::new(Vec::new());
    let mut said = SAID.lock();
    if !said.contains(&name) {
        said.push(name);
        warning!(-1, "stock NCCL has no {name}: the call fails with ncclInvalidUsage");
    }
    code::USAGE
}

/// This library's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What has to be known before the stock library is looked for.
fn prepare() {
    // Claimed, not locked: the dynamic linker is called here, and a thread inside it may call us.
    static CLAIMED: AtomicBool = AtomicBool::new(false);
    if CLAIMED.load(Ordering::Relaxed) || CLAIMED.swap(true, Ordering::AcqRel) {
        return;
    }
    if let Some(path) = &Config::get().nccl_library {
        intercept::set_explicit_path(path.clone());
    }
    intercept::set_log(|line| warning!(-1, "{line}"));
    // Before stock NCCL opens anybody's plugin.
    intercept::withdraw(&net::tables());
    intercept::withdraw(&collnet::tables());
    intercept::withdraw(&tuner::tables());
}

thread_local! {
    /// Set while this thread is inside a function of stock NCCL that may call public functions itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the call comes from inside stock NCCL, or this process must leave everything alone.
pub(crate) fn transparent() -> bool {
    INSIDE.try_with(Cell::get).unwrap_or(true) || FORKED.load(Ordering::Relaxed) || off()
}

fn off() -> bool {
    static OFF: OnceLock<bool> = OnceLock::new();
    *OFF.get_or_init(|| {
        let config = Config::get();
        if let (Mode::Off, Some(message)) = (config.mode, &config.invalid) {
            // Nobody will vote, so nobody else says it.
            warning!(-1, "{message}: twoshot is off");
        }
        config.mode != Mode::Direct
    })
}

/// Whether NCCL is offered our networks. A forked child has its parent's sockets and GPU state: it is offered nothing.
pub(crate) fn collnet_mode() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| Config::get().mode == Mode::CollNet) && !FORKED.load(Ordering::Relaxed)
}

/// Runs a stock function that may call public functions itself; those pass straight through.
pub(crate) fn inside<T>(call: impl FnOnce(&Functions) -> T, stock: &Stock) -> T {
    let _inside = Inside::enter();
    call(&stock.nccl)
}

/// While it lives this thread is inside stock NCCL, however that ends: a panic must not leave it there for ever.
struct Inside {
    before: bool,
}

impl Inside {
    fn enter() -> Self {
        Self { before: INSIDE.try_with(|flag| flag.replace(true)).unwrap_or(true) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|flag| flag.set(self.before));
    }
}

static FORKED: AtomicBool = AtomicBool::new(false);

extern "C" fn in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// From now on a forked child leaves everything to stock NCCL: its CUDA state, locks and peers are the parent's.
pub(crate) fn watch_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only stores to an atomic.
        let failed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        if failed != 0 {
            warning!(-1, "pthread_atfork failed with {failed}");
        }
    });
}

/// Programs may end without destroying their communicators: where the user wants the counters in a file, it is written
/// at the end of the process too. Nothing of this library runs at exit otherwise.
pub(crate) fn record_at_exit() {
    extern "C" fn write() {
        guard(|| {
            if let (Some(path), false) = (&Config::get().stats, FORKED.load(Ordering::Relaxed)) {
                crate::record::write(path);
            }
            code::SUCCESS
        });
    }
    static ONCE: Once = Once::new();
    if Config::get().stats.is_some() {
        ONCE.call_once(|| {
            // Slots lead here or NCCL holds us, so the code is there at the end.
            intercept::pin_library();
            // SAFETY: the handler takes nothing and lets no panic out.
            if unsafe { libc::atexit(write) } != 0 {
                warning!(-1, "atexit failed: TWOSHOT_STATS is written at the end of communicators only");
            }
        });
    }
}

/// NCCL has loaded us as a network plugin; `inside_nccl` is an address inside the very library that did. Reroutes the
/// program's calls to us.
pub(crate) fn plugin_loaded(inside_nccl: *const c_void) {
    prepare();
    if collnet_mode() {
        watch_forks();
        record_at_exit();
        // NCCL 2.22 to 2.26 close the library with their last communicator; connections have threads of ours.
        intercept::pin_library();
        return;
    }
    // A tuner would be asked for its opinion of every collective.
    intercept::conceal(&tuner::tables());
    if off() {
        return;
    }
    intercept::learn_caller(inside_nccl);
    binding::open();
}

/// Drops what could not be dropped when its communicator ended.
pub(crate) fn collect() {
    crate::comm::collect();
    exchange::collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_inside_a_stock_function_leaves_the_thread_as_it_was() {
        for before in [false, true] {
            INSIDE.set(before);
            let code = guard(|| {
                let _inside = Inside::enter();
                assert!(INSIDE.get());
                panic!("inside");
            });
            assert_eq!((code, INSIDE.get()), (code::INTERNAL, before));
        }
        INSIDE.set(false);
    }
}
