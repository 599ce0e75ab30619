//! The collective network: tables of versions 8 to 12 over `official::collnet`.
//!
//! NCCL asks for a collective network only where the network of the same library has devices; both share one list of
//! devices in NCCL's topology, told apart by name. So this one has the devices of the network that stands beside it,
//! ours or that of `TWOSHOT_NET`, and changes only what a reduction over NVLink changes.
//!
//! A `connect` that fails, for whatever reason, means to NCCL: no CollNet, on any rank, and a warning. It forgets the
//! listener then.
#![allow(non_upper_case_globals)]

use std::ffi::{c_int, c_void};

use super::net::{ncclNetPlugin_v8, ncclNetPlugin_v9, ncclNetPlugin_v10, ncclNetPlugin_v11, ncclNetPlugin_v12};
use super::table::bindings::*;
use super::table::{Table, hand_out, put};
use super::{Code, code, collnet_mode, guard, on_progress_thread, result_of};
use crate::call::{DataType, ReduceOp};
use crate::error::Error;
use crate::official::address::HANDLE;
use crate::official::collnet::{Coll, Part, Request, Window, close_listen, listen, supports};
use crate::official::nics::{MAX_BYTES, SPEED_MBPS};
use crate::warning;

fn failed(what: &str, error: &Error) -> Code {
    warning!(-1, "collnet: {what}: {error}");
    result_of(error)
}

unsafe extern "C" fn init(_: ncclDebugLogger_t) -> Code {
    code::SUCCESS
}

/// # Safety
/// `context` is null or writable.
unsafe extern "C" fn init_with_context(context: *mut *mut c_void, _: u64, _: ncclDebugLogger_t) -> Code {
    // SAFETY: NCCL passes the address of its own pointer.
    unsafe { put(context, std::ptr::null_mut()) };
    code::SUCCESS
}

unsafe extern "C" fn finalize(_: *mut c_void) -> Code {
    guard(super::net::communicator_ends)
}

/// # Safety
/// NCCL's contract: `handle` has room for [`HANDLE`] bytes, `out` is its own variable.
unsafe extern "C" fn listen_on(nic: c_int, handle: *mut c_void, out: *mut *mut c_void) -> Code {
    guard(|| {
        if !collnet_mode() || handle.is_null() {
            return code::INTERNAL;
        }
        match listen(nic) {
            // SAFETY: the caller's promise; the handle is not null.
            Ok(listener) => unsafe { hand_out(listener, handle, out) },
            Err(error) => failed("listening", &error),
        }
    })
}

/// # Safety
/// As for [`listen_on`].
unsafe extern "C" fn listen_in(_: *mut c_void, nic: c_int, handle: *mut c_void, out: *mut *mut c_void) -> Code {
    // SAFETY: as above.
    unsafe { listen_on(nic, handle, out) }
}

/// # Safety
/// NCCL's contract: `handles` are `ranks` pointers to handles, `out` is its own variable.
unsafe extern "C" fn connect(
    handles: *mut *mut c_void,
    ranks: c_int,
    rank: c_int,
    listener: *mut c_void,
    out: *mut *mut c_void,
) -> Code {
    guard(|| {
        let (Ok(count), Ok(rank)) = (usize::try_from(ranks), u32::try_from(rank)) else { return code::INTERNAL };
        if !collnet_mode() || handles.is_null() || out.is_null() {
            return code::INTERNAL;
        }
        // SAFETY: the caller's promise.
        let handles: Vec<[u8; HANDLE]> =
            unsafe { (0..count).map(|i| (*handles.add(i)).cast::<[u8; HANDLE]>().read_unaligned()).collect() };
        match Coll::connect(&handles, rank, listener as usize) {
            Ok(Some(coll)) => {
                // SAFETY: as above. The box is taken back by `close_coll`.
                unsafe { put(out, Box::into_raw(Box::new(coll)).cast()) };
                code::SUCCESS
            }
            // Every rank has said why in its log.
            Ok(None) => code::SYSTEM,
            Err(error) => failed("connecting", &error),
        }
    })
}

/// # Safety
/// `out` is null or NCCL's own variable.
unsafe extern "C" fn reduce_support(dtype: ncclDataType_t, op: ncclRedOp_t, out: *mut c_int) -> Code {
    // SAFETY: the caller's promise.
    unsafe { put(out, c_int::from(supports(dtype, op))) };
    code::SUCCESS
}

/// What stands for a registration: the kernels take any memory of the device.
static REGISTERED: u8 = 0;

