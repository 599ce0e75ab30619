//! The part of ELF that relocation binding needs: dynamic table, relocations, symbol names.
//!
//! Pure functions over byte slices. Nothing here trusts its input: a damaged object yields an error or no slot, never a
//! panic or a read out of bounds. Only 64-bit objects of this machine's byte order and architecture are understood, which
//! is what can be loaded into this process.
#![forbid(unsafe_code)]

use std::ops::Range;

const DT_NULL: u64 = 0;
const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_RELAENT: u64 = 9;
const DT_STRSZ: u64 = 10;
const DT_SYMENT: u64 = 11;
const DT_PLTREL: u64 = 20;
const DT_JMPREL: u64 = 23;
const DT_RELACOUNT: u64 = 0x6fff_fff9;

const DYN_SIZE: usize = 16;
/// Size of one `Elf64_Rela`.
pub const RELA_SIZE: usize = 24;
/// Size of one `Elf64_Sym`.
pub const SYM_SIZE: usize = 24;

/// Relocation numbers of one architecture that name a word holding a function's address.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    jump_slot: u32,
    glob_dat: u32,
}

impl Machine {
    /// The relocation of a call through the procedure linkage table.
    pub fn jump_slot(&self) -> u32 {
        self.jump_slot
    }
}

/// x86-64. `R_X86_64_64` is left out, see [`SlotKind`].
pub const X86_64: Machine = Machine { jump_slot: 7, glob_dat: 6 };
/// AArch64.
pub const AARCH64: Machine = Machine { jump_slot: 1026, glob_dat: 1025 };

/// The architecture of this process.
#[cfg(target_arch = "x86_64")]
pub const NATIVE: Machine = X86_64;
/// The architecture of this process.
#[cfg(target_arch = "aarch64")]
pub const NATIVE: Machine = AARCH64;

/// How the code reaches the function.
///
/// A third kind, the absolute relocation of a pointer in data (`static fn *table[] = {ncclAllReduce}`), is left alone on
/// purpose: after loading that word belongs to the program, which may have changed it or compare it with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// A call through the procedure linkage table; bound at load or at the first call.
    Jump,
    /// A load of the address from the global offset table; bound at load.
    Data,
}

/// One word that the dynamic linker fills with a function's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Address of the word, relative to the object's base.
    pub offset: u64,
    /// How the code uses the word.
    pub kind: SlotKind,
    /// Index of the function in the list of wanted names.
    pub name: usize,
}

/// What the dynamic table says, all addresses relative to the object's base.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// The string table.
    pub strings: Range<u64>,
    /// Where the symbol table begins; ELF does not say where it ends.
    pub symbols: u64,
    /// Relocations of data, the leading relative ones left out.
    pub data: Range<u64>,
    /// Relocations of calls.
    pub jumps: Range<u64>,
}

