//! Loaded objects of this process and the addresses that belong to them.
//!
//! The thin unsafe layer between the dynamic linker's lists and the pure code in `walk` and `elf`.

use super::elf::Slot;
use super::walk::{self, Segment};
use std::ffi::{CStr, CString, c_int, c_void};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

/// One entry of the dynamic linker's list. Valid during the callback that it was made for.
pub struct Loaded<'a> {
    info: &'a libc::dl_phdr_info,
}

/// Whether to go on with the next object.
pub enum Next {
    /// Go on.
    Go,
    /// Stop here.
    Stop,
}

/// Calls `visit` for every loaded object, in the order in which they were loaded.
///
/// The dynamic linker holds a lock meanwhile that keeps every object mapped; `visit` must not call into it.
pub fn each(mut visit: impl FnMut(&Loaded<'_>) -> Next) {
    unsafe extern "C" fn call<F: FnMut(&Loaded<'_>) -> Next>(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: `data` is the closure that `each` passes below, borrowed by nothing else.
        let visit = unsafe { &mut *data.cast::<F>() };
        // SAFETY: the linker hands over a valid entry for the time of this call.
        let info = unsafe { &*info };
        match visit(&Loaded { info }) {
            Next::Go => 0,
            Next::Stop => 1,
        }
    }
    fn entry<F: FnMut(&Loaded<'_>) -> Next>(
        _: &F,
    ) -> unsafe extern "C" fn(*mut libc::dl_phdr_info, libc::size_t, *mut c_void) -> c_int {
        call::<F>
    }
    let function = entry(&visit);
    // SAFETY: `function` casts the pointer back to the closure's own type; the closure outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(function), (&raw mut visit).cast()) };
}

impl Loaded<'_> {
    /// The path the object was opened with; empty for the program itself.
    pub fn name(&self) -> CString {
        if self.info.dlpi_name.is_null() {
            return CString::default();
        }
        // SAFETY: a non-null name is a C string that the linker keeps while the object is listed.
        unsafe { CStr::from_ptr(self.info.dlpi_name) }.to_owned()
    }

    /// What is added to the object's linked addresses.
    pub fn base(&self) -> u64 {
        self.info.dlpi_addr
    }

    fn headers(&self) -> &[libc::Elf64_Phdr] {
        if self.info.dlpi_phdr.is_null() {
            return &[];
        }
        // SAFETY: the linker keeps `dlpi_phnum` program headers at this address while the object is listed.
        unsafe { std::slice::from_raw_parts(self.info.dlpi_phdr, self.info.dlpi_phnum.into()) }
    }

    /// Whether an absolute address lies in one of the object's segments.
    pub fn contains(&self, address: u64) -> bool {
        let relative = address.wrapping_sub(self.base());
        self.segments(0).any(|segment| segment.contains(&relative))
    }

    /// Whether an absolute address lies in the object's code.
    pub fn contains_code(&self, address: u64) -> bool {
        let relative = address.wrapping_sub(self.base());
        self.segments(libc::PF_X).any(|segment| segment.contains(&relative))
    }

    /// The absolute addresses of the object's segments.
    pub fn extent(&self) -> Vec<Range<u64>> {
        self.segments(0)
            .map(|segment| self.base().wrapping_add(segment.start)..self.base().wrapping_add(segment.end))
            .collect()
    }

    /// Whether the dynamic linker takes the right to write from this place once it has relocated the object. (Of the
    /// last page, if it is shared with other data, it does not.)
    pub fn is_read_only_after_loading(&self, offset: u64) -> bool {
        self.headers()
            .iter()
            .filter(|header| header.p_type == libc::PT_GNU_RELRO)
            .any(|header| offset.wrapping_sub(header.p_vaddr) < header.p_memsz)
    }

    /// A word of the object that the dynamic linker may fill: aligned, in a segment that was writable when it loaded.
    pub fn word(&self, offset: u64) -> Option<&AtomicUsize> {
        if !self.is_word(offset) {
            return None;
        }
        let address = self.base().wrapping_add(offset) as *mut usize;
        // SAFETY: aligned and inside a mapped segment of this object. The dynamic linker, too, writes such words one by
        // one while other threads read them; nobody reads them through a plain reference.
        Some(unsafe { AtomicUsize::from_ptr(address) })
    }

    /// Loaded segments that have all the flags, relative to the base.
    fn segments(&self, flags: u32) -> impl Iterator<Item = Range<u64>> {
        self.headers()
            .iter()
            .map(segment)
            .filter(move |segment| segment.is_loaded(flags))
            .map(|segment| segment.range())
    }

    /// A table of the object as bytes, if it lies wholly in one readable segment.
    fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        if range.is_empty() {
            return Some(&[]);
        }
        self.segments(libc::PF_R).find(|segment| segment.start <= range.start && range.end <= segment.end)?;
        let address = self.base().wrapping_add(range.start) as *const u8;
        // SAFETY: the range is part of a mapped, readable segment. The tables asked for (dynamic table, relocations,
        // symbols, names) are written before the object is listed and never again.
        Some(unsafe { std::slice::from_raw_parts(address, (range.end - range.start) as usize) })
    }

    /// The slots for the wanted names; empty for an object without a dynamic table, or with one that makes no sense.
    pub fn slots(&self, wanted: &dyn Fn(&[u8]) -> Option<usize>) -> Vec<Slot> {
        self.find_slots(wanted).unwrap_or_default()
    }

    fn find_slots(&self, wanted: &dyn Fn(&[u8]) -> Option<usize>) -> Option<Vec<Slot>> {
        let segments: Vec<_> = self.headers().iter().map(segment).collect();
        walk::slots(self.base(), &segments, &|range| self.bytes(range), wanted)
    }

    fn is_word(&self, offset: u64) -> bool {
        walk::is_word(self.base(), self.headers().iter().map(segment), offset)
    }
}

