//! Memory that somebody else allocated: held, so that it stays, and exported, so that a peer can write to it.

use std::ffi::c_void;
use std::sync::Arc;

use super::api::{Api, check, sys};
use super::context::Context;
use super::memory::{Allocation, HandleType, Shareable};
use crate::error::{Error, Result};

/// A reference to the one allocation that a range of device addresses leads to.
pub struct Retained {
    memory: Allocation,
    base: u64,
    types: i32,
}

fn retain(context: &Arc<Context>, address: u64) -> Result<Allocation> {
    let function = context.api().cuMemRetainAllocationHandle.ok_or_else(|| absent("cuMemRetainAllocationHandle"))?;
    let mut raw = 0;
    // SAFETY: valid out-pointer; the driver only looks the address up, and refuses what was not mapped from a handle.
    check("cuMemRetainAllocationHandle", unsafe { function(&mut raw, address as *mut c_void) })?;
    Ok(Allocation::adopt(context, raw, 0))
}

fn range(api: &Api, address: u64) -> Result<(u64, u64)> {
    let function = api.cuMemGetAddressRange_v2.ok_or_else(|| absent("cuMemGetAddressRange"))?;
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: valid out-pointers; the driver only looks the address up.
    check("cuMemGetAddressRange", unsafe { function(&mut base, &mut bytes, address) })?;
    Ok((base, bytes as u64))
}

fn absent(name: &str) -> Error {
    Error::DriverLibrary(format!("it has no {name}"))
}

impl Retained {
    /// Holds the allocation behind `[address, address + bytes)`. Memory of `cudaMalloc`, ranges of several allocations and
    /// memory that is not this device's are refused.
    pub fn behind(context: &Arc<Context>, address: u64, bytes: u64) -> Result<Self> {
        let _entered = context.enter()?;
        let memory = retain(context, address)?;
        let (base, whole) = range(context.api(), address)?;
        let offset = address.checked_sub(base).ok_or(Error::Unshared("its range begins behind it"))?;
        if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > whole) || base.checked_add(whole).is_none() {
            return Err(Error::Unshared("it is not one mapping"));
        }
        // An offset into the range is one into the allocation only where all of it is this allocation.
        for at in [base, base + whole - 1, address + bytes - 1] {
            if retain(context, at)?.raw != memory.raw {
                return Err(Error::Unshared("several allocations lie side by side in its range"));
            }
        }
        let function = context.api().cuMemGetAllocationPropertiesFromHandle;
        let function = function.ok_or_else(|| absent("cuMemGetAllocationPropertiesFromHandle"))?;
        // SAFETY: a plain structure of integers and a pointer, for which zero is a value.
        let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        // SAFETY: valid out-pointer, a handle that is held.
        check("cuMemGetAllocationPropertiesFromHandle", unsafe { function(&mut prop, memory.raw) })?;
        let here = (sys::CU_MEM_LOCATION_TYPE_DEVICE as i32, context.device().raw());
        if (prop.location.type_, prop.location.id) != here {
            return Err(Error::Unshared("it lies on another device"));
        }
        let memory = Allocation::adopt(context, memory.into_raw(), whole);
        Ok(Self { memory, base, types: prop.requestedHandleTypes })
    }

    /// Where its range begins.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of its range.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// Whether both are the same allocation at the same address: as long as one is held, its handle means nothing else.
    pub fn same(&self, other: &Self) -> bool {
        (self.memory.raw, self.base, self.bytes()) == (other.memory.raw, other.base, other.bytes())
    }

    /// Exports it for a peer, where it was allocated to be.
    pub fn export(&self, handle: HandleType) -> Result<Shareable> {
        if self.types & handle.raw() == 0 {
            return Err(Error::Unshared(match handle {
                HandleType::Fd => "it was not allocated to be shared by descriptors",
                HandleType::Fabric => "it was not allocated to be shared by fabric handles",
            }));
        }
        self.memory.export(handle)
    }
}
