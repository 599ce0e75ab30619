//! The network: tables of versions 8 to 12.
//!
//! In direct mode it opens the door and offers no network: NCCL reads one of the tables below, calls `init`, then
//! `devices`, sees no device, and goes on to the next plugin of `NCCL_NET_PLUGIN` or to its own networks. In mode
//! `collnet` it is the network over the NVLink domain (`official::net`) or, where `TWOSHOT_NET` names another plugin, that
//! plugin's table takes the place of ours. What the releases do, read in their sources (2.20.3 to 2.30.7):
//! - No device and a failed `init` both mean "not this one", without an error. After a failed `init`, though, 2.28 and
//!   2.29 call `finalize` all the same. So `init` always succeeds, whatever happens inside, and `devices` says 0.
//! - `finalize` (v11, v12) is called after `devices` said 0. It must exist and succeed.
//! - `init` runs once per process, except in 2.22 to 2.26, which unload and reload the plugin when the last communicator
//!   is gone. (For v11 and v12 it runs for every communicator, but only of a network that has devices: one without is
//!   disabled for good.) Running again is harmless.
//! - `init` runs inside the first communicator's creation, in its thread, under NCCL's plugin lock. For versions older
//!   than its own NCCL reads the other functions of the table after `init`; its own version's it reads at every call.
//! - Since 2.28.7 a plugin whose `name` is not the network that the user chose (`NCCL_NET`, or a communicator's `netName`)
//!   is loaded, but its `init` is not called. Then this door stays shut; docs/doors.md names the others.
#![allow(non_upper_case_globals)]

mod calls;

use std::ffi::{CStr, CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;

use super::table::bindings::*;
use super::table::{Table, put};
use super::{Code, code, collnet_mode, guard, plugin_loaded, preload, transparent};
use crate::config::Config;
use crate::official::net::GROUP;
use crate::official::nics::{LATENCY_US, MAX_BYTES, MAX_COMMS, SPEED_MBPS, nics};
use crate::{info, warning};
use calls::*;

/// NCCL has loaded us; its log function tells which NCCL that was.
fn loaded(log: ncclDebugLogger_t) {
    let address = log.map_or(std::ptr::null(), |log| log as *const c_void);
    // A panic ends here: the door stays shut, NCCL works as without us.
    let _ = std::panic::catch_unwind(|| {
        plugin_loaded(address);
        if !transparent() {
            preload::here();
        }
    });
}

/// The table of this name in the plugin that the user chose as network, if there is such a choice.
fn stand_in<T: Copy>(name: &CStr) -> Option<T> {
    let path = Config::get().net.as_ref().filter(|_| collnet_mode())?;
    let file = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: opens what the user named, as NCCL would. Never closed: its functions stay in use.
    let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        warning!(-1, "TWOSHOT_NET: {} cannot be opened, NCCL uses its own network without CollNet", path.display());
        return None;
    }
    // SAFETY: an open handle and a C string.
    let table = unsafe { libc::dlsym(library, name.as_ptr()) };
    let Some(table) = std::ptr::NonNull::new(table.cast::<T>()) else {
        let name = name.to_string_lossy();
        warning!(-1, "TWOSHOT_NET: {} has no {name}, NCCL uses its own network without CollNet", path.display());
        return None;
    };
    info!(-1, "collnet: the network is that of {}", path.display());
    // SAFETY: the plugin exports a table of this type under this name.
    Some(unsafe { table.read() })
}

macro_rules! init {
    ($log:ident $name:ident $table:ident $type:ident $symbol:literal ( $($arg:ident: $kind:ty),* ) $(clears $context:ident)?) => {
        /// # Safety
        /// NCCL's contract: the pointers are null or its own.
        unsafe extern "C" fn $name($($arg: $kind),*) -> Code {
            guard(|| {
                // SAFETY: the caller's promise.
                $(unsafe { put($context, std::ptr::null_mut()) };)?
                loaded($log);
                let Some(theirs) = stand_in::<$type>($symbol) else { return code::SUCCESS };
                // SAFETY: this is the `init` of that table.
                unsafe { $table.replace(theirs) };
                match theirs.init {
                    // SAFETY: the caller's own arguments.
                    Some(init) => unsafe { init($($arg),*) },
                    None => code::INTERNAL,
                }
            })
        }
    };
}