/// # Safety
/// `out` is null or NCCL's own variable.
unsafe extern "C" fn reg_mr(
    _: *mut c_void,
    address: *mut c_void,
    _: usize,
    kind: c_int,
    out: *mut *mut c_void,
) -> Code {
    guard(|| {
        if !Coll::takes_memory(address as u64, kind & NCCL_PTR_HOST as c_int != 0) {
            warning!(-1, "collnet: host memory at {address:p} is not pinned by CUDA");
            return code::SYSTEM;
        }
        // SAFETY: the caller's promise.
        unsafe { put(out, (&raw const REGISTERED).cast_mut().cast()) };
        code::SUCCESS
    })
}

/// # Safety
/// As for [`reg_mr`].
unsafe extern "C" fn reg_mr_dma_buf(
    coll: *mut c_void,
    address: *mut c_void,
    size: usize,
    kind: c_int,
    _: u64,
    _: c_int,
    out: *mut *mut c_void,
) -> Code {
    // SAFETY: as above. The descriptor is the caller's; the address says all that is needed.
    unsafe { reg_mr(coll, address, size, kind, out) }
}

unsafe extern "C" fn dereg_mr(_: *mut c_void, _: *mut c_void) -> Code {
    code::SUCCESS
}

/// Runs one operation of a communicator and hands its request to NCCL: null where it has to try again.
///
/// # Safety
/// `coll` came from [`connect`] and was not closed; `request` is NCCL's own variable.
unsafe fn issue(
    coll: *mut c_void,
    request: *mut *mut c_void,
    operation: impl FnOnce(&Coll) -> crate::error::Result<Option<&std::sync::Arc<Request>>>,
) -> Code {
    on_progress_thread(|| {
        // SAFETY: the caller's promise; NCCL uses a communicator from one thread at a time, and reads only here.
        let Some(coll) = (unsafe { coll.cast::<Coll>().as_ref() }) else { return code::INTERNAL };
        match operation(coll) {
            Ok(issued) => {
                let pointer = issued.map_or(std::ptr::null(), std::sync::Arc::as_ptr);
                // SAFETY: as above. The communicator keeps its requests until it is closed.
                unsafe { put(request, pointer.cast_mut().cast()) };
                code::SUCCESS
            }
            Err(error) => failed("a collective", &error),
        }
    })
}

/// # Safety
/// NCCL's contract: a live communicator, device buffers of `count` elements until the request is done.
unsafe extern "C" fn iallreduce(
    coll: *mut c_void,
    input: *mut c_void,
    output: *mut c_void,
    count: usize,
    dtype: ncclDataType_t,
    op: ncclRedOp_t,
    _: *mut c_void,
    _: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    let (input, output, count) = (input as u64, output as u64, count as u64);
    // SAFETY: the caller's promise.
    unsafe { issue(coll, request, |coll| coll.allreduce(input, output, count, DataType(dtype), ReduceOp(op))) }
}

/// # Safety
/// As for [`iallreduce`].
unsafe extern "C" fn iallreduce_v8(
    coll: *mut c_void,
    input: *mut c_void,
    output: *mut c_void,
    count: c_int,
    dtype: ncclDataType_t,
    op: ncclRedOp_t,
    input_mr: *mut c_void,
    output_mr: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    let Ok(count) = usize::try_from(count) else { return code::INTERNAL };
    // SAFETY: the caller's promise.
    unsafe { iallreduce(coll, input, output, count, dtype, op, input_mr, output_mr, request) }
}

/// A part as NCCL's versions state it.
trait Piece {
    fn part(&self) -> Part;
}

impl Piece for ncclNetSGE_v8_t {
    fn part(&self) -> Part {
        Part { address: self.address as u64, bytes: u64::from(self.size) }
    }
}

impl Piece for ncclNetSGE_v9_t {
    fn part(&self) -> Part {
        Part { address: self.address as u64, bytes: self.size as u64 }
    }
}

/// Most parts of one operation; NCCL (2.20 to 2.30) gives one.
const PARTS: usize = 16;

/// # Safety
/// `parts` are `count` parts.
unsafe fn parts<T: Piece>(parts: *const T, count: c_int) -> Option<([Part; PARTS], usize)> {
    let count = usize::try_from(count).ok().filter(|count| *count <= PARTS && (*count == 0 || !parts.is_null()))?;
    let mut all = [Part { address: 0, bytes: 0 }; PARTS];
    for (i, part) in all[..count].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *part = unsafe { (*parts.add(i)).part() };
    }
    Some((all, count))
}

/// # Safety
/// NCCL's contract: a live communicator, device buffers until the request is done.
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn iallgather<T: Piece>(
    coll: *mut c_void,
    input: *mut c_void,
    count: c_int,
    output: *mut T,
    bytes_per_rank: usize,
    offset: usize,
    bytes: usize,
    _: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise.
    let Some((all, count)) = (unsafe { parts(output, count) }) else { return code::INTERNAL };
    let window = Window { bytes_per_rank: bytes_per_rank as u64, offset: offset as u64, bytes: bytes as u64 };
    // SAFETY: as above.
    unsafe { issue(coll, request, |coll| coll.allgather(input as u64, &all[..count], window)) }
}