/// Why an object's dynamic table was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// No symbol or string table.
    #[error("no symbol or string table")]
    NoSymbols,
    /// Entries of another size or kind than this architecture has.
    #[error("entries of an unknown layout")]
    Layout,
    /// A table that ends beyond the address space.
    #[error("a table with an impossible size")]
    Range,
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let end = at.checked_add(8)?;
    Some(u64::from_ne_bytes(bytes.get(at..end)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_ne_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// Reads the dynamic table of an object loaded at `base`.
///
/// The GNU C library stores addresses back into the table with the base added, other C libraries leave them as linked.
/// A value below the base can only be the latter.
pub fn tables(dynamic: &[u8], base: u64) -> Result<Tables, ElfError> {
    let relative = |value: u64| if value < base { value } else { value - base };
    let (mut strings, mut symbols, mut data, mut jumps) = (None, None, None, None);
    let (mut strings_size, mut data_size, mut jumps_size, mut relative_count) = (0, 0, 0, 0);
    for entry in dynamic.chunks_exact(DYN_SIZE) {
        let (Some(tag), Some(value)) = (word(entry, 0), word(entry, 8)) else {
            break;
        };
        match tag {
            DT_NULL => break,
            DT_STRTAB => strings = Some(relative(value)),
            DT_SYMTAB => symbols = Some(relative(value)),
            DT_RELA => data = Some(relative(value)),
            DT_JMPREL => jumps = Some(relative(value)),
            DT_STRSZ => strings_size = value,
            DT_RELASZ => data_size = value,
            DT_PLTRELSZ => jumps_size = value,
            DT_RELACOUNT => relative_count = value,
            DT_RELAENT if value != RELA_SIZE as u64 => return Err(ElfError::Layout),
            DT_SYMENT if value != SYM_SIZE as u64 => return Err(ElfError::Layout),
            DT_PLTREL if value != DT_RELA => return Err(ElfError::Layout),
            _ => {}
        }
    }
    let range = |start: Option<u64>, size: u64| match start {
        Some(start) => Ok(start..start.checked_add(size).ok_or(ElfError::Range)?),
        None => Ok(0..0),
    };
    let mut data = range(data, data_size)?;
    // Relative relocations name no symbol, come first, and are nearly all that a large library has.
    let skip = relative_count.saturating_mul(RELA_SIZE as u64);
    data.start = data.start.saturating_add(skip).min(data.end);
    Ok(Tables {
        strings: range(Some(strings.ok_or(ElfError::NoSymbols)?), strings_size)?,
        symbols: symbols.ok_or(ElfError::NoSymbols)?,
        data,
        jumps: range(jumps, jumps_size)?,
    })
}

/// One relocation of a wanted kind.
struct Relocation {
    offset: u64,
    kind: SlotKind,
    symbol: u32,
}

fn relocation(entry: &[u8], machine: Machine) -> Option<Relocation> {
    let info = word(entry, 8)?;
    // A slot never has an addend; one that has is not the plain address of the function.
    if word(entry, 16)? != 0 {
        return None;
    }
    let kind = match info as u32 {
        kind if kind == machine.jump_slot => SlotKind::Jump,
        kind if kind == machine.glob_dat => SlotKind::Data,
        _ => return None,
    };
    Some(Relocation { offset: word(entry, 0)?, kind, symbol: (info >> 32) as u32 })
}

/// How many symbols the relocations refer to: the highest index plus one.
pub fn symbols_named(relocations: &[u8], machine: Machine) -> u64 {
    relocations
        .chunks_exact(RELA_SIZE)
        .filter_map(|entry| relocation(entry, machine))
        .map(|found| u64::from(found.symbol) + 1)
        .max()
        .unwrap_or(0)
}

/// The name of a symbol. Its version lives in another table, so a versioned symbol has the same plain name.
fn name<'a>(symbols: &[u8], strings: &'a [u8], index: u32) -> Option<&'a [u8]> {
    let at = usize::try_from(index).ok()?.checked_mul(SYM_SIZE)?;
    let start = usize::try_from(half(symbols, at)?).ok()?;
    let tail = strings.get(start..)?;
    let end = tail.iter().position(|&byte| byte == 0)?;
    tail.get(..end)
}

