//! The functions of the network's tables, in the shapes of all versions: null checks, and nothing else.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::super::table::bindings::*;
use super::super::table::{hand_out, put};
use super::super::{Code, code, guard, on_progress_thread, result_of};
use super::ours;
use crate::driver::with_relaxed_capture;
use crate::error::Error;
use crate::official::address::HANDLE;
use crate::official::net::{Buffer, Comm, GROUP, Request, accept, close_listen, connect, listen};
use crate::warning;

fn failed(what: &str, error: &Error) -> Code {
    warning!(-1, "network: {what}: {error}");
    result_of(error)
}

/// # Safety
/// NCCL's contract: `handle` has room for [`HANDLE`] bytes, `out` is its own variable.
pub(super) unsafe extern "C" fn listen_on(nic: c_int, handle: *mut c_void, out: *mut *mut c_void) -> Code {
    guard(|| {
        if !ours() || handle.is_null() {
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
pub(super) unsafe extern "C" fn listen_in(
    _: *mut c_void,
    nic: c_int,
    handle: *mut c_void,
    out: *mut *mut c_void,
) -> Code {
    // SAFETY: as above.
    unsafe { listen_on(nic, handle, out) }
}

/// # Safety
/// NCCL's contract: `handle` is a handle, `out` and `device` are null or its own variables.
pub(super) unsafe extern "C" fn connect_to<D>(
    nic: c_int,
    handle: *mut c_void,
    out: *mut *mut c_void,
    device: *mut *mut D,
) -> Code {
    guard(|| {
        if !ours() || handle.is_null() {
            return code::INTERNAL;
        }
        // SAFETY: the caller's promise.
        let handle = unsafe {
            put(out, std::ptr::null_mut());
            put(device, std::ptr::null_mut());
            handle.cast::<[u8; HANDLE]>().read_unaligned()
        };
        match connect(nic, &handle) {
            Ok(Some(comm)) => {
                // SAFETY: as above. The reference is taken back by `close_send`.
                unsafe { put(out, Arc::into_raw(comm).cast_mut().cast()) };
                code::SUCCESS
            }
            // NCCL asks again.
            Ok(None) => code::SUCCESS,
            Err(error) => failed("connecting", &error),
        }
    })
}

/// # Safety
/// As for [`connect_to`].
pub(super) unsafe extern "C" fn connect_with<D>(
    nic: c_int,
    _: *mut ncclNetCommConfig_v10_t,
    handle: *mut c_void,
    out: *mut *mut c_void,
    device: *mut *mut D,
) -> Code {
    // SAFETY: as above.
    unsafe { connect_to(nic, handle, out, device) }
}

/// # Safety
/// As for [`connect_to`].
pub(super) unsafe extern "C" fn connect_in<D>(
    _: *mut c_void,
    nic: c_int,
    handle: *mut c_void,
    out: *mut *mut c_void,
    device: *mut *mut D,
) -> Code {
    // SAFETY: as above.
    unsafe { connect_to(nic, handle, out, device) }
}

/// # Safety
/// NCCL's contract: `out` and `device` are null or its own variables.
pub(super) unsafe extern "C" fn accept_from<D>(
    listener: *mut c_void,
    out: *mut *mut c_void,
    device: *mut *mut D,
) -> Code {
    guard(|| {
        if !ours() {
            return code::INTERNAL;
        }
        // SAFETY: the caller's promise.
        unsafe {
            put(out, std::ptr::null_mut());
            put(device, std::ptr::null_mut());
        }
        match accept(listener as usize) {
            Ok(Some(comm)) => {
                // SAFETY: as above. The reference is taken back by `close_recv`.
                unsafe { put(out, Arc::into_raw(comm).cast_mut().cast()) };
                code::SUCCESS
            }
            Ok(None) => code::SUCCESS,
            Err(error) => failed("accepting", &error),
        }
    })
}

/// What stands for a registration: the kind of memory, in the lowest bits, and above them the number under which the other
/// end may write to it, if it may.
const KIND: usize = 3;
const ABOVE: u32 = 2;
const _: () = assert!(NCCL_PTR_HOST as usize | NCCL_PTR_CUDA as usize == KIND && usize::BITS == 64);

/// # Safety
/// NCCL's contract: `comm` is a live connection or null, `out` is null or its own variable.
pub(super) unsafe extern "C" fn reg_mr(
    comm: *mut c_void,
    address: *mut c_void,
    size: usize,
    kind: c_int,
    out: *mut *mut c_void,
) -> Code {
    guard(|| {
        let known = [NCCL_PTR_HOST as c_int, NCCL_PTR_CUDA as c_int].contains(&kind);
        if !ours() || !known {
            return code::INTERNAL;
        }
        // SAFETY: the caller's promise.
        let comm = unsafe { comm.cast::<Comm>().as_ref() }.filter(|_| kind == NCCL_PTR_CUDA as c_int);
        let register = |comm: &Comm| with_relaxed_capture(|| comm.register(address as u64, size as u64));
        let number = comm.and_then(register).unwrap_or(0) as usize;
        // SAFETY: as above.
        unsafe { put(out, (number << ABOVE | kind as usize) as *mut c_void) };
        code::SUCCESS
    })
}

/// # Safety
/// As for [`reg_mr`].
pub(super) unsafe extern "C" fn reg_mr_dma_buf(
    comm: *mut c_void,
    address: *mut c_void,
    size: usize,
    kind: c_int,
    _: u64,
    _: c_int,
    out: *mut *mut c_void,
) -> Code {
    // SAFETY: as above. The descriptor is the caller's; the address says all that is needed.
    unsafe { reg_mr(comm, address, size, kind, out) }
}

/// # Safety
/// NCCL's contract: `comm` is a live connection or null.
pub(super) unsafe extern "C" fn dereg_mr(comm: *mut c_void, mr: *mut c_void) -> Code {
    guard(|| {
        // SAFETY: the caller's promise.
        let comm = unsafe { comm.cast::<Comm>().as_ref() }.filter(|_| ours());
        if let (Some(comm), Some(number)) = (comm, number_of(mr)) {
            with_relaxed_capture(|| comm.deregister(number));
        }
        code::SUCCESS
    })
}

fn on_host(mr: *mut c_void) -> bool {
    mr as usize & KIND == NCCL_PTR_HOST as usize
}

fn number_of(mr: *mut c_void) -> Option<u32> {
    u32::try_from(mr as usize >> ABOVE).ok().filter(|number| *number > 0)
}

type Issued<'a> = crate::error::Result<Option<&'a Arc<Request>>>;

/// Hands a request to NCCL: null where it has to try again.
///
/// # Safety
/// `request` is NCCL's own variable.
unsafe fn hand_over(issued: Issued<'_>, request: *mut *mut c_void, what: &str) -> Code {
    match issued {
        Ok(issued) => {
            let pointer = issued.map_or(std::ptr::null(), Arc::as_ptr);
            // SAFETY: the caller's promise. The connection keeps its requests until it is closed.
            unsafe { put(request, pointer.cast_mut().cast()) };
            code::SUCCESS
        }
        Err(error) => failed(what, &error),
    }
}

/// # Safety
/// NCCL's contract: a live connection, `size` bytes that stay as they are until the request is done.
pub(super) unsafe extern "C" fn isend(
    comm: *mut c_void,
    address: *mut c_void,
    size: usize,
    tag: c_int,
    mr: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    on_progress_thread(|| {
        // SAFETY: the caller's promise.
        let Some(comm) = (unsafe { comm.cast::<Comm>().as_ref() }).filter(|_| ours()) else {
            return code::INTERNAL;
        };
        let issued = comm.send(address as u64, on_host(mr), size as u64, tag);
        // SAFETY: as above.
        unsafe { hand_over(issued, request, "sending") }
    })
}

/// # Safety
/// As for [`isend`].
pub(super) unsafe extern "C" fn isend_v8(
    comm: *mut c_void,
    address: *mut c_void,
    size: c_int,
    tag: c_int,
    mr: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    let Ok(size) = usize::try_from(size) else { return code::INTERNAL };
    // SAFETY: as above.
    unsafe { isend(comm, address, size, tag, mr, request) }
}

/// # Safety
/// As for [`isend`].
pub(super) unsafe extern "C" fn isend_profiled(
    comm: *mut c_void,
    address: *mut c_void,
    size: usize,
    tag: c_int,
    mr: *mut c_void,
    _: *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: as above.
    unsafe { isend(comm, address, size, tag, mr, request) }
}

/// # Safety
/// NCCL's contract: a live connection; `count` addresses, sizes, tags and registrations; buffers that are NCCL's until
/// the request is done.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe extern "C" fn irecv<S: Copy + TryInto<u64>>(
    comm: *mut c_void,
    count: c_int,
    addresses: *mut *mut c_void,
    sizes: *mut S,
    tags: *mut c_int,
    mrs: *mut *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    on_progress_thread(|| {
        // SAFETY: the caller's promise.
        let Some(comm) = (unsafe { comm.cast::<Comm>().as_ref() }).filter(|_| ours()) else {
            return code::INTERNAL;
        };
        let Some(count) = usize::try_from(count).ok().filter(|count| *count <= GROUP) else { return code::INTERNAL };
        let mut buffers = [Buffer::default(); GROUP];
        for (i, buffer) in buffers[..count].iter_mut().enumerate() {
            // SAFETY: as above.
            let (address, size, tag, mr) = unsafe { (*addresses.add(i), *sizes.add(i), *tags.add(i), *mrs.add(i)) };
            let Ok(size) = size.try_into() else { return code::INTERNAL };
            *buffer = Buffer { address: address as u64, host: on_host(mr), size, tag, registration: number_of(mr) };
        }
        let issued = comm.receive(&buffers[..count]);
        // SAFETY: as above.
        unsafe { hand_over(issued, request, "receiving") }
    })
}

/// # Safety
/// As for [`irecv`].
#[allow(clippy::too_many_arguments)]
pub(super) unsafe extern "C" fn irecv_profiled(
    comm: *mut c_void,
    count: c_int,
    addresses: *mut *mut c_void,
    sizes: *mut usize,
    tags: *mut c_int,
    mrs: *mut *mut c_void,
    _: *mut *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: as above.
    unsafe { irecv(comm, count, addresses, sizes, tags, mrs, request) }
}

/// Nothing to flush: a receive is done when the copies that fill it are, this GPU's own or its peer's, and both write to
/// this GPU's memory as its kernels see it.
///
/// # Safety
/// `request` is null or NCCL's own variable.
pub(super) unsafe extern "C" fn iflush(
    _: *mut c_void,
    _: c_int,
    _: *mut *mut c_void,
    _: *mut c_int,
    _: *mut *mut c_void,
    request: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise. No request means done.
    unsafe { put(request, std::ptr::null_mut()) };
    code::SUCCESS
}

/// # Safety
/// `request` is one of a live connection, and was not reported as done; `done` is null or NCCL's own, `sizes` null or as
/// many numbers as the request has buffers.
pub(super) unsafe extern "C" fn test(request: *mut c_void, done: *mut c_int, sizes: *mut c_int) -> Code {
    on_progress_thread(|| {
        // SAFETY: the caller's promise: the connection keeps the request.
        let Some(request) = (unsafe { request.cast::<Request>().as_ref() }).filter(|_| ours()) else {
            return code::INTERNAL;
        };
        let mut got = [0; GROUP];
        let tested = request.test(&mut got);
        // SAFETY: as above.
        unsafe { put(done, c_int::from(matches!(tested, Ok(Some(_))))) };
        match tested {
            Ok(None) => code::SUCCESS,
            Ok(Some(count)) => {
                for (i, bytes) in got[..count].iter().enumerate().filter(|_| !sizes.is_null()) {
                    // SAFETY: as above.
                    unsafe { *sizes.add(i) = c_int::try_from(*bytes).unwrap_or(c_int::MAX) };
                }
                code::SUCCESS
            }
            Err(error) => failed("a request", &error),
        }
    })
}

/// # Safety
/// `comm` is null or came from a connect; it is not used again.
pub(super) unsafe extern "C" fn close_send(comm: *mut c_void) -> Code {
    guard(|| {
        if !comm.is_null() && ours() {
            // SAFETY: the caller's promise: the reference that the connect gave away.
            unsafe { Arc::from_raw(comm.cast::<Comm>().cast_const()) }.close();
        }
        code::SUCCESS
    })
}

/// # Safety
/// `comm` is null or came from an accept; it is not used again.
pub(super) unsafe extern "C" fn close_recv(comm: *mut c_void) -> Code {
    guard(|| {
        if !comm.is_null() && ours() {
            // SAFETY: the caller's promise: the reference that the accept gave away.
            unsafe { Arc::from_raw(comm.cast::<Comm>().cast_const()) }.close();
        }
        code::SUCCESS
    })
}

pub(super) unsafe extern "C" fn close_listener(listener: *mut c_void) -> Code {
    guard(|| {
        close_listen(listener as usize);
        code::SUCCESS
    })
}