/// # Safety
/// As for [`iallgather`].
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn ireducescatter<T: Piece>(
    coll: *mut c_void,
    count: c_int,
    input: *mut T,
    output: *mut c_void,
    bytes_per_rank: usize,
    offset: usize,
    bytes: usize,
    dtype: ncclDataType_t,
    op: ncclRedOp_t,
    _: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise.
    let Some((all, count)) = (unsafe { parts(input, count) }) else { return code::INTERNAL };
    let window = Window { bytes_per_rank: bytes_per_rank as u64, offset: offset as u64, bytes: bytes as u64 };
    let (output, dtype, op) = (output as u64, DataType(dtype), ReduceOp(op));
    // SAFETY: as above.
    unsafe { issue(coll, request, |coll| coll.reduce_scatter(&all[..count], output, window, dtype, op)) }
}

/// Nothing to flush: a request is done when the GPU's own stores are.
///
/// # Safety
/// `request` is null or NCCL's own variable.
unsafe extern "C" fn iflush(
    _: *mut c_void,
    _: *mut c_void,
    _: c_int,
    _: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise. No request means done.
    unsafe { put(request, std::ptr::null_mut()) };
    code::SUCCESS
}

/// # Safety
/// `request` is one of a live communicator, and was not reported as done; the others are null or NCCL's own.
unsafe extern "C" fn test(request: *mut c_void, done: *mut c_int, size: *mut c_int) -> Code {
    on_progress_thread(|| {
        // SAFETY: the caller's promise: the communicator keeps the request.
        let Some(request) = (unsafe { request.cast::<Request>().as_ref() }) else { return code::INTERNAL };
        // SAFETY: as above.
        unsafe { put(done, 0) };
        match request.test() {
            Ok(None) => code::SUCCESS,
            Ok(Some(bytes)) => {
                // SAFETY: as above.
                unsafe {
                    put(done, 1);
                    put(size, c_int::try_from(bytes).unwrap_or(c_int::MAX));
                }
                code::SUCCESS
            }
            Err(error) => failed("a request", &error),
        }
    })
}

/// # Safety
/// `coll` is null or came from [`connect`]; it is not used again.
unsafe extern "C" fn close_coll(coll: *mut c_void) -> Code {
    guard(|| {
        if !coll.is_null() {
            // SAFETY: the caller's promise: the box that `connect` gave away.
            unsafe { Box::from_raw(coll.cast::<Coll>()) }.close();
        }
        code::SUCCESS
    })
}

unsafe extern "C" fn close_listener(listener: *mut c_void) -> Code {
    guard(|| {
        close_listen(listener as usize);
        code::SUCCESS
    })
}

/// What a reduction over NVLink changes of a device of the network beside it.
macro_rules! overlay {
    ($properties:expr) => {{
        let properties = &mut *$properties;
        properties.ptrSupport |= (NCCL_PTR_HOST | NCCL_PTR_CUDA) as c_int;
        properties.speed = properties.speed.max(SPEED_MBPS);
        properties.netDeviceType = NCCL_NET_DEVICE_HOST as c_int;
        properties.netDeviceVersion = NCCL_NET_DEVICE_INVALID_VERSION as c_int;
        properties
    }};
}

macro_rules! beside {
    ($devices:ident $describe:ident $net:ident $properties:ident $($limit:ident)?) => {
        /// # Safety
        /// `count` is null or NCCL's own variable.
        unsafe extern "C" fn $devices(count: *mut c_int) -> Code {
            guard(|| {
                // SAFETY: the caller's promise.
                unsafe { put(count, 0) };
                match ($net.get().devices, collnet_mode()) {
                    // SAFETY: as above.
                    (Some(devices), true) => unsafe { devices(count) },
                    _ => code::SUCCESS,
                }
            })
        }

        /// # Safety
        /// `out` is null or NCCL's own structure.
        unsafe extern "C" fn $describe(device: c_int, out: *mut $properties) -> Code {
            guard(|| {
                let (Some(describe), false, true) = ($net.get().getProperties, out.is_null(), collnet_mode()) else {
                    return code::INTERNAL;
                };
                // SAFETY: the caller's promise.
                let told = unsafe { describe(device, out) };
                if told == code::SUCCESS {
                    // SAFETY: as above, and just filled.
                    let _properties = unsafe { overlay!(out) };
                    $(_properties.$limit = MAX_BYTES;)?
                }
                told
            })
        }
    };
}

