//! Functions of twoshot's own, declared in `include/twoshot.h`.

use std::ffi::{c_char, c_int};

use super::code;
use crate::comm::{self, State};
use crate::counters;
use crate::intercept::Comm;

/// Writes how many AllReduce calls of this process ran in our kernels and how many in stock NCCL. Either pointer may
/// be null. Returns 0.
///
/// # Safety
/// The pointers are null or valid for one 64-bit integer each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn twoshot_counters(routed: *mut u64, stock: *mut u64) -> c_int {
    let totals = counters::process();
    for (out, value) in [(routed, totals.0), (stock, totals.1)] {
        if !out.is_null() {
            // SAFETY: the caller's promise.
            unsafe { *out = value };
        }
    }
    0
}

/// Writes what senders of the official door's network have done in this process: messages sent straight into registered
/// memory, their bytes, messages sent through windows, their bytes, and memories that have no straight way. Returns 0, or
/// `ncclInvalidArgument` for a null pointer.
///
/// # Safety
/// `out` is null or valid for five 64-bit integers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn twoshot_network_counters(out: *mut u64) -> c_int {
    if out.is_null() {
        return code::ARGUMENT;
    }
    // SAFETY: the caller's promise.
    unsafe { out.cast::<[u64; 5]>().write_unaligned(crate::official::net::totals()) };
    code::SUCCESS
}

/// Writes where the time of this process's requests of the official door's collective network went: how many were done,
/// and nanoseconds of queueing them, of one or more being under way, and of none being under way between them. Returns 0, or
/// `ncclInvalidArgument` for a null pointer.
///
/// # Safety
/// `out` is null or valid for four 64-bit integers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn twoshot_collnet_times(out: *mut u64) -> c_int {
    if out.is_null() {
        return code::ARGUMENT;
    }
    // SAFETY: the caller's promise.
    unsafe { out.cast::<[u64; 4]>().write_unaligned(crate::official::clock::totals()) };
    code::SUCCESS
}

/// The version of this library, as text that lives as long as the program.
#[unsafe(no_mangle)]
pub extern "C" fn twoshot_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}

/// `struct twoshot_communicator`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Description {
    /// Bytes of this structure that the caller knows.
    pub size: u32,
    /// 0 not set up yet, 1 on, 2 off, 3 lost. What follows is zero unless it is on.
    pub state: u32,
    /// Ranks of the communicator.
    pub ranks: u32,
    /// Hosts among them.
    pub hosts: u32,
    /// Lowest compute capability.
    pub arch: u32,
    /// Minor release of stock NCCL, 228 for 2.28; 0 where the ranks have different ones.
    pub nccl: u32,
    /// Whether the ranks have multicast.
    pub multicast: u32,
    /// Most blocks of a launch.
    pub blocks: u32,
    /// Largest payload of one-shot.
    pub oneshot_bytes: u64,
    /// Largest payload of two-shot.
    pub twoshot_bytes: u64,
    /// Smallest payload above one-shot's whose sum the switch makes; 2^64 - 1 where it makes none.
    pub switch_bytes: u64,
    /// Largest payload above two-shot's that goes through the ring, 0 where none does.
    pub bulk_bytes: u64,
}

/// What is known of a communicator; nothing is made known or set up by asking.
fn describe(comm: usize) -> Description {
    let size = size_of::<Description>() as u32;
    let Some(communicator) = comm::known(comm) else { return Description { size, ..Description::default() } };
    let ready = match communicator.state() {
        State::New => return Description { size, ..Description::default() },
        State::Declined => return Description { size, state: 2, ..Description::default() },
        State::Lost => return Description { size, state: 3, ..Description::default() },
        State::Ready(ready) => ready,
    };
    let (world, agreement) = (ready.world(), ready.agreement());
    Description {
        size,
        state: 1,
        ranks: world.ranks,
        hosts: world.hosts,
        arch: world.arch,
        nccl: world.nccl,
        multicast: u32::from(world.multicast),
        blocks: agreement.blocks,
        oneshot_bytes: agreement.oneshot_bytes,
        twoshot_bytes: agreement.twoshot_bytes,
        switch_bytes: agreement.switch_bytes,
        bulk_bytes: agreement.bulk_bytes,
    }
}

/// Describes a communicator as far as the caller's `size` reaches. Returns `ncclInvalidArgument` for null pointers or a
/// size that is too small, else 0.
///
/// # Safety
/// `out` is null or valid for as many bytes as its `size` says, which is at least that of the first field.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn twoshot_describe(comm: Comm, out: *mut Description) -> c_int {
    if comm.is_null() || out.is_null() {
        return code::ARGUMENT;
    }
    // SAFETY: the caller's promise; the first field alone is read.
    let room = unsafe { (&raw const (*out).size).read() } as usize;
    if room < size_of::<u32>() * 2 {
        return code::ARGUMENT;
    }
    super::guard(|| {
        let described = describe(comm as usize);
        let bytes = room.min(size_of::<Description>());
        // SAFETY: the caller's promise: `room` bytes; a plain structure of as many bytes or more is copied.
        unsafe { std::ptr::copy_nonoverlapping((&raw const described).cast::<u8>(), out.cast::<u8>(), bytes) };
        code::SUCCESS
    })
}