/// What the walk needs of a program header.
fn segment(header: &libc::Elf64_Phdr) -> Segment {
    Segment { kind: header.p_type, flags: header.p_flags, start: header.p_vaddr, size: header.p_memsz }
}

/// A loaded object, remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The path it was opened with; empty for the program itself.
    pub name: CString,
    /// What is added to its linked addresses.
    pub base: u64,
}

impl Object {
    /// Remembers an entry of the list.
    pub fn of(object: &Loaded<'_>) -> Self {
        Self { name: object.name(), base: object.base() }
    }

    /// Whether an entry of the list is this object.
    pub fn is(&self, object: &Loaded<'_>) -> bool {
        self.base == object.base() && self.name == object.name()
    }

    /// The name of its file without folders; of the program itself, whose name may differ from rank to rank, none.
    pub fn file_name(&self) -> Vec<u8> {
        let bytes = self.name.to_bytes();
        bytes.rsplit(|byte| *byte == b'/').next().unwrap_or(bytes).to_vec()
    }

    /// The object's file; for the program itself the file that was started.
    pub fn path(&self) -> PathBuf {
        if self.name.is_empty() {
            return std::env::current_exe().unwrap_or_default();
        }
        PathBuf::from(std::ffi::OsStr::from_bytes(self.name.to_bytes()))
    }
}

/// The object that an address belongs to.
pub fn owner(address: *const c_void) -> Option<Object> {
    let mut found = None;
    each(|object| {
        if !object.contains(address as u64) {
            return Next::Go;
        }
        found = Some(Object::of(object));
        Next::Stop
    });
    found
}

/// The object that this code is part of.
pub fn ourselves() -> Option<Object> {
    owner(ourselves as *const c_void)
}

/// All loaded objects.
pub fn all() -> Vec<Object> {
    let mut objects = Vec::new();
    each(|object| {
        objects.push(Object::of(object));
        Next::Go
    });
    objects
}
