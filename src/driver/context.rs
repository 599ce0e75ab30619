//! Devices and their primary contexts.

use std::ffi::c_int;
use std::sync::Arc;

use super::api::{Api, api, call, sys};
use crate::error::{Error, Result};
use crate::warning;

/// A device of this process, by CUDA ordinal.
#[derive(Clone, Copy)]
pub struct Device {
    pub(super) api: &'static Api,
    ordinal: c_int,
    handle: sys::CUdevice,
}

/// What the driver says of a device.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DeviceFacts {
    /// Compute capability, `major * 10 + minor`.
    pub arch: u32,
    /// Multiprocessors.
    pub sms: u32,
    /// Virtual memory management and unified addresses.
    pub vmm: bool,
    /// Memory can be exported as a file descriptor.
    pub fd_handles: bool,
    /// Memory can be exported to other hosts of the fabric.
    pub fabric_handles: bool,
    /// The silicon can do multicast; whether this process may is another question.
    pub multicast: bool,
    /// The GPU's UUID.
    pub uuid: [u8; 16],
    /// PCI bus id, zero-terminated text.
    pub bus_id: [u8; 16],
}

impl Device {
    /// The device with this ordinal. Loads and initialises the driver at the first use.
    pub fn new(ordinal: i32) -> Result<Self> {
        let api = api()?;
        let mut handle = 0;
        // SAFETY: `handle` is a valid out-pointer; the driver checks the ordinal.
        unsafe { call!(api, cuDeviceGet(&mut handle, ordinal)) }?;
        Ok(Self { api, ordinal, handle })
    }

    /// CUDA ordinal.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    pub(super) fn raw(&self) -> sys::CUdevice {
        self.handle
    }

    fn attribute(&self, attribute: u32) -> Result<i32> {
        let mut value = 0;
        // SAFETY: valid out-pointer and device; unknown attributes are an error code.
        unsafe { call!(self.api, cuDeviceGetAttribute(&mut value, attribute as i32, self.handle)) }?;
        Ok(value)
    }

    /// Compute capability, `major * 10 + minor`.
    pub fn arch(&self) -> Result<u32> {
        let major = self.attribute(sys::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(sys::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(u32::try_from(major * 10 + minor).unwrap_or(0))
    }

    /// The silicon and the driver can do multicast.
    pub fn multicast(&self) -> bool {
        let able = self.attribute(sys::CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED).is_ok_and(|value| value != 0);
        able && self.api.cuMulticastCreate.is_some()
    }

    /// Its multiprocessors.
    pub fn sms(&self) -> Result<u32> {
        let sms = self.attribute(sys::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(u32::try_from(sms).unwrap_or(0))
    }

    /// Reads all facts. An attribute the driver does not know counts as absent.
    pub fn facts(&self) -> Result<DeviceFacts> {
        let has = |attribute| self.attribute(attribute).is_ok_and(|value| value != 0);
        let (arch, sms) = (self.arch()?, self.sms()?);
        // SAFETY: CUuuid is plain bytes, for which zero is a value.
        let mut uuid: sys::CUuuid = unsafe { std::mem::zeroed() };
        // SAFETY: valid out-pointer and device.
        unsafe { call!(self.api, cuDeviceGetUuid_v2(&mut uuid, self.handle)) }?;
        let mut bus = [0 as std::ffi::c_char; 16];
        // SAFETY: the driver writes at most the given 16 bytes, terminated.
        unsafe { call!(self.api, cuDeviceGetPCIBusId(bus.as_mut_ptr(), 16, self.handle)) }?;
        Ok(DeviceFacts {
            arch,
            sms,
            vmm: has(sys::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
                && has(sys::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING),
            fd_handles: has(sys::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
            fabric_handles: has(sys::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED),
            multicast: self.multicast(),
            uuid: uuid.bytes.map(|byte| byte as u8),
            bus_id: bus.map(|byte| byte as u8),
        })
    }
}

/// A retained primary context: the one the CUDA runtime, and so NCCL, uses on this device.
pub struct Context {
    device: Device,
    raw: sys::CUcontext,
    retained: bool,
}

// SAFETY: a context handle may be used from any thread; the driver locks inside.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of a device.
    pub fn retain(device: Device) -> Result<Arc<Self>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: valid out-pointer and device.
        unsafe { call!(device.api, cuDevicePrimaryCtxRetain(&mut raw, device.handle)) }?;
        Ok(Arc::new(Self { device, raw, retained: true }))
    }

    /// The context that is current on this thread, without a reference to it: enough to talk to peers from inside a
    /// call of its owner, where the primary context of device `ordinal` cannot be retained.
    pub fn current(ordinal: i32) -> Result<Arc<Self>> {
        let api = api()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: valid out-pointer.
        unsafe { call!(api, cuCtxGetCurrent(&mut raw)) }?;
        if raw.is_null() {
            return Err(Error::Protocol("no context is current"));
        }
        // Nobody asks the driver about the device of such a context.
        let device = Device { api, ordinal, handle: ordinal };
        Ok(Arc::new(Self { device, raw, retained: false }))
    }

    /// Its device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// What tells it from a context that took its place after the program reset the device; nothing before CUDA 12.
    pub(super) fn id(&self) -> Option<u64> {
        let get = self.device.api.cuCtxGetId?;
        let mut id = 0;
        // SAFETY: a context that this holds a reference to, and a valid out-pointer.
        super::api::check("cuCtxGetId", unsafe { get(self.raw, &mut id) }).ok().map(|()| id)
    }

    pub(super) fn api(&self) -> &'static Api {
        self.device.api
    }

    /// Makes the context current for this thread until the guard drops. Free where it is current already, as it is
    /// for a caller that has set the communicator's device.
    pub fn enter(&self) -> Result<Entered> {
        let api = self.device.api;
        let mut current = std::ptr::null_mut();
        // SAFETY: valid out-pointer.
        let asked = unsafe { call!(api, cuCtxGetCurrent(&mut current)) };
        if asked.is_ok() && current == self.raw {
            return Ok(Entered { pushed: None });
        }
        // SAFETY: `raw` is alive: this `Context` holds a reference to it.
        unsafe { call!(api, cuCtxPushCurrent_v2(self.raw)) }?;
        Ok(Entered { pushed: Some(api) })
    }

    /// The same to free something, which may never be tried again: a refusal is asked about once more, then everything is
    /// tried without the context too, and what the driver refuses then is reported.
    pub fn enter_to_free(&self) -> Option<Entered> {
        self.enter().or_else(|_| self.enter()).ok()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.retained {
            return;
        }
        // SAFETY: retained once in `retain`, released once here.
        if let Err(error) = unsafe { call!(self.device.api, cuDevicePrimaryCtxRelease_v2(self.device.handle)) } {
            warning!(self.device.ordinal, "{error}");
        }
    }
}

/// Restores the thread's context when dropped.
pub struct Entered {
    pushed: Option<&'static Api>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some(api) = self.pushed else { return };
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this thread: the guard is not `Send`-used across threads by its users,
        // and a context pushed by somebody in between would be their imbalance, not ours.
        if let Err(error) = unsafe { call!(api, cuCtxPopCurrent_v2(&mut popped)) } {
            warning!(-1, "{error}");
        }
    }
}
