//! Relocation binding: which words of which objects are rewritten, and the rewriting itself.
//!
//! A program calls NCCL through words that the dynamic linker filled with an address ("slots"). A slot that leads to the
//! stock library is made to lead to us. Every other slot is left alone and counted: it leads to another NCCL of this
//! process, or to another tool between program and NCCL.
//!
//! Three steps, because the dynamic linker may not be called while its list is walked, and an object may go away when it
//! is not: collect (under the linker's lock), decide (calls the linker), write (under the linker's lock again).

use super::elf::SlotKind;
use super::objects::{self, Loaded, Next, Object};
use super::stock::{self, Library, Stock};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a binding found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BindReport {
    /// Objects in which at least one slot leads to us now, with the number of such slots.
    pub bound: Vec<(PathBuf, usize)>,
    /// How many objects that is.
    pub objects: usize,
    /// Slots that lead to us now.
    pub slots: usize,
    /// Slots among them that this call changed; 0 when there was nothing left to do.
    pub changed: usize,
    /// Slots for the same functions that lead elsewhere and were left alone.
    pub refused: usize,
    /// Slots that lead to the stock library but could not be written.
    pub failed: usize,
}

/// Where a slot leads before anything is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// To the new address already.
    Done,
    /// To an address that is to be replaced.
    Replace,
    /// Into the object's own linkage table: the dynamic linker will look the name up at the first call.
    Lazy,
    /// Elsewhere.
    Foreign,
}

/// One slot on its way through the three steps.
struct Candidate {
    object: Object,
    offset: u64,
    name: usize,
    value: usize,
    state: State,
}

/// Makes every slot that leads to the stock library lead to the given functions instead.
///
/// Calling it again does nothing but find objects that were loaded since.
pub fn bind(stock: &Stock, targets: &[(&CStr, *const c_void)]) -> BindReport {
    let Some(us) = objects::ourselves() else {
        return BindReport::default();
    };
    let ours: Vec<_> = targets.iter().filter_map(|target| own_target(*target, &us)).collect();
    let targets = ours.as_slice();
    let wanted = |name: &[u8]| targets.iter().position(|(target, _)| target.to_bytes() == name);
    let mut candidates = collect(
        |object| !us.is(object) && !stock.library().object.is(object),
        &wanted,
        |name, value| {
            if value == targets[name].1 as usize {
                State::Done
            } else if stock.library().contains(value as u64) {
                State::Replace
            } else {
                State::Foreign
            }
        },
    );
    for candidate in &mut candidates {
        if candidate.state == State::Lazy {
            let name = targets[candidate.name].0;
            candidate.state = match will_be_stock(&candidate.object, name, stock.library(), &us) {
                true => State::Replace,
                false => State::Foreign,
            };
        }
    }
    let names = |name: usize| targets[name].1 as usize;
    let before = candidates.iter().filter(|c| c.state == State::Done).count();
    let failed = write(&mut candidates, &names, stock.library());
    summarise(&candidates, before, failed)
}

/// Our function of a target. Where the linker was not told `-Bsymbolic`, the address of an exported function is that of the
/// first library in the process that has the name: the stock one's, of all things. Ours comes first from us downwards.
fn own_target<'a>((name, address): (&'a CStr, *const c_void), us: &Object) -> Option<(&'a CStr, *const c_void)> {
    let is_ours = |address: &*const c_void| objects::owner(*address).as_ref() == Some(us);
    let own = Some(address).filter(is_ours).or_else(|| stock::symbol_from(us, name).filter(is_ours))?;
    Some((name, own))
}

