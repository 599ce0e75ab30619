//! Functions of twoshot's own, declared in `include/twoshot.h`.

use std::ffi::{c_char, c_int};

use crate::counters;

/// Writes how many AllReduce calls of this process ran in our kernels and how many in stock NCCL. Either pointer may
/// be null. Returns 0.
///
/// # Safety
/// The pointers are null or valid for one 64-bit integer each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn twoshot_counters(routed: *mut u64, stock: *mut u64) -> c_int {
    let totals = counters::process();
    for (out, value) in [(routed, totals.0), (stock, totals.1)] {
        if !out.is_null() {
            // SAFETY: the caller's promise.
            unsafe { *out = value };
        }
    }
    0
}

/// The version of this library, as text that lives as long as the program.
#[unsafe(no_mangle)]
pub extern "C" fn twoshot_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}
