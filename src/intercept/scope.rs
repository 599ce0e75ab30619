//! Symbols that must not be found by everybody: other network plugins have exported tables of the same names as ours.
//!
//! Preloaded, or linked in NCCL's place, this library is searched before every plugin, by the plugins' own code too. A
//! plugin that fills or corrects its table when it is loaded (several do) would write into ours instead. NCCL does not
//! want our tables then, so they are taken out of the dynamic symbol table of this process.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::pages::change_word;

/// One entry of the dynamic symbol table, 64 bit.
#[repr(C)]
struct Symbol {
    name: u32,
    info: u8,
    other: u8,
    section: u16,
    value: u64,
    size: u64,
}

/// What `dladdr1` tells of an address besides the symbol itself.
const WITH_SYMBOL: c_int = 1;

unsafe extern "C" {
    fn dladdr1(address: *const c_void, info: *mut libc::Dl_info, extra: *mut *mut c_void, flags: c_int) -> c_int;
}

/// Takes those of these symbols of ours out of the program's search order that are in it. Says how many.
pub fn withdraw(symbols: &[(&CStr, *const c_void)]) -> usize {
    // SAFETY: the program itself, which is never closed.
    let program = unsafe { libc::dlopen(std::ptr::null(), libc::RTLD_LAZY) };
    if program.is_null() {
        return 0;
    }
    symbols.iter().filter(|(name, address)| found(program, name) == *address && erase(name, *address)).count()
}

/// Takes these symbols of ours out of everybody's sight, also of who holds a handle of this library. Says how many.
pub fn conceal(symbols: &[(&CStr, *const c_void)]) -> usize {
    symbols.iter().filter(|(name, address)| erase(name, *address)).count()
}

fn found(program: *mut c_void, name: &CStr) -> *const c_void {
    // SAFETY: an open handle and a C string.
    unsafe { libc::dlsym(program, name.as_ptr()) }
}

/// A symbol without a value is one that the dynamic linker passes over.
fn erase(name: &CStr, address: *const c_void) -> bool {
    // SAFETY: plain data, for which zero is a value.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    let mut entry = std::ptr::null_mut();
    // SAFETY: valid out-pointers; the entry belongs to this library, which stays loaded.
    let known = unsafe { dladdr1(address, &mut info, &mut entry, WITH_SYMBOL) };
    if known == 0 || entry.is_null() || !same(info.dli_sname, name) {
        return false;
    }
    // SAFETY: the entry that was just found; aligned, and part of this library, which stays loaded.
    let value = unsafe { &*(&raw const (*entry.cast::<Symbol>()).value).cast::<AtomicUsize>() };
    // The page may hold code too: its rights are widened, not replaced. A concurrent search sees the old value or the new.
    change_word(value, || {
        value.store(0, Ordering::Release);
        true
    })
}

fn same(found: *const c_char, name: &CStr) -> bool {
    // SAFETY: null or a C string of a loaded library.
    !found.is_null() && unsafe { CStr::from_ptr(found) } == name
}