/// Makes calls inside the stock library to its own public functions stay inside.
///
/// They pass through slots, too, and lead to us where our names come first in the process (preloaded, or linked under
/// NCCL's name). The stock library would then enter twoshot in the midst of its own work.
pub(super) fn isolate(library: &Library) {
    let Some(us) = objects::ourselves() else {
        return;
    };
    let names: RefCell<Vec<CString>> = RefCell::default();
    let wanted = |name: &[u8]| {
        if !name.starts_with(b"nccl") && !name.starts_with(b"pnccl") {
            return None;
        }
        let mut names = names.borrow_mut();
        names.push(CString::new(name).ok()?);
        Some(names.len() - 1)
    };
    let mut ours: Vec<Range<u64>> = Vec::new();
    objects::each(|object| {
        if !us.is(object) {
            return Next::Go;
        }
        ours = object.extent();
        Next::Stop
    });
    let mut candidates = collect(
        |object| library.object.is(object),
        &wanted,
        |_, value| match ours.iter().any(|range| range.contains(&(value as u64))) {
            true => State::Replace,
            false => State::Foreign,
        },
    );
    let own: Vec<usize> =
        names.into_inner().iter().map(|name| library.symbol(name).map_or(0, |address| address as usize)).collect();
    for candidate in &mut candidates {
        let inside = library.contains(own[candidate.name] as u64);
        candidate.state = match candidate.state {
            State::Lazy | State::Replace if inside => State::Replace,
            _ => State::Foreign,
        };
    }
    write(&mut candidates, &|name| own[name], library);
}

/// Step one: the slots of the chosen objects for the wanted names.
fn collect(
    chosen: impl Fn(&Loaded<'_>) -> bool,
    wanted: &dyn Fn(&[u8]) -> Option<usize>,
    state: impl Fn(usize, usize) -> State,
) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    objects::each(|object| {
        if !chosen(object) {
            return Next::Go;
        }
        for slot in object.slots(wanted) {
            let Some(word) = object.word(slot.offset) else {
                continue;
            };
            let value = word.load(Ordering::Acquire);
            let lazy = slot.kind == SlotKind::Jump && object.contains_code(value as u64);
            candidates.push(Candidate {
                object: Object::of(object),
                offset: slot.offset,
                name: slot.name,
                value,
                state: match state(slot.name, value) {
                    State::Foreign if lazy => State::Lazy,
                    state => state,
                },
            });
        }
        Next::Go
    });
    candidates
}

/// Step two: whether the dynamic linker would bind this object's slot to the stock library, or to us already.
///
/// It looks through the program and its libraries first, then through the libraries that were opened together with the
/// object. The second can be asked for only from the object downwards; when that finds nothing the name comes from a
/// sibling, and the answer is sure only if no other library has it.
fn will_be_stock(object: &Object, name: &CStr, stock: &Library, us: &Object) -> bool {
    // SAFETY: a lookup by a C string; the default scope needs no handle.
    let global = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let is_us = |address: *const c_void| objects::owner(address).as_ref() == Some(us);
    // Asked from here, the default scope includes our own names even when the program's does not.
    if !global.is_null() && !is_us(global) {
        return stock.contains(global as u64);
    }
    if let Some(found) = stock::symbol_from(object, name) {
        return stock.contains(found as u64) || is_us(found);
    }
    Library::all_loaded().iter().all(|library| library.object == *us || library.object == stock.object)
}

/// Step three: writes the slots to be replaced. Returns how many could not be written.
fn write(candidates: &mut [Candidate], address: &dyn Fn(usize) -> usize, stock: &Library) -> usize {
    // Two threads that change one page's protection would undo each other's change.
    static WRITING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    if candidates.iter().all(|c| c.state != State::Replace) {
        return 0;
    }
    let _writing = WRITING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let protections = Protections::read();
    let mut failed = 0;
    objects::each(|object| {
        for candidate in candidates.iter_mut() {
            if candidate.state != State::Replace || !candidate.object.is(object) {
                continue;
            }
            let Some(word) = object.word(candidate.offset) else {
                continue;
            };
            let protection = protections.of(object, candidate.offset);
            let written = with_writable(word, protection, || {
                let new = address(candidate.name);
                let swap = |old| word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
                match swap(candidate.value) {
                    Ok(_) => true,
                    // Bound by the dynamic linker in the meantime, or by another thread of ours.
                    Err(now) if now == new => true,
                    Err(now) => stock.contains(now as u64) && swap(now).is_ok(),
                }
            });
            if written {
                candidate.state = State::Done;
            } else {
                failed += 1;
            }
        }
        Next::Go
    });
    failed
}

