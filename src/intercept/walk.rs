//! From the segments of a loaded object to its slots: which tables are read, and which words may be written.
//!
//! Pure: memory comes through a closure, which hands out a range only if the object has mapped it. Whatever the tables
//! say, no other range is asked for, and no word outside a writable segment is ever a slot.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::elf::{self, Slot};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PF_W: u32 = 2;
const PF_R: u32 = 4;
const WORD: u64 = 8;

/// One segment of a loaded object, as its program header says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// `p_type`.
    pub kind: u32,
    /// `p_flags`.
    pub flags: u32,
    /// Address, relative to the object's base.
    pub start: u64,
    /// Bytes in memory.
    pub size: u64,
}

impl Segment {
    /// Whether it is mapped, with all of these rights.
    pub fn is_loaded(&self, flags: u32) -> bool {
        self.kind == PT_LOAD && self.flags & flags == flags
    }

    /// Its addresses, relative to the base.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.size)
    }
}

/// Reads a range of the object if it lies wholly in one mapped, readable segment.
pub type Read<'a, 'b> = &'b dyn Fn(Range<u64>) -> Option<&'a [u8]>;

/// The slots of an object for the wanted names; nothing where a table makes no sense.
pub fn slots(
    base: u64,
    segments: &[Segment],
    read: Read<'_, '_>,
    wanted: &dyn Fn(&[u8]) -> Option<usize>,
) -> Option<Vec<Slot>> {
    let dynamic = segments.iter().find(|segment| segment.kind == PT_DYNAMIC)?;
    let end = dynamic.start.checked_add(dynamic.size)?;
    let tables = elf::tables(read(dynamic.start..end)?, base).ok()?;
    let strings = read(tables.strings.clone())?;
    let mut found = Vec::new();
    for range in [tables.jumps, tables.data] {
        let relocations = read(range)?;
        let count = elf::symbols_named(relocations, elf::NATIVE);
        let size = count.checked_mul(elf::SYM_SIZE as u64)?;
        let symbols = read(tables.symbols..tables.symbols.checked_add(size)?)?;
        let slots = elf::slots(relocations, symbols, strings, elf::NATIVE, wanted);
        found.extend(slots.into_iter().filter(|slot| is_word(base, segments.iter().copied(), slot.offset)));
    }
    // Some linkers list the calls' relocations inside the table of all relocations as well.
    found.sort_by_key(|slot| slot.offset);
    found.dedup_by_key(|slot| slot.offset);
    Some(found)
}

/// Whether an aligned word of a writable segment starts at this offset. Segments made read-only after loading count:
/// their header still says writable.
pub fn is_word(base: u64, mut segments: impl Iterator<Item = Segment>, offset: u64) -> bool {
    let Some(end) = offset.checked_add(WORD) else { return false };
    offset.is_multiple_of(WORD)
        && base.is_multiple_of(WORD)
        && segments.any(|segment| {
            let range = segment.range();
            segment.is_loaded(PF_R | PF_W) && range.start <= offset && end <= range.end
        })
}
