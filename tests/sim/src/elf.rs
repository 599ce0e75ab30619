//! Libraries that lack symbols: a copy in which the dynamic linker cannot find
//! them, as with an older driver.

use std::io;

const SHT_STRTAB: u32 = 3;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// File range of the dynamic string table of a 64-bit little-endian library.
fn dynamic_strings(elf: &[u8]) -> Option<std::ops::Range<usize>> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let sections = u64::from_le_bytes(number(elf, 0x28)?) as usize;
    let entry = u16::from_le_bytes(number(elf, 0x3a)?) as usize;
    let count = u16::from_le_bytes(number(elf, 0x3c)?) as usize;
    let names = u16::from_le_bytes(number(elf, 0x3e)?) as usize;
    let range = |index: usize| -> Option<std::ops::Range<usize>> {
        let at = sections + index * entry;
        let offset = u64::from_le_bytes(number(elf, at + 0x18)?) as usize;
        let size = u64::from_le_bytes(number(elf, at + 0x20)?) as usize;
        Some(offset..offset + size)
    };
    let titles = range(names)?.start;
    (0..count).find_map(|index| {
        let at = sections + index * entry;
        let title = titles + u32::from_le_bytes(number(elf, at)?) as usize;
        let kind = u32::from_le_bytes(number(elf, at + 4)?);
        (kind == SHT_STRTAB && elf.get(title..)?.starts_with(b".dynstr\0")).then(|| range(index))?
    })
}

/// Spoils the first letter of these names in the dynamic string table: the hash
/// table still leads to the symbol, whose name then no longer matches.
pub(crate) fn without_symbols(mut elf: Vec<u8>, names: &[&str]) -> io::Result<Vec<u8>> {
    let strings = dynamic_strings(&elf).ok_or_else(|| io::Error::other("a simulated library is no ELF library"))?;
    let table = &mut elf[strings];
    for name in names {
        let wanted = [b"\0", name.as_bytes(), b"\0"].concat();
        if let Some(at) = table.windows(wanted.len()).position(|w| w == wanted) {
            table[at + 1] = b'!';
        }
    }
    Ok(elf)
}
