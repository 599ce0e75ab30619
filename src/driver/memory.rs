//! Device memory that ranks share: allocations, handles for export, address ranges and mappings.
//!
//! A descriptor keeps an allocation alive, a fabric handle does not; a mapping always does. Fields are ordered so
//! that dropping a [`Mapping`] unmaps before its allocation and its address range go.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::api::{call, sys};
use super::context::Context;
use super::later::let_go;
use super::stream::Stream;
use crate::error::{Error, Result};
use crate::warning;

/// How a handle travels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HandleType {
    /// A file descriptor: ranks on one host.
    Fd,
    /// A fabric handle: ranks on the hosts of one NVLink fabric.
    Fabric,
}

impl HandleType {
    pub(super) fn raw(self) -> i32 {
        match self {
            Self::Fd => sys::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR as i32,
            Self::Fabric => sys::CU_MEM_HANDLE_TYPE_FABRIC as i32,
        }
    }
}

/// An exported handle.
pub enum Shareable {
    /// Owns a reference to the allocation.
    Fd(OwnedFd),
    /// A name; the exporter must keep the allocation.
    Fabric([u8; 64]),
}

/// What arrived from a peer.
pub enum Imported<'a> {
    /// A descriptor that SCM_RIGHTS delivered.
    Fd(BorrowedFd<'a>),
    /// A fabric handle.
    Fabric(&'a [u8; 64]),
}

fn location(context: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CU_MEM_LOCATION_TYPE_DEVICE as i32, id: context.device().raw() }
}

fn prop(context: &Context, handle: HandleType) -> sys::CUmemAllocationProp {
    // SAFETY: a plain structure of integers and a pointer, for which zero is a value.
    let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    prop.type_ = sys::CU_MEM_ALLOCATION_TYPE_PINNED as i32;
    prop.requestedHandleTypes = handle.raw();
    prop.location = location(context);
    prop
}

/// The smallest granularity of shareable memory on this device, in bytes.
pub fn granularity(context: &Context, handle: HandleType) -> Result<u64> {
    let mut bytes = 0usize;
    let prop = prop(context, handle);
    let option = sys::CU_MEM_ALLOC_GRANULARITY_MINIMUM as i32;
    // SAFETY: valid out-pointer and properties.
    unsafe { call!(context.api(), cuMemGetAllocationGranularity(&mut bytes, &prop, option)) }?;
    if bytes.is_power_of_two() { Ok(bytes as u64) } else { Err(Error::Bug("granularity is not a power of two")) }
}

/// Physical memory on a device, ours or a peer's.
pub struct Allocation {
    pub(super) context: Arc<Context>,
    pub(super) raw: sys::CUmemGenericAllocationHandle,
    bytes: u64,
}

impl Allocation {
    /// Allocates `bytes`, a multiple of [`granularity`], exportable as `handle`.
    pub fn create(context: &Arc<Context>, bytes: u64, handle: HandleType) -> Result<Arc<Self>> {
        let mut raw = 0;
        let prop = prop(context, handle);
        // SAFETY: valid out-pointer and properties; a wrong size is an error code.
        unsafe { call!(context.api(), cuMemCreate(&mut raw, bytes as usize, &prop, 0)) }?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw, bytes }))
    }

    /// Opens a peer's allocation of known size.
    pub fn import(context: &Arc<Context>, bytes: u64, from: Imported<'_>) -> Result<Arc<Self>> {
        let mut raw = 0;
        let (pointer, kind) = match &from {
            // The interface wants the descriptor's number in place of a pointer.
            Imported::Fd(fd) => (fd.as_raw_fd() as usize as *mut std::ffi::c_void, HandleType::Fd),
            Imported::Fabric(name) => (name.as_ptr().cast_mut().cast(), HandleType::Fabric),
        };
        // SAFETY: `pointer` is what the handle type asks for: a live descriptor's number, or 64 readable bytes.
        unsafe { call!(context.api(), cuMemImportFromShareableHandle(&mut raw, pointer, kind.raw())) }?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw, bytes }))
    }

    /// Takes over a handle to be released.
    pub(super) fn adopt(context: &Arc<Context>, raw: sys::CUmemGenericAllocationHandle, bytes: u64) -> Self {
        Self { context: Arc::clone(context), raw, bytes }
    }

    /// Gives the handle up to another owner type.
    pub(super) fn into_raw(self) -> sys::CUmemGenericAllocationHandle {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never used or dropped again, so the field is moved out exactly once.
        drop(unsafe { std::ptr::read(&this.context) });
        this.raw
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Exports a handle for peers.
    pub fn export(&self, handle: HandleType) -> Result<Shareable> {
        export(&self.context, self.raw, handle)
    }
}

