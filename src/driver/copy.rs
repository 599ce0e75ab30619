//! Copies between memory of any kind, and questions about addresses that somebody else allocated.

use std::ffi::c_void;

use super::api::{api, call, sys};
use super::context::{Context, Device};
use super::memory::Scratch;
use super::stream::Stream;
use crate::error::{Error, Result};

/// Where an address leads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// Host memory.
    Host(u64),
    /// Device memory, ours or a peer's.
    Device(u64),
}

/// Queues a copy of `bytes`. Both sides stay as they are until the stream has come past it: the caller's promise to
/// NCCL's peer functions, passed on.
pub fn copy(context: &Context, to: Place, from: Place, bytes: u64, stream: &Stream) -> Result<()> {
    let (api, bytes, queue) = (context.api(), bytes as usize, stream.raw());
    let _entered = context.enter()?;
    // SAFETY: the addresses come from NCCL or from mappings that outlive the stream's work; the driver checks the
    // device's side.
    unsafe {
        match (to, from) {
            (Place::Device(to), Place::Device(from)) => call!(api, cuMemcpyDtoDAsync_v2(to, from, bytes, queue)),
            (Place::Device(to), Place::Host(from)) => {
                call!(api, cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, queue))
            }
            (Place::Host(to), Place::Device(from)) => {
                call!(api, cuMemcpyDtoHAsync_v2(to as *mut c_void, from, bytes, queue))
            }
            (Place::Host(_), Place::Host(_)) => Err(Error::Bug("a copy between two places of the host")),
        }
    }
}

/// Queues a fill of the words that cover `[offset, offset + bytes)` of private memory.
pub fn fill(scratch: &Scratch, offset: u64, bytes: u64, word: u32, stream: &Stream) -> Result<()> {
    let bytes = bytes.next_multiple_of(4);
    scratch.inside(offset, bytes as usize)?;
    let to = scratch.address() + offset;
    let _entered = scratch.context().enter()?;
    // SAFETY: inside the allocation, which its owner keeps until the stream's work is done.
    unsafe { call!(scratch.context().api(), cuMemsetD32Async(to, word, (bytes / 4) as usize, stream.raw())) }
}

/// The address at which the device sees host memory, if the CUDA driver knows it.
pub fn device_address(host: u64) -> Option<u64> {
    let api = api().ok()?;
    let mut address: sys::CUdeviceptr = 0;
    let attribute = sys::CU_POINTER_ATTRIBUTE_DEVICE_POINTER as i32;
    // SAFETY: for this attribute the driver writes one address; it does not look behind the one it is asked about.
    let code = unsafe { (api.cuPointerGetAttribute)((&raw mut address).cast(), attribute, host) };
    (code == 0 && address != 0).then_some(address)
}

/// The CUDA ordinal of the device that is current on this thread.
pub fn current_ordinal() -> Option<i32> {
    let api = api().ok()?;
    let mut device = -1;
    // SAFETY: valid out-pointer; without a context the driver says so.
    let code = unsafe { (api.cuCtxGetDevice)(&mut device) };
    // The driver's device handles are the ordinals.
    (code == 0 && device >= 0).then_some(device)
}

/// The CUDA ordinal of the visible device at a PCI bus id.
pub fn ordinal_at(bus_id: &[u8; 16]) -> Option<i32> {
    let plain =
        |id: &[u8; 16]| id.iter().take_while(|byte| **byte != 0).map(u8::to_ascii_lowercase).collect::<Vec<_>>();
    let wanted = plain(bus_id);
    (0..64).map_while(|ordinal| Device::new(ordinal).ok()).find_map(|device| {
        let facts = device.facts().ok()?;
        (plain(&facts.bus_id) == wanted).then_some(device.ordinal())
    })
}