/// The slots among `relocations` whose symbol `wanted` knows, with the index that it gives.
pub fn slots(
    relocations: &[u8],
    symbols: &[u8],
    strings: &[u8],
    machine: Machine,
    wanted: &dyn Fn(&[u8]) -> Option<usize>,
) -> Vec<Slot> {
    relocations
        .chunks_exact(RELA_SIZE)
        .filter_map(|entry| {
            let found = relocation(entry, machine)?;
            Some(Slot { offset: found.offset, kind: found.kind, name: wanted(name(symbols, strings, found.symbol)?)? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dynamic(entries: &[(u64, u64)]) -> Vec<u8> {
        entries.iter().flat_map(|&(tag, value)| [tag.to_ne_bytes(), value.to_ne_bytes()].concat()).collect()
    }

    fn rela(offset: u64, symbol: u32, kind: u32, addend: u64) -> Vec<u8> {
        let info = u64::from(symbol) << 32 | u64::from(kind);
        [offset.to_ne_bytes(), info.to_ne_bytes(), addend.to_ne_bytes()].concat()
    }

    fn symbol(name: u32) -> Vec<u8> {
        let mut bytes = name.to_ne_bytes().to_vec();
        bytes.resize(SYM_SIZE, 0);
        bytes
    }

    const STRINGS: &[u8] = b"\0malloc\0ncclAllReduce\0ncclBroken";

    fn wanted(name: &[u8]) -> Option<usize> {
        [&b"ncclAllReduce"[..], b"ncclBroken"].iter().position(|&known| known == name)
    }

    fn symbols() -> Vec<u8> {
        [symbol(0), symbol(1), symbol(8), symbol(22), symbol(9999)].concat()
    }

    #[test]
    fn addresses_are_understood_with_and_without_the_base_added() {
        let base = 0x7f00_0000_0000;
        for added in [0, base] {
            let bytes = dynamic(&[
                (DT_STRTAB, added + 0x400),
                (DT_STRSZ, 0x80),
                (DT_SYMTAB, added + 0x300),
                (DT_JMPREL, added + 0x500),
                (DT_PLTRELSZ, 48),
                (DT_RELA, added + 0x600),
                (DT_RELASZ, 96),
                (DT_RELACOUNT, 3),
                (DT_NULL, 0),
                (DT_STRTAB, 1),
            ]);
            let expected = Tables { strings: 0x400..0x480, symbols: 0x300, data: 0x648..0x660, jumps: 0x500..0x530 };
            assert_eq!(tables(&bytes, base), Ok(expected));
        }
    }

    #[test]
    fn foreign_layouts_are_refused() {
        let complete = [(DT_STRTAB, 1), (DT_SYMTAB, 1)];
        for (wrong, error) in [
            ((DT_RELAENT, 8), ElfError::Layout),
            ((DT_SYMENT, 16), ElfError::Layout),
            ((DT_PLTREL, 17), ElfError::Layout),
            ((DT_STRSZ, u64::MAX), ElfError::Range),
        ] {
            let bytes = dynamic(&[complete[0], complete[1], wrong]);
            assert_eq!(tables(&bytes, 0), Err(error));
        }
        assert_eq!(tables(&[], 0), Err(ElfError::NoSymbols));
        assert_eq!(tables(&[1, 2, 3], 0), Err(ElfError::NoSymbols));
    }

    #[test]
    fn slots_of_both_kinds_and_architectures_are_found_by_name() {
        for machine in [X86_64, AARCH64] {
            let relocations = [
                rela(0x10, 2, machine.jump_slot, 0),
                rela(0x18, 1, machine.jump_slot, 0),
                rela(0x20, 2, machine.glob_dat, 0),
                rela(0x28, 2, machine.glob_dat, 8),
                rela(0x30, 2, 1, 0),
            ]
            .concat();
            let found = slots(&relocations, &symbols(), STRINGS, machine, &wanted);
            let slot = |offset, kind| Slot { offset, kind, name: 0 };
            assert_eq!(found, [slot(0x10, SlotKind::Jump), slot(0x20, SlotKind::Data)]);
            assert_eq!(symbols_named(&relocations, machine), 3);
        }
    }

    #[test]
    fn damaged_names_and_indices_yield_no_slot() {
        let relocations = [
            rela(0, 3, X86_64.jump_slot, 0), // not terminated
            rela(0, 4, X86_64.jump_slot, 0), // beyond the strings
            rela(0, 5, X86_64.jump_slot, 0), // beyond the symbols
            rela(0, u32::MAX, X86_64.jump_slot, 0),
        ]
        .concat();
        assert_eq!(slots(&relocations, &symbols(), STRINGS, X86_64, &wanted), []);
        assert_eq!(slots(&relocations[..23], &[], &[], X86_64, &wanted), []);
    }

    #[test]
    fn no_damage_makes_the_parser_fail_badly() {
        let relocations = rela(0x10, 2, X86_64.jump_slot, 0).repeat(3);
        let table = dynamic(&[(DT_STRTAB, 1), (DT_STRSZ, 9), (DT_SYMTAB, 1), (DT_RELA, 5), (DT_RELASZ, 48)]);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 16) as usize % below
        };
        for _ in 0..20_000 {
            let (mut table, mut relocations, mut symbols) = (table.clone(), relocations.clone(), symbols());
            for bytes in [&mut table, &mut relocations, &mut symbols] {
                for _ in 0..=next(4) {
                    let at = next(bytes.len());
                    bytes[at] = [0, 1, 0x7f, 0x80, 0xff, next(256) as u8][next(6)];
                }
            }
            if let Ok(read) = tables(&table, [0, 1, u64::MAX][next(3)]) {
                assert!(read.data.start <= read.data.end && read.jumps.start <= read.jumps.end);
            }
            let count = symbols_named(&relocations, X86_64);
            for slot in slots(&relocations, &symbols, STRINGS, X86_64, &wanted) {
                assert!(slot.name < 2 && count > 0);
            }
        }
    }

    #[test]
    fn no_prefix_of_an_object_makes_the_parser_fail_badly() {
        let relocations = rela(0x10, 2, X86_64.jump_slot, 0).repeat(3);
        let table = dynamic(&[(DT_STRTAB, 1), (DT_SYMTAB, 1), (DT_RELACOUNT, u64::MAX)]);
        let symbols = symbols();
        for cut in 0..table.len() {
            let _ = tables(&table[..cut], 0);
        }
        for cut in 0..relocations.len().max(symbols.len()) {
            let at = |bytes: &[u8]| bytes[..cut.min(bytes.len())].to_vec();
            let _ = slots(&at(&relocations), &at(&symbols), &at(STRINGS), X86_64, &wanted);
        }
    }
}
