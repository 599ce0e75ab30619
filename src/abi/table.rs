//! What the tables of the plugin interface have in common.

use std::cell::UnsafeCell;
use std::ffi::c_void;

use super::{Code, code};
use crate::official::address::HANDLE;

#[allow(
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub(super) mod bindings {
    include!(concat!(env!("OUT_DIR"), "/net_abi.rs"));
}

/// A table of functions that NCCL reads, under one of the names that it looks for.
#[repr(transparent)]
pub struct Table<T>(UnsafeCell<T>);

// SAFETY: a table is written only while NCCL calls its `init` (see `replace`), which NCCL does under a lock and before it
// uses the rest; its name is a constant, and its functions may be called from any thread.
unsafe impl<T> Sync for Table<T> {}

impl<T: Copy> Table<T> {
    pub(super) const fn new(table: T) -> Self {
        Self(UnsafeCell::new(table))
    }

    /// The table as it is now.
    pub(super) fn get(&self) -> T {
        // SAFETY: see `Sync`.
        unsafe { *self.0.get() }
    }

    /// Puts another plugin's table in the place of this one.
    ///
    /// # Safety
    /// Called from this table's own `init` only.
    pub(super) unsafe fn replace(&self, other: T) {
        // SAFETY: the caller's promise: NCCL holds its lock, and nobody else looks at the table.
        unsafe { *self.0.get() = other };
    }
}

/// Writes to an out-pointer of NCCL's, if there is one.
///
/// # Safety
/// `out` is null or NCCL's own variable.
pub(super) unsafe fn put<T>(out: *mut T, value: T) {
    if !out.is_null() {
        // SAFETY: the caller's promise.
        unsafe { out.write(value) };
    }
}

/// Hands a new listener to NCCL: its handle's bytes, and its number in the place of a pointer.
///
/// # Safety
/// `handle` has room for [`HANDLE`] bytes; `out` is null or writable.
pub(super) unsafe fn hand_out(
    (number, bytes): (usize, [u8; HANDLE]),
    handle: *mut c_void,
    out: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise.
    unsafe {
        handle.cast::<[u8; HANDLE]>().write_unaligned(bytes);
        put(out, number as *mut c_void);
    }
    code::SUCCESS
}
