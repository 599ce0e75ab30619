//! Ranges for profilers (NVTX 3): what a routed call and a set-up take on the host, shown by Nsight Systems and others.
//!
//! A profiler names a library in `NVTX_INJECTION64_PATH`; without that variable nothing is opened, and a range costs one
//! load. NVTX itself is a C header, which cannot be had without a C compiler on the user's machine, and its Rust crate
//! needs libclang to build; what is needed of the interface is two functions.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// `NVTX_ETID_CALLBACKS` and `NVTX_ETID_VERSIONINFO`.
const CALLBACKS: u32 = 1;
const VERSION_INFO: u32 = 3;
/// `NVTX_CB_MODULE_CORE`; its slots `RangePushA` and `RangePop`; its number of slots.
const CORE: c_uint = 1;
const PUSH: usize = 9;
const POP: usize = 11;
const CORE_SLOTS: usize = 16;

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;
type ExportTable = unsafe extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(ExportTable) -> c_int;

/// Where the profiler puts its functions, by slot. Each is written during its initialisation, before any is read.
static SLOTS: [AtomicPtr<c_void>; CORE_SLOTS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; CORE_SLOTS];

/// The list of the slots' addresses that the profiler is given.
struct Table([*const AtomicPtr<c_void>; CORE_SLOTS]);

// SAFETY: addresses of a static of atomics.
unsafe impl Sync for Table {}

static TABLE: Table = {
    let mut table = [std::ptr::null(); CORE_SLOTS];
    let mut at = 1;
    while at < CORE_SLOTS {
        table[at] = &raw const SLOTS[at];
        at += 1;
    }
    Table(table)
};

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    size: usize,
    module_table: unsafe extern "C" fn(c_uint, *mut *const c_void, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: unsafe extern "C" fn(u32),
}

unsafe extern "C" fn module_table(module: c_uint, table: *mut *const c_void, size: *mut c_uint) -> c_int {
    if module != CORE || table.is_null() {
        // No such module: the profiler goes on without it.
        return 0;
    }
    // SAFETY: the profiler's out-pointers; the size may be left out.
    unsafe {
        table.write(TABLE.0.as_ptr().cast());
        if !size.is_null() {
            size.write(CORE_SLOTS as c_uint);
        }
    }
    1
}

unsafe extern "C" fn set_injection_version(_version: u32) {}

unsafe extern "C" fn export_table(id: u32) -> *const c_void {
    static CALLBACK_TABLE: Callbacks = Callbacks { size: size_of::<Callbacks>(), module_table };
    static VERSION_TABLE: VersionInfo =
        VersionInfo { size: size_of::<VersionInfo>(), version: 3, reserved: 0, set_injection_version };
    match id {
        CALLBACKS => (&raw const CALLBACK_TABLE).cast(),
        VERSION_INFO => (&raw const VERSION_TABLE).cast(),
        _ => std::ptr::null(),
    }
}

/// The profiler's two functions.
#[derive(Clone, Copy)]
struct Profiler {
    push: Push,
    pop: Pop,
}

static PROFILER: OnceLock<Option<Profiler>> = OnceLock::new();

fn open(path: &Path) -> Option<Profiler> {
    // SAFETY: the library that the user's profiler named; it is loaded by every program that uses NVTX.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // Never closed: its functions are called until the process ends.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    // SAFETY: NVTX's own name and type for the entry of an injection library.
    let initialize: Initialize = *unsafe { library.get(b"InitializeInjectionNvtx2\0") }.ok()?;
    // SAFETY: the entry takes a function that hands out tables; ours live as long as the process.
    if unsafe { initialize(export_table) } == 0 {
        return None;
    }
    let (push, pop) = (SLOTS[PUSH].load(Ordering::Acquire), SLOTS[POP].load(Ordering::Acquire));
    if push.is_null() || pop.is_null() {
        return None;
    }
    // SAFETY: what the profiler put into these slots has the types that NVTX states for them.
    unsafe {
        Some(Profiler {
            push: std::mem::transmute::<*mut c_void, Push>(push),
            pop: std::mem::transmute::<*mut c_void, Pop>(pop),
        })
    }
}

/// Opens the profiler's library, once, where there is one. Not for the path of a call.
pub fn prepare(injection: Option<&Path>) {
    PROFILER.get_or_init(|| injection.and_then(open));
}

/// A range on this thread, until it is dropped.
pub struct Range(Pop);

/// Begins a range, if a profiler wants to know.
pub fn range(name: &'static CStr) -> Option<Range> {
    let profiler = PROFILER.get()?.as_ref()?;
    // SAFETY: the profiler's function, and terminated text that lives for ever.
    unsafe { (profiler.push)(name.as_ptr()) };
    Some(Range(profiler.pop))
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the profiler's function; ends the range begun on this thread: a range is not sent to another one.
        unsafe { (self.0)() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_laid_out_as_nvtx_states() {
        assert_eq!((size_of::<Callbacks>(), size_of::<VersionInfo>()), (16, 24));
        let (mut table, mut size) = (std::ptr::null(), 0);
        // SAFETY: valid out-pointers.
        assert_eq!(unsafe { module_table(CORE, &raw mut table, &raw mut size) }, 1);
        assert_eq!((table.cast::<*const c_void>(), size), (TABLE.0.as_ptr().cast(), 16));
        assert!(TABLE.0[0].is_null() && TABLE.0[1..].iter().all(|slot| !slot.is_null()));
        // SAFETY: as above.
        assert_eq!(unsafe { module_table(2, &raw mut table, std::ptr::null_mut()) }, 0);
        // SAFETY: any number may be asked for.
        assert!(unsafe { export_table(2) }.is_null());
    }

    #[test]
    fn a_library_that_is_no_profiler_is_left_alone() {
        assert!(open(Path::new("/nowhere/libprofiler.so")).is_none());
        assert!(open(Path::new("libc.so.6")).is_none());
    }
}
