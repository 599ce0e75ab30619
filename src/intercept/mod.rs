//! Between the program and the stock NCCL: finding the stock library, rerouting the program's calls, passing on the rest.
//!
//! This module and `abi` are the only places with unsafe code for the C side. It knows nothing of communicators and
//! writes no log of its own: what it finds is returned (the one exception, [`set_log`], is for functions that were called
//! by the program and cannot be passed on).

pub mod elf;
mod functions;
mod objects;
mod pages;
mod pass;
mod relocate;
mod scope;
mod stock;
mod trampoline;
pub mod walk;

pub use functions::{CallConfig, Code, Comm, Config, Functions, SignalWait, Stream, UniqueId};
pub use relocate::{BindReport, Known};
pub use scope::{conceal, withdraw};
pub use stock::{Stock, StockError, learn_caller, set_explicit_path, stock};
pub use trampoline::set_log;

use std::ffi::{CStr, c_void};

/// Reroutes calls from the stock library to `targets`, pairs of a name and our function: those of all loaded objects or,
/// where it is done again, those of the objects that the first time found.
///
/// The stock library must be loaded; without one nothing is rerouted.
pub fn bind_relocations(
    targets: &[(&CStr, *const c_void)],
    known: Option<&Known>,
) -> Result<(BindReport, Known), StockError> {
    Ok(relocate::bind(stock()?, targets, known))
}

/// Keeps this library loaded for good. To be called once slots lead into it: closing it would leave them dangling.
///
/// Returns false if the dynamic linker refused, or if this code is part of the program itself.
pub fn pin_library() -> bool {
    let Some(us) = objects::ourselves() else {
        return false;
    };
    if us.name.is_empty() {
        return false;
    }
    let flags = libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
    // SAFETY: loads nothing, only marks the library.
    let handle = unsafe { libc::dlopen(us.name.as_ptr(), flags) };
    !handle.is_null()
}