beside!(devices_v8 describe_v8 ncclNetPlugin_v8 ncclNetProperties_v8_t);
beside!(devices_v9 describe_v9 ncclNetPlugin_v9 ncclNetProperties_v9_t maxCollBytes);
beside!(devices_v10 describe_v10 ncclNetPlugin_v10 ncclNetProperties_v10_t maxCollBytes);
beside!(devices_v11 describe_v11 ncclNetPlugin_v11 ncclNetProperties_v11_t maxCollBytes);
beside!(devices_v12 describe_v12 ncclNetPlugin_v12 ncclNetProperties_v12_t maxCollBytes);

macro_rules! table {
    ($name:ident: $type:ident { $($own:ident: $value:expr),* $(,)? }) => {
        /// See the head of this file.
        #[unsafe(no_mangle)]
        pub static $name: Table<$type> = Table::new($type {
            name: c"twoshot".as_ptr(),
            connect: Some(connect),
            reduceSupport: Some(reduce_support),
            regMr: Some(reg_mr),
            regMrDmaBuf: Some(reg_mr_dma_buf),
            deregMr: Some(dereg_mr),
            iflush: Some(iflush),
            test: Some(test),
            closeColl: Some(close_coll),
            closeListen: Some(close_listener),
            $($own: $value,)*
        });
    };
}

table!(ncclCollNetPlugin_v8: ncclCollNet_v8_t {
    init: Some(init), devices: Some(devices_v8), getProperties: Some(describe_v8), listen: Some(listen_on),
    iallreduce: Some(iallreduce_v8), iallgather: Some(iallgather), ireducescatter: Some(ireducescatter),
});
table!(ncclCollNetPlugin_v9: ncclCollNet_v9_t {
    init: Some(init), devices: Some(devices_v9), getProperties: Some(describe_v9), listen: Some(listen_on),
    iallreduce: Some(iallreduce), iallgather: Some(iallgather), ireducescatter: Some(ireducescatter), makeVDevice: None,
});
table!(ncclCollNetPlugin_v10: ncclCollNet_v10_t {
    init: Some(init), devices: Some(devices_v10), getProperties: Some(describe_v10), listen: Some(listen_on),
    iallreduce: Some(iallreduce), iallgather: Some(iallgather), ireducescatter: Some(ireducescatter), makeVDevice: None,
});
table!(ncclCollNetPlugin_v11: ncclCollNet_v11_t {
    init: Some(init_with_context), devices: Some(devices_v11), getProperties: Some(describe_v11), listen: Some(listen_in),
    iallreduce: Some(iallreduce), iallgather: Some(iallgather), ireducescatter: Some(ireducescatter), makeVDevice: None,
    finalize: Some(finalize),
});
table!(ncclCollNetPlugin_v12: ncclCollNet_v12_t {
    init: Some(init_with_context), devices: Some(devices_v12), getProperties: Some(describe_v12), listen: Some(listen_in),
    iallreduce: Some(iallreduce), iallgather: Some(iallgather), ireducescatter: Some(ireducescatter), makeVDevice: None,
    finalize: Some(finalize),
});

/// Names and addresses of the tables.
pub(super) fn tables() -> [(&'static std::ffi::CStr, *const c_void); 5] {
    [
        (c"ncclCollNetPlugin_v8", (&raw const ncclCollNetPlugin_v8).cast()),
        (c"ncclCollNetPlugin_v9", (&raw const ncclCollNetPlugin_v9).cast()),
        (c"ncclCollNetPlugin_v10", (&raw const ncclCollNetPlugin_v10).cast()),
        (c"ncclCollNetPlugin_v11", (&raw const ncclCollNetPlugin_v11).cast()),
        (c"ncclCollNetPlugin_v12", (&raw const ncclCollNetPlugin_v12).cast()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_direct_mode_no_version_has_a_device_or_opens_anything() {
        macro_rules! check {
            ($($table:ident)*) => {$(
                let table = $table.get();
                let mut count = 7;
                let mut out = std::ptr::null_mut();
                let mut handles = [std::ptr::null_mut()];
                // SAFETY: valid out-pointers; what the functions refuse they do not read.
                unsafe {
                    assert_eq!(table.devices.expect("devices")(&raw mut count), code::SUCCESS);
                    assert_eq!(count, 0);
                    let connect = table.connect.expect("connect");
                    let null = std::ptr::null_mut();
                    assert_eq!(connect(handles.as_mut_ptr(), 1, 0, null, &raw mut out), code::INTERNAL);
                    assert_eq!(std::ffi::CStr::from_ptr(table.name), c"twoshot");
                }
            )*};
        }
        check!(ncclCollNetPlugin_v8 ncclCollNetPlugin_v9 ncclCollNetPlugin_v10 ncclCollNetPlugin_v11 ncclCollNetPlugin_v12);
    }
}
