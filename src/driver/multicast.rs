//! Multicast objects: memory of several devices behind one address whose stores the switch fans out.
//!
//! The order is a typestate: created or imported, device added, all devices added (which only a vote can prove),
//! bound, mapped. Binding before all devices were added blocks inside the driver, so it cannot be written here.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::api::{check, sys};
use super::context::Context;
use super::memory::{Allocation, HandleType, Imported, Mapping, Reservation, Shareable, export};
use crate::error::{Error, Result};
use crate::warning;

/// State: exists, and this rank's device was added or not yet.
pub struct Created;
/// State: every rank has added its device.
pub struct AllAdded;

/// Proof that all ranks passed the step before: made from a unanimous vote.
pub struct BarrierPassed(());

impl BarrierPassed {
    /// To be called only with the result of a vote in which every rank said that its device was added.
    pub fn all_devices_added() -> Self {
        Self(())
    }
}

/// An NVSwitch has 128 slots for everybody on it. This process takes at most so many and leaves the rest to NCCL.
pub const MOST_OBJECTS: u32 = 8;
static OBJECTS: AtomicU32 = AtomicU32::new(0);

/// One of this process's slots, given back when dropped.
pub struct Slot(());

impl Slot {
    /// Takes a slot, if one is left.
    pub fn take() -> Option<Self> {
        let more = |n| (n < MOST_OBJECTS).then_some(n + 1);
        OBJECTS.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        OBJECTS.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Handle {
    context: Arc<Context>,
    raw: sys::CUmemGenericAllocationHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created or imported once, released once; bindings and mappings hold an `Arc` to us.
        let code = unsafe { (self.context.api().cuMemRelease)(self.raw) };
        if let Err(error) = check("cuMemRelease", code) {
            warning!(self.context.device().ordinal(), "{error}");
        }
    }
}

/// A multicast object in one of its states.
pub struct MulticastObject<State> {
    handle: Arc<Handle>,
    bytes: u64,
    state: PhantomData<State>,
}

fn prop(devices: u32, bytes: u64, handle: HandleType) -> sys::CUmulticastObjectProp {
    sys::CUmulticastObjectProp { numDevices: devices, size: bytes as usize, handleTypes: handle.raw() as u64, flags: 0 }
}

const MISSING: Error = Error::Driver { call: "cuMulticastCreate", code: sys::CUDA_ERROR_NOT_SUPPORTED as i32 };

/// The smallest granularity of a multicast object over so many devices. The recommended one can be hundreds of MiB.
pub fn multicast_granularity(context: &Context, devices: u32, bytes: u64, handle: HandleType) -> Result<u64> {
    let get = context.api().cuMulticastGetGranularity.ok_or(MISSING)?;
    let mut granularity = 0usize;
    let option = sys::CU_MULTICAST_GRANULARITY_MINIMUM as i32;
    // SAFETY: valid out-pointer and properties.
    check("cuMulticastGetGranularity", unsafe { get(&mut granularity, &prop(devices, bytes, handle), option) })?;
    if granularity.is_power_of_two() { Ok(granularity as u64) } else { Err(Error::Bug("odd multicast granularity")) }
}

impl MulticastObject<Created> {
    /// Creates an object of `bytes` for `devices` devices. Takes one of the switch's few slots.
    pub fn create(context: &Arc<Context>, devices: u32, bytes: u64, handle: HandleType) -> Result<Self> {
        let create = context.api().cuMulticastCreate.ok_or(MISSING)?;
        let mut raw = 0;
        // SAFETY: valid out-pointer and properties.
        check("cuMulticastCreate", unsafe { create(&mut raw, &prop(devices, bytes, handle)) })?;
        Ok(Self::of(context, raw, bytes))
    }

    /// Opens the object another rank created.
    pub fn import(context: &Arc<Context>, bytes: u64, from: Imported<'_>) -> Result<Self> {
        let imported = Allocation::import(context, bytes, from)?;
        // The allocation's owner type releases with the same call; hand the raw handle over.
        let imported = Arc::into_inner(imported).ok_or(Error::Bug("a fresh import is shared"))?;
        let raw = imported.into_raw();
        Ok(Self::of(context, raw, bytes))
    }

    fn of(context: &Arc<Context>, raw: sys::CUmemGenericAllocationHandle, bytes: u64) -> Self {
        Self { handle: Arc::new(Handle { context: Arc::clone(context), raw }), bytes, state: PhantomData }
    }

    /// Exports a handle for the other ranks.
    pub fn export(&self, handle: HandleType) -> Result<Shareable> {
        export(&self.handle.context, self.handle.raw, handle)
    }

    /// Adds this rank's device.
    pub fn add_device(&self) -> Result<()> {
        let context = &self.handle.context;
        let add = context.api().cuMulticastAddDevice.ok_or(MISSING)?;
        // SAFETY: live handle and device.
        check("cuMulticastAddDevice", unsafe { add(self.handle.raw, context.device().raw()) })
    }

    /// All ranks have added their devices.
    pub fn all_added(self, _proof: BarrierPassed) -> MulticastObject<AllAdded> {
        MulticastObject { handle: self.handle, bytes: self.bytes, state: PhantomData }
    }
}

impl MulticastObject<AllAdded> {
    /// Binds this rank's memory at the object's start.
    pub fn bind(self, memory: &Arc<Allocation>) -> Result<Bound> {
        let context = &self.handle.context;
        let bind = context.api().cuMulticastBindMem.ok_or(MISSING)?;
        let bytes = self.bytes.min(memory.bytes());
        // SAFETY: live object and memory; the span lies in both.
        check("cuMulticastBindMem", unsafe { bind(self.handle.raw, 0, memory.raw, 0, bytes as usize, 0) })?;
        Ok(Bound { device: context.device().raw(), bytes, _memory: Arc::clone(memory), handle: self.handle })
    }
}

/// Memory of one device bound into an object. Dropping it unbinds on that same device.
pub struct Bound {
    device: sys::CUdevice,
    bytes: u64,
    _memory: Arc<Allocation>,
    handle: Arc<Handle>,
}

impl Bound {
    /// Maps the object's address range. What is mapped there may only be written with `multimem.st`.
    pub fn map(self: &Arc<Self>, reservation: &Arc<Reservation>, offset: u64) -> Result<Mapping> {
        Mapping::of(reservation, offset, self.handle.raw, self.bytes, Box::new(Arc::clone(self)))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let context = &self.handle.context;
        let Some(unbind) = context.api().cuMulticastUnbind else { return };
        // SAFETY: bound once with exactly this device and span; the mapping holds an `Arc` to us and is gone.
        let code = unsafe { unbind(self.handle.raw, self.device, 0, self.bytes as usize) };
        if let Err(error) = check("cuMulticastUnbind", code) {
            warning!(context.device().ordinal(), "{error}");
        }
    }
}