init!(log init_v8 ncclNetPlugin_v8 ncclNet_v8_t c"ncclNetPlugin_v8" (log: ncclDebugLogger_t));
init!(log init_v9 ncclNetPlugin_v9 ncclNet_v9_t c"ncclNetPlugin_v9" (log: ncclDebugLogger_t));
init!(log init_v10 ncclNetPlugin_v10 ncclNet_v10_t c"ncclNetPlugin_v10" (log: ncclDebugLogger_t, profiler: ncclProfilerCallback_t));
init!(log init_v11 ncclNetPlugin_v11 ncclNet_v11_t c"ncclNetPlugin_v11" (
    context: *mut *mut c_void, id: u64, config: *mut ncclNetCommConfig_v11_t, log: ncclDebugLogger_t,
    profiler: ncclProfilerCallback_t
) clears context);
init!(log init_v12 ncclNetPlugin_v12 ncclNet_v12_t c"ncclNetPlugin_v12" (
    context: *mut *mut c_void, id: u64, config: *mut ncclNetCommConfig_v12_t, log: ncclDebugLogger_t,
    profiler: ncclProfilerCallback_t
) clears context);

/// Whether the network is ours to offer: not in direct mode, and not where another plugin was chosen.
fn ours() -> bool {
    collnet_mode() && Config::get().net.is_none()
}

/// # Safety
/// `count` is null or NCCL's own variable.
unsafe extern "C" fn devices(count: *mut c_int) -> Code {
    guard(|| {
        let offered = if ours() { nics().len() } else { 0 };
        // SAFETY: the caller's promise.
        unsafe { put(count, c_int::try_from(offered).unwrap_or(0)) };
        code::SUCCESS
    })
}

unsafe extern "C" fn finalize(_: *mut c_void) -> Code {
    guard(communicator_ends)
}

/// What connects of the collective network have left behind, where NCCL ends a communicator or makes one.
pub(super) fn communicator_ends() -> Code {
    if collnet_mode() {
        crate::comm::collect();
    }
    code::SUCCESS
}

macro_rules! describe {
    ($name:ident $properties:ident { $($field:ident: $value:expr),* }) => {
        /// # Safety
        /// `out` is null or NCCL's own structure.
        unsafe extern "C" fn $name(device: c_int, out: *mut $properties) -> Code {
            guard(|| {
                let nic = usize::try_from(device).ok().filter(|_| ours()).and_then(|index| nics().get(index));
                let Some(nic) = nic else { return code::INTERNAL };
                #[allow(unused_mut, reason = "the oldest version has no more fields")]
                let mut properties = $properties {
                    name: nic.name().as_ptr().cast_mut(),
                    pciPath: std::ptr::null_mut(),
                    guid: nic.guid,
                    ptrSupport: (NCCL_PTR_HOST | NCCL_PTR_CUDA) as c_int,
                    speed: SPEED_MBPS,
                    latency: LATENCY_US,
                    maxComms: MAX_COMMS,
                    maxRecvs: GROUP as c_int,
                    netDeviceType: NCCL_NET_DEVICE_HOST as c_int,
                    netDeviceVersion: NCCL_NET_DEVICE_INVALID_VERSION as c_int,
                    ..Default::default()
                };
                $(properties.$field = $value;)*
                describe!(@virtual properties device $($field)*);
                // SAFETY: the caller's promise.
                unsafe { put(out, properties) };
                code::SUCCESS
            })
        }
    };
    (@virtual $properties:ident $device:ident) => {};
    (@virtual $properties:ident $device:ident $($field:ident)+) => {
        $properties.vProps.ndevs = 1;
        $properties.vProps.devs[0] = $device;
    };
}

