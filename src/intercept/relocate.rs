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
use super::pages::{Protections, WRITING, with_writable};
use super::stock::{self, Library, Stock};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

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
    /// Objects whose calls go to the stock library because they were not among those that were to be bound.
    pub later: Vec<PathBuf>,
    /// The same for the same functions of the same objects, in whatever order and at whatever addresses.
    pub digest: u64,
}

/// Objects with slots for the wanted functions, as a binding found them.
#[derive(Debug, Clone, Default)]
pub struct Known(Vec<Object>);

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

/// Makes every slot that leads to the stock library lead to the given functions instead, in all objects or, again, in
/// those that are known.
pub fn bind(stock: &Stock, targets: &[(&CStr, *const c_void)], known: Option<&Known>) -> (BindReport, Known) {
    let Some(us) = objects::ourselves() else {
        return (BindReport::default(), Known::default());
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
    let mut later = Vec::new();
    if let Some(Known(known)) = known {
        candidates.retain(|candidate| {
            let bound = known.contains(&candidate.object);
            if !bound && candidate.state == State::Replace && !later.contains(&candidate.object) {
                later.push(candidate.object.clone());
            }
            bound
        });
    }
    let names = |name: usize| targets[name].1 as usize;
    let before = candidates.iter().filter(|c| c.state == State::Done).count();
    let failed = write(&mut candidates, &names, stock.library());
    let later = later.iter().map(Object::path).collect();
    let report = BindReport { failed, later, digest: digest(&candidates, targets), ..BindReport::default() };
    let mut objects = Vec::new();
    for candidate in &candidates {
        if !objects.contains(&candidate.object) {
            objects.push(candidate.object.clone());
        }
    }
    (summarise(&candidates, before, report), Known(objects))
}

/// FNV-1a over the bound functions by object. An object goes by its file's name: folders differ between hosts.
fn digest(candidates: &[Candidate], targets: &[(&CStr, *const c_void)]) -> u64 {
    let mut bound: Vec<(Vec<u8>, &[u8])> = candidates
        .iter()
        .filter(|candidate| candidate.state == State::Done)
        .map(|candidate| (candidate.object.file_name(), targets[candidate.name].0.to_bytes()))
        .collect();
    bound.sort_unstable();
    bound.dedup();
    let bytes = bound.iter().flat_map(|(object, function)| [object, &b"\0"[..], function, b"\n"].concat());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
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
            // Another thread may be loading this object: its pages can become read-only at any moment.
            let settled = !object.is_read_only_after_loading(candidate.offset);
            let rights = protections.of(object, candidate.offset);
            let written = with_writable(word, rights, settled, || {
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

fn summarise(candidates: &[Candidate], before: usize, mut report: BindReport) -> BindReport {
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