/// Exports memory or a multicast object.
pub(super) fn export(
    context: &Context,
    raw: sys::CUmemGenericAllocationHandle,
    handle: HandleType,
) -> Result<Shareable> {
    match handle {
        HandleType::Fd => {
            let mut fd = -1i32;
            let out = (&raw mut fd).cast();
            // SAFETY: for this type the driver writes one int.
            unsafe { call!(context.api(), cuMemExportToShareableHandle(out, raw, handle.raw(), 0)) }?;
            if fd < 0 {
                return Err(Error::Protocol("the driver exported a negative descriptor"));
            }
            // SAFETY: a fresh descriptor that the driver handed over to us.
            Ok(Shareable::Fd(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        HandleType::Fabric => {
            let mut name = [0u8; 64];
            let out = name.as_mut_ptr().cast();
            // SAFETY: for this type the driver writes 64 bytes.
            unsafe { call!(context.api(), cuMemExportToShareableHandle(out, raw, handle.raw(), 0)) }?;
            Ok(Shareable::Fabric(name))
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let (context, raw) = (Arc::clone(&self.context), self.raw);
        let_go(move || {
            // SAFETY: created or imported once, released once; mappings hold their own reference in the driver.
            if let Err(error) = unsafe { call!(context.api(), cuMemRelease(raw)) } {
                warning!(context.device().ordinal(), "{error}");
            }
        });
    }
}

/// A reserved range of addresses.
pub struct Reservation {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

impl Reservation {
    /// Reserves `bytes` aligned to `alignment` (a power of two).
    pub fn new(context: &Arc<Context>, bytes: u64, alignment: u64) -> Result<Arc<Self>> {
        let mut address = 0;
        // SAFETY: valid out-pointer; sizes are checked by the driver.
        unsafe { call!(context.api(), cuMemAddressReserve(&mut address, bytes as usize, alignment as usize, 0, 0)) }?;
        let reservation = Arc::new(Self { context: Arc::clone(context), address, bytes });
        // A driver that reports success with no address has been seen in the field: treat it as a failure.
        if address == 0 { Err(Error::Protocol("the driver reserved address 0")) } else { Ok(reservation) }
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (context, address, bytes) = (Arc::clone(&self.context), self.address, self.bytes as usize);
        let_go(move || {
            // SAFETY: reserved once; every `Mapping` in it holds an `Arc` to it, so none is left.
            if let Err(error) = unsafe { call!(context.api(), cuMemAddressFree(address, bytes)) } {
                warning!(context.device().ordinal(), "{error}");
            }
        });
    }
}

/// Memory mapped at an address and readable and writable by this rank's device.
pub struct Mapping {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
    /// What it maps and where, let go in this order behind it.
    keeps: Option<(Box<dyn Send + Sync>, Arc<Reservation>)>,
}

impl Mapping {
    /// Maps an allocation at `offset` of a reservation and opens it for this device.
    pub fn new(reservation: &Arc<Reservation>, offset: u64, memory: &Arc<Allocation>) -> Result<Self> {
        Self::of(reservation, offset, memory.raw, memory.bytes, Box::new(Arc::clone(memory)))
    }

    pub(super) fn of(
        reservation: &Arc<Reservation>,
        offset: u64,
        raw: sys::CUmemGenericAllocationHandle,
        bytes: u64,
        memory: Box<dyn Send + Sync>,
    ) -> Result<Self> {
        let context = Arc::clone(&reservation.context);
        let api = context.api();
        if offset.checked_add(bytes).is_none_or(|end| end > reservation.bytes) {
            return Err(Error::Bug("a mapping leaves its reservation"));
        }
        let address = reservation.address + offset;
        // SAFETY: the range lies in our reservation, which the caller fills at disjoint offsets.
        unsafe { call!(api, cuMemMap(address, bytes as usize, 0, raw, 0)) }?;
        // From here on `drop` unmaps, also when opening the range fails.
        let mapping = Self { context, address, bytes, keeps: Some((memory, Arc::clone(reservation))) };
        let access = sys::CUmemAccessDesc {
            location: location(&mapping.context),
            flags: sys::CU_MEM_ACCESS_FLAGS_PROT_READWRITE as i32,
        };
        // SAFETY: one descriptor, valid for the call; the range is the one just mapped.
        unsafe { call!(api, cuMemSetAccess(address, bytes as usize, &access, 1)) }?;
        Ok(mapping)
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes `word` into all words of `[offset, offset + bytes)`, on `stream`.
    pub fn fill(&self, offset: u64, bytes: u64, word: u32, stream: &Stream) -> Result<()> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) || !bytes.is_multiple_of(4) {
            return Err(Error::Bug("a fill leaves its mapping"));
        }
        let to = self.address + offset;
        // SAFETY: inside the mapping, which outlives the stream's work: callers wait for it before dropping.
        unsafe { call!(self.context.api(), cuMemsetD32Async(to, word, (bytes / 4) as usize, stream.raw())) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (context, address, bytes) = (Arc::clone(&self.context), self.address, self.bytes as usize);
        let keeps = self.keeps.take();
        let_go(move || {
            // SAFETY: mapped once by `of`, and no kernel of this rank runs on it any more: the workspace waits first.
            if let Err(error) = unsafe { call!(context.api(), cuMemUnmap(address, bytes)) } {
                warning!(context.device().ordinal(), "{error}");
            }
            drop(keeps);
        });
    }
}

/// Private device memory, for the blobs that stock NCCL carries and for known-answer buffers.
pub struct Scratch {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

impl Scratch {
    /// Allocates `bytes`.
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<Self> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: valid out-pointer, the right context is current.
        unsafe { call!(context.api(), cuMemAlloc_v2(&mut address, bytes as usize)) }?;
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Copies `bytes` to `offset` and waits for the copy.
    pub fn write(&self, offset: u64, bytes: &[u8], stream: &Stream) -> Result<()> {
        self.inside(offset, bytes.len())?;
        let _entered = self.context.enter()?;
        let (to, from) = (self.address + offset, bytes.as_ptr().cast());
        // SAFETY: inside the allocation; `bytes` lives until the wait below returned.
        unsafe { call!(self.context.api(), cuMemcpyHtoDAsync_v2(to, from, bytes.len(), stream.raw())) }?;
        stream.wait_forever()
    }

    /// Reads `bytes.len()` bytes from `offset` and waits for the copy.
    pub fn read(&self, offset: u64, bytes: &mut [u8], stream: &Stream) -> Result<()> {
        self.inside(offset, bytes.len())?;
        let _entered = self.context.enter()?;
        let (to, from) = (bytes.as_mut_ptr().cast(), self.address + offset);
        // SAFETY: as above.
        unsafe { call!(self.context.api(), cuMemcpyDtoHAsync_v2(to, from, bytes.len(), stream.raw())) }?;
        stream.wait_forever()
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn inside(&self, offset: u64, len: usize) -> Result<()> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.bytes) { Err(Error::Bug("a copy leaves its buffer")) } else { Ok(()) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let (context, address) = (Arc::clone(&self.context), self.address);
        let_go(move || {
            let _entered = context.enter_to_free();
            // SAFETY: allocated once, freed once; every copy was waited for.
            if let Err(error) = unsafe { call!(context.api(), cuMemFree_v2(address)) } {
                warning!(context.device().ordinal(), "{error}");
            }
        });
    }
}