describe!(describe_v8 ncclNetProperties_v8_t {});
describe!(describe_v9 ncclNetProperties_v9_t { maxP2pBytes: MAX_BYTES, maxCollBytes: MAX_BYTES });
describe!(describe_v11 ncclNetProperties_v11_t {
    maxP2pBytes: MAX_BYTES, maxCollBytes: MAX_BYTES, maxMultiRequestSize: 1
});
describe!(describe_v12 ncclNetProperties_v12_t {
    maxP2pBytes: MAX_BYTES, maxCollBytes: MAX_BYTES, maxMultiRequestSize: 1, railId: NCCL_NET_ID_UNDEF as i16,
    planeId: NCCL_NET_ID_UNDEF as i16
});

macro_rules! table {
    ($name:ident: $type:ident { $($own:ident: $value:expr),* $(,)? }) => {
        /// See the head of this file.
        #[unsafe(no_mangle)]
        pub static $name: Table<$type> = Table::new($type {
            name: c"twoshot".as_ptr(),
            devices: Some(devices),
            accept: Some(accept_from),
            regMr: Some(reg_mr),
            regMrDmaBuf: Some(reg_mr_dma_buf),
            deregMr: Some(dereg_mr),
            iflush: Some(iflush),
            test: Some(test),
            closeSend: Some(close_send),
            closeRecv: Some(close_recv),
            closeListen: Some(close_listener),
            getDeviceMr: None,
            irecvConsumed: None,
            $($own: $value,)*
        });
    };
}

table!(ncclNetPlugin_v8: ncclNet_v8_t {
    init: Some(init_v8), getProperties: Some(describe_v8), listen: Some(listen_on), connect: Some(connect_to),
    isend: Some(isend_v8), irecv: Some(irecv::<c_int>),
});
table!(ncclNetPlugin_v9: ncclNet_v9_t {
    init: Some(init_v9), getProperties: Some(describe_v9), listen: Some(listen_on), connect: Some(connect_to),
    isend: Some(isend), irecv: Some(irecv::<usize>), makeVDevice: None,
});
table!(ncclNetPlugin_v10: ncclNet_v10_t {
    init: Some(init_v10), getProperties: Some(describe_v9), listen: Some(listen_on), connect: Some(connect_with),
    isend: Some(isend_profiled), irecv: Some(irecv_profiled), makeVDevice: None,
});
table!(ncclNetPlugin_v11: ncclNet_v11_t {
    init: Some(init_v11), getProperties: Some(describe_v11), listen: Some(listen_in), connect: Some(connect_in),
    isend: Some(isend_profiled), irecv: Some(irecv_profiled), makeVDevice: None, finalize: Some(finalize),
    setNetAttr: None,
});
table!(ncclNetPlugin_v12: ncclNet_v12_t {
    init: Some(init_v12), getProperties: Some(describe_v12), listen: Some(listen_in), connect: Some(connect_in),
    isend: Some(isend_profiled), irecv: Some(irecv_profiled), makeVDevice: None, finalize: Some(finalize),
    setNetAttr: None,
});

/// Names and addresses of the tables.
pub(super) fn tables() -> [(&'static CStr, *const c_void); 5] {
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
                let table = $table.get();
                // SAFETY: the functions are this file's; a refusing one reads none of its arguments.
                unsafe {
                    assert_eq!(table.devices.expect("devices")(&raw mut count), code::SUCCESS);
                    assert_eq!(count, 0);
                    let (null, none) = (std::ptr::null_mut(), std::ptr::null_mut());
                    let properties = std::ptr::null_mut();
                    assert_eq!(table.getProperties.expect("getProperties")(0, properties), code::INTERNAL);
                    assert_eq!(table.accept.expect("accept")(null, none, std::ptr::null_mut()), code::INTERNAL);
                    assert_eq!(table.test.expect("test")(null, std::ptr::null_mut(), std::ptr::null_mut()), code::INTERNAL);
                    assert_eq!(CStr::from_ptr(table.name), c"twoshot");
                }
            )*};
        }
        check!(ncclNetPlugin_v8 ncclNetPlugin_v9 ncclNetPlugin_v10 ncclNetPlugin_v11 ncclNetPlugin_v12);
        for finalize in [ncclNetPlugin_v11.get().finalize, ncclNetPlugin_v12.get().finalize] {
            // SAFETY: reads nothing.
            let answer = unsafe { finalize.expect("finalize")(std::ptr::null_mut()) };
            assert_eq!(answer, code::SUCCESS);
        }
    }
}
