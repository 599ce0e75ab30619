//! Pinned host memory that the device maps.

use std::ffi::c_void;
use std::sync::Arc;

use super::api::{call, sys};
use super::context::Context;
use super::later::let_go;
use crate::error::{Error, Result};
use crate::warning;

/// Zeroed pinned memory.
pub struct HostMemory {
    context: Arc<Context>,
    host: *mut c_void,
    device: u64,
    bytes: usize,
}

// SAFETY: a plain owner; what is shared with the device is accessed by volatile copies or atomics.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates `bytes`.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let api = context.api();
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: valid out-pointer, the right context is current.
        unsafe { call!(api, cuMemHostAlloc(&mut host, bytes, flags)) }?;
        if host.is_null() {
            return Err(Error::Protocol("the driver allocated host memory at address 0"));
        }
        let mut memory = Self { context: Arc::clone(context), host, device: 0, bytes };
        // SAFETY: just allocated with this size, and nobody else knows it yet.
        unsafe { std::ptr::write_bytes(memory.host.cast::<u8>(), 0, bytes) };
        // SAFETY: valid out-pointer; `host` is the start of mapped host memory.
        unsafe { call!(api, cuMemHostGetDevicePointer_v2(&mut memory.device, memory.host, 0)) }?;
        Ok(memory)
    }

    /// The memory as the device sees it.
    pub fn device_address(&self) -> u64 {
        self.device
    }

    pub(super) fn pointer(&self) -> *mut c_void {
        self.host
    }

    /// Copies in. The caller makes sure that the device does not use the range meanwhile.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.inside(offset, bytes.len())?;
        // SAFETY: inside the allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.cast::<u8>().add(offset), bytes.len()) };
        Ok(())
    }

    /// Copies out, after the device's work was waited for.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.inside(offset, bytes.len())?;
        // SAFETY: inside the allocation.
        unsafe { std::ptr::copy_nonoverlapping(self.host.cast::<u8>().add(offset), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn inside(&self, offset: usize, len: usize) -> Result<()> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.bytes) { Err(Error::Bug("a copy leaves its buffer")) } else { Ok(()) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let (context, host) = (Arc::clone(&self.context), self.host as usize);
        let_go(move || {
            let _entered = context.enter_to_free();
            // SAFETY: allocated once, freed once; its users waited for the device.
            if let Err(error) = unsafe { call!(context.api(), cuMemFreeHost(host as *mut c_void)) } {
                warning!(context.device().ordinal(), "{error}");
            }
        });
    }
}
