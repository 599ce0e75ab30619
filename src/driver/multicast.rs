//! Multicast objects: memory of several devices behind one address whose stores the switch fans out.
//!
//! The order is a typestate: created or imported, device added, all devices added (which only a vote can prove),
//! mapped, and then, part by part, claimed and bound. Binding before all devices were added blocks inside the driver,
//! so it cannot be written here; nor can two bindings of one place, which a claim excludes.
//!
//! An object is an address range without memory of its own. It is mapped whole and once, as NCCL maps its symmetric
//! windows' (the driver maps from an object's start only); each communicator binds its own memory at its part.

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::api::{check, sys};
use super::context::Context;
use super::later::let_go;
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

/// An NVSwitch has 128 slots for everybody on it. A device of this process takes part in at most so many objects of
/// ours and leaves the rest to NCCL.
pub const MOST_OBJECTS: usize = 8;
static OBJECTS: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];

/// One of a device's slots, given back when dropped.
pub struct Slot(&'static AtomicU32);

impl Slot {
    /// Takes a slot, if one is left.
    pub fn take(context: &Context) -> Option<Self> {
        let taken = &OBJECTS[context.device().ordinal().unsigned_abs() as usize % OBJECTS.len()];
        let more = |n| (n < MOST_OBJECTS as u32).then_some(n + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(taken))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Most parts of one object: the bits of a word.
pub const MOST_PARTS: u32 = 32;
/// Largest object: less than the memory of any GPU that has multicast, which NCCL's own objects exceed.
const MOST_BYTES: u64 = 16 << 30;

/// How an object is divided: into parts of one size.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Division {
    part_bytes: u64,
    parts: u32,
}

impl Division {
    /// Into parts of `part_bytes`, a multiple of every rank's granularity. The same for all ranks.
    pub fn into_parts_of(part_bytes: u64) -> Self {
        let fit = MOST_BYTES.checked_div(part_bytes).unwrap_or(1);
        Self { part_bytes, parts: u32::try_from(fit).unwrap_or(u32::MAX).clamp(1, MOST_PARTS) }
    }

    /// Bytes of one part.
    pub fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// Bytes of the object.
    pub fn bytes(&self) -> u64 {
        self.part_bytes * u64::from(self.parts)
    }

    fn all(&self) -> u32 {
        u32::MAX >> (MOST_PARTS - self.parts)
    }
}

struct Handle {
    context: Arc<Context>,
    raw: sys::CUmemGenericAllocationHandle,
    /// Given back behind it.
    slot: Option<Slot>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let (context, raw, slot) = (Arc::clone(&self.context), self.raw, self.slot.take());
        let_go(move || {
            // SAFETY: created or imported once, released once; bindings and mappings hold an `Arc` to its owner.
            let code = unsafe { (context.api().cuMemRelease)(raw) };
            if let Err(error) = check("cuMemRelease", code) {
                warning!(context.device().ordinal(), "{error}");
            }
            drop(slot);
        });
    }
}

/// A multicast object in one of its states.
pub struct MulticastObject<State> {
    handle: Arc<Handle>,
    division: Division,
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
    /// Creates an object for `devices` devices. Takes one of the switch's few slots.
    pub fn create(
        context: &Arc<Context>,
        devices: u32,
        division: Division,
        handle: HandleType,
        slot: Slot,
    ) -> Result<Self> {
        let create = context.api().cuMulticastCreate.ok_or(MISSING)?;
        let mut raw = 0;
        // SAFETY: valid out-pointer and properties.
        check("cuMulticastCreate", unsafe { create(&mut raw, &prop(devices, division.bytes(), handle)) })?;
        Ok(Self::of(context, raw, division, slot))
    }

    /// Opens the object another rank created.
    pub fn import(context: &Arc<Context>, division: Division, from: Imported<'_>, slot: Slot) -> Result<Self> {
        let imported = Allocation::import(context, division.bytes(), from)?;
        // The allocation's owner type releases with the same call; hand the raw handle over.
        let imported = Arc::into_inner(imported).ok_or(Error::Bug("a fresh import is shared"))?;
        let raw = imported.into_raw();
        Ok(Self::of(context, raw, division, slot))
    }

    fn of(context: &Arc<Context>, raw: sys::CUmemGenericAllocationHandle, division: Division, slot: Slot) -> Self {
        let handle = Arc::new(Handle { context: Arc::clone(context), raw, slot: Some(slot) });
        Self { handle, division, state: PhantomData }
    }

    /// Exports a handle for the other ranks.
    pub fn export(&self, handle: HandleType) -> Result<Shareable> {
        export(&self.handle.context, self.handle.raw, handle)
    }

    /// Adds this rank's device.
    pub fn add_device(&self) -> Result<()> {
        self.add_device_of(&self.handle.context)
    }

    /// Adds a device of this process.
    pub fn add_device_of(&self, context: &Context) -> Result<()> {
        let add = context.api().cuMulticastAddDevice.ok_or(MISSING)?;
        // SAFETY: live handle and device.
        check("cuMulticastAddDevice", unsafe { add(self.handle.raw, context.device().raw()) })
    }

    /// All ranks have added their devices.
    pub fn all_added(self, _proof: BarrierPassed) -> MulticastObject<AllAdded> {
        MulticastObject { handle: self.handle, division: self.division, state: PhantomData }
    }
}

impl MulticastObject<AllAdded> {
    /// Maps all of it. What is mapped there may only be written with `multimem.st`, and only where a part is bound.
    pub fn map(self, align: u64) -> Result<Arc<Divided>> {
        let Self { handle, division, .. } = self;
        let reservation = Reservation::new(&handle.context, division.bytes(), align)?;
        let mapping = Mapping::of(&reservation, 0, handle.raw, division.bytes(), Box::new(Arc::clone(&handle)))?;
        Ok(Arc::new(Divided { mapping, handle, division, free: AtomicU32::new(division.all()) }))
    }
}

/// A mapped object whose parts communicators claim. Unmapped and released behind the last of them.
pub struct Divided {
    mapping: Mapping,
    handle: Arc<Handle>,
    division: Division,
    // A bit for each part that nobody has claimed.
    free: AtomicU32,
}

impl Divided {
    /// The parts that nobody has claimed, a bit for each.
    pub fn free(&self) -> u32 {
        self.free.load(Ordering::Acquire)
    }

    /// Claims a part, if nobody has.
    pub fn claim(self: &Arc<Self>, part: u32) -> Option<Claim> {
        let bit = 1u32.checked_shl(part)?;
        let was = self.free.fetch_and(!bit, Ordering::AcqRel);
        (was & bit != 0).then(|| Claim { object: Arc::clone(self), part, stuck: false })
    }
}

/// A part that is this holder's alone until it is dropped.
pub struct Claim {
    object: Arc<Divided>,
    part: u32,
    // Memory is bound there that the driver would not let go: nobody else can have the part.
    stuck: bool,
}

impl Claim {
    fn offset(&self) -> u64 {
        u64::from(self.part) * self.object.division.part_bytes
    }

    /// Binds this rank's memory, of a part's size, to the part.
    pub fn bind(self, memory: &Arc<Allocation>) -> Result<Part> {
        let Divided { handle, division, .. } = &*self.object;
        let bind = handle.context.api().cuMulticastBindMem.ok_or(MISSING)?;
        if memory.bytes() != division.part_bytes {
            return Err(Error::Bug("memory of another size than a part"));
        }
        let (offset, bytes) = (self.offset() as usize, division.part_bytes as usize);
        // SAFETY: live object and memory; the span lies in both and, by the claim, nothing else is bound there.
        check("cuMulticastBindMem", unsafe { bind(handle.raw, offset, memory.raw, 0, bytes, 0) })?;
        Ok(Part { claim: ManuallyDrop::new(self), memory: Arc::clone(memory) })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.stuck {
            self.object.free.fetch_or(1 << self.part, Ordering::AcqRel);
        }
    }
}

/// A part with this rank's memory bound to it. Dropping it unbinds on that same device and gives the part back.
pub struct Part {
    claim: ManuallyDrop<Claim>,
    memory: Arc<Allocation>,
}

impl Part {
    /// First address: a store there reaches the window of every rank.
    pub fn address(&self) -> u64 {
        self.claim.object.mapping.address() + self.claim.offset()
    }

    /// The object it is a part of.
    pub fn object(&self) -> &Arc<Divided> {
        &self.claim.object
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nothing uses the field afterwards.
        let mut claim = unsafe { ManuallyDrop::take(&mut self.claim) };
        let memory = Arc::clone(&self.memory);
        let_go(move || {
            let Divided { handle, division, .. } = &*claim.object;
            let context = &handle.context;
            let Some(unbind) = context.api().cuMulticastUnbind else { return };
            let (offset, bytes) = (claim.offset() as usize, division.part_bytes as usize);
            // SAFETY: bound once with exactly this device and span; no kernel of this communicator runs any more.
            let code = unsafe { unbind(handle.raw, context.device().raw(), offset, bytes) };
            if let Err(error) = check("cuMulticastUnbind", code) {
                warning!(context.device().ordinal(), "{error}");
                claim.stuck = true;
            }
            drop((claim, memory));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_object_has_room_for_one_window_and_never_more_bits_or_bytes_than_allowed(
            part_bytes in 1u64..1 << 50,
        ) {
            let division = Division::into_parts_of(part_bytes);
            prop_assert!((1..=MOST_PARTS).contains(&division.parts));
            prop_assert!(division.bytes() <= MOST_BYTES.max(part_bytes));
            prop_assert_eq!(division.all().count_ones(), division.parts);
            prop_assert_eq!(division.all().trailing_ones(), division.parts);
        }
    }
}