fn summarise(candidates: &[Candidate], before: usize, failed: usize) -> BindReport {
    let mut report = BindReport { failed, ..BindReport::default() };
    for candidate in candidates {
        match candidate.state {
            State::Done => {
                report.slots += 1;
                let path = candidate.object.path();
                match report.bound.iter_mut().find(|(known, _)| *known == path) {
                    Some((_, count)) => *count += 1,
                    None => report.bound.push((path, 1)),
                }
            }
            State::Foreign | State::Lazy => report.refused += 1,
            State::Replace => {}
        }
    }
    report.objects = report.bound.len();
    report.changed = report.slots - before;
    report
}

/// Runs `change` while the page of `word` is writable, whatever its rights are.
pub(super) fn change_word(word: &AtomicUsize, change: impl FnOnce() -> bool) -> bool {
    let address = std::ptr::from_ref(word) as u64;
    let maps = Protections::read();
    let found = maps.0.iter().find(|(range, _)| range.contains(&address));
    found.is_some_and(|(_, rights)| with_writable(word, *rights, change))
}

/// Runs `change` while the page of `word` is writable, and restores its protection.
fn with_writable(word: &AtomicUsize, protection: c_int, change: impl FnOnce() -> bool) -> bool {
    if protection & libc::PROT_WRITE != 0 {
        return change();
    }
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let start = (std::ptr::from_ref(word) as usize / page * page) as *mut c_void;
    // SAFETY: the page is mapped by a loaded object that cannot go away now; only rights are added.
    if unsafe { libc::mprotect(start, page, protection | libc::PROT_WRITE) } != 0 {
        return false;
    }
    let changed = change();
    // SAFETY: as above; takes the added right back.
    unsafe { libc::mprotect(start, page, protection) };
    changed
}

/// The rights of this process's pages, read once per binding.
struct Protections(Vec<(Range<u64>, c_int)>);

impl Protections {
    fn read() -> Self {
        let text = std::fs::read("/proc/self/maps").unwrap_or_default();
        Self(String::from_utf8_lossy(&text).lines().filter_map(Self::line).collect())
    }

    fn line(line: &str) -> Option<(Range<u64>, c_int)> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let mut protection = libc::PROT_NONE;
        for (letter, right) in [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)] {
            if rest.get(..4)?.contains(letter) {
                protection |= right;
            }
        }
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some((number(start)?..number(end)?, protection))
    }

    /// Without /proc: what the object asked for.
    fn of(&self, object: &Loaded<'_>, offset: u64) -> c_int {
        let address = object.base().wrapping_add(offset);
        let known = self.0.iter().find(|(range, _)| range.contains(&address));
        match known {
            Some((_, protection)) => *protection,
            None if object.is_read_only_after_loading(offset) => libc::PROT_READ,
            None => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rights_of_a_mapping_are_read_from_its_line() {
        let read_only = "7f00-8000 r--p 00000000 08:01 42 /lib/libx.so";
        assert_eq!(Protections::line(read_only), Some((0x7f00..0x8000, libc::PROT_READ)));
        let all = "1000-2000 rwxp 00000000 00:00 0";
        assert_eq!(
            Protections::line(all),
            Some((0x1000..0x2000, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC))
        );
        for broken in ["", "x", "1-2", "1-2 r", "zz-1 r--p"] {
            assert_eq!(Protections::line(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_page_that_was_read_only_is_written_and_is_read_only_again() {
        // SAFETY: a fresh private page.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page is zero bytes, aligned, and never unmapped.
        let word = unsafe { AtomicUsize::from_ptr(page.cast()) };
        let rights = || {
            let all = Protections::read().0;
            let (_, right) =
                all.into_iter().find(|(range, _)| range.contains(&(page as u64))).expect("the page is mapped");
            right
        };
        assert_eq!(rights(), libc::PROT_READ);
        assert!(with_writable(word, rights(), || {
            word.store(7, Ordering::Relaxed);
            true
        }));
        assert_eq!((word.load(Ordering::Relaxed), rights()), (7, libc::PROT_READ));
    }
}
