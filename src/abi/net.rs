//! The network plugin that opens the direct door: NCCL loads it, it offers no network.
//!
//! NCCL reads one of the tables below, calls `init`, then `devices`, sees no device, and goes on to the next plugin of
//! `NCCL_NET_PLUGIN` or to its own networks. What the releases do, read in their sources (2.20.3 to 2.30.7):
//! - No device and a failed `init` both mean "not this one", without an error. After a failed `init`, though, 2.28 and
//!   2.29 call `finalize` all the same. So `init` always succeeds, whatever happens inside, and `devices` says 0.
//! - `finalize` (v11, v12) is called after `devices` said 0. It must exist and succeed.
//! - `init` runs once per process, except in 2.22 to 2.26, which unload and reload the plugin when the last communicator
//!   is gone. Running again is harmless: binding twice changes nothing.
//! - `init` runs inside the first communicator's creation, in its thread, under NCCL's plugin lock.
//! - Since 2.28.7 a plugin whose `name` is not the network that the user chose (`NCCL_NET`, or a communicator's `netName`)
//!   is loaded, but its `init` is not called. Then this door stays shut; docs/doors.md names the others.
#![allow(non_upper_case_globals)]

use super::plugin_loaded;
use bindings::*;
use std::ffi::{c_int, c_void};

#[allow(dead_code, missing_docs, non_camel_case_types, non_snake_case, clippy::all, clippy::undocumented_unsafe_blocks)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/net_abi.rs"));
}

const SUCCESS: c_int = 0;
const INTERNAL_ERROR: c_int = 3;

/// A table of functions that other threads may read.
#[repr(transparent)]
pub struct Table<T>(T);

// SAFETY: a table is never written; its name is a constant.
unsafe impl<T> Sync for Table<T> {}

/// A function of any signature that answers ncclInternalError: NCCL has no reason to call it.
trait Refuse {
    const REFUSE: Self;
}

macro_rules! refuse {
    ($($argument:ident)*) => {
        impl<$($argument),*> Refuse for unsafe extern "C" fn($($argument),*) -> c_int {
            const REFUSE: Self = {
                unsafe extern "C" fn refuse<$($argument),*>($(_: $argument),*) -> c_int {
                    INTERNAL_ERROR
                }
                refuse::<$($argument),*>
            };
        }
    };
}
refuse!(A);
refuse!(A B);
refuse!(A B C);
refuse!(A B C D);
refuse!(A B C D E);
refuse!(A B C D E F);
refuse!(A B C D E F G);
refuse!(A B C D E F G H);

const fn refuse<F: Refuse>() -> Option<F> {
    Some(F::REFUSE)
}

/// NCCL has loaded us; its log function tells which NCCL that was.
fn loaded(log: ncclDebugLogger_t) -> c_int {
    let address = log.map_or(std::ptr::null(), |log| log as *const c_void);
    // A panic ends here: the door stays shut, NCCL works as without us.
    let _ = std::panic::catch_unwind(|| plugin_loaded(address));
    SUCCESS
}

unsafe extern "C" fn init(log: ncclDebugLogger_t) -> c_int {
    loaded(log)
}

unsafe extern "C" fn init_with_profiler(log: ncclDebugLogger_t, _: ncclProfilerCallback_t) -> c_int {
    loaded(log)
}

/// # Safety
/// `context` is null or writable.
unsafe extern "C" fn init_with_context(
    context: *mut *mut c_void,
    _: u64,
    _: *mut ncclNetCommConfig_v10_t,
    log: ncclDebugLogger_t,
    _: ncclProfilerCallback_t,
) -> c_int {
    if !context.is_null() {
        // SAFETY: NCCL passes the address of its own pointer.
        unsafe { *context = std::ptr::null_mut() };
    }
    loaded(log)
}

/// # Safety
/// `count` is null or writable.
unsafe extern "C" fn devices(count: *mut c_int) -> c_int {
    if !count.is_null() {
        // SAFETY: NCCL passes the address of its own int.
        unsafe { *count = 0 };
    }
    SUCCESS
}

unsafe extern "C" fn finalize(_: *mut c_void) -> c_int {
    SUCCESS
}

macro_rules! table {
    ($name:ident: $type:ident { $($given:ident: $value:ident),* } $($refused:ident)*) => {
        /// See the head of this file.
        #[unsafe(no_mangle)]
        pub static $name: Table<$type> = Table($type {
            name: c"twoshot".as_ptr(),
            $($given: Some($value),)*
            getProperties: refuse(),
            listen: refuse(),
            connect: refuse(),
            accept: refuse(),
            regMr: refuse(),
            regMrDmaBuf: refuse(),
            deregMr: refuse(),
            isend: refuse(),
            irecv: refuse(),
            iflush: refuse(),
            test: refuse(),
            closeSend: refuse(),
            closeRecv: refuse(),
            closeListen: refuse(),
            getDeviceMr: refuse(),
            irecvConsumed: refuse(),
            $($refused: refuse(),)*
        });
    };
}

table!(ncclNetPlugin_v8: ncclNet_v8_t { init: init, devices: devices });
table!(ncclNetPlugin_v9: ncclNet_v9_t { init: init, devices: devices } makeVDevice);
table!(ncclNetPlugin_v10: ncclNet_v10_t { init: init_with_profiler, devices: devices } makeVDevice);
table!(ncclNetPlugin_v11: ncclNet_v11_t {
    init: init_with_context, devices: devices, finalize: finalize
} makeVDevice setNetAttr);
table!(ncclNetPlugin_v12: ncclNet_v12_t {
    init: init_with_context, devices: devices, finalize: finalize
} makeVDevice setNetAttr);

/// Names and addresses of the tables.
pub(super) fn tables() -> [(&'static std::ffi::CStr, *const c_void); 5] {
    [
        (c"ncclNetPlugin_v8", (&raw const ncclNetPlugin_v8).cast()),
        (c"ncclNetPlugin_v9", (&raw const ncclNetPlugin_v9).cast()),
        (c"ncclNetPlugin_v10", (&raw const ncclNetPlugin_v10).cast()),
        (c"ncclNetPlugin_v11", (&raw const ncclNetPlugin_v11).cast()),
        (c"ncclNetPlugin_v12", (&raw const ncclNetPlugin_v12).cast()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_reports_no_device_and_refuses_everything_else() {
        macro_rules! check {
            ($($table:ident)*) => {$(
                let mut count = 7;
                let table = &$table.0;
                // SAFETY: the functions are this file's; a refusing one reads none of its arguments.
                unsafe {
                    assert_eq!(table.devices.expect("devices")(&raw mut count), SUCCESS);
                    assert_eq!(count, 0);
                    let null = std::ptr::null_mut();
                    let properties = std::ptr::null_mut();
                    assert_eq!(table.getProperties.expect("getProperties")(0, properties), INTERNAL_ERROR);
                    assert_eq!(table.closeListen.expect("closeListen")(null), INTERNAL_ERROR);
                    assert_eq!(std::ffi::CStr::from_ptr(table.name), c"twoshot");
                }
            )*};
        }
        check!(ncclNetPlugin_v8 ncclNetPlugin_v9 ncclNetPlugin_v10 ncclNetPlugin_v11 ncclNetPlugin_v12);
        for finalize in [ncclNetPlugin_v11.0.finalize, ncclNetPlugin_v12.0.finalize] {
            // SAFETY: reads nothing.
            let code = unsafe { finalize.expect("finalize")(std::ptr::null_mut()) };
            assert_eq!(code, SUCCESS);
        }
    }
}
