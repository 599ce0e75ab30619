//! Words on pages that may not be written: their rights are widened, the word is changed, the rights are restored.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, PoisonError};

use super::objects::Loaded;

/// Held by whoever changes rights: two threads on one page would undo each other's change.
pub static WRITING: Mutex<()> = Mutex::new(());

/// Runs `change` while the page of `word` is writable, whatever its rights are.
pub fn change_word(word: &AtomicUsize, change: impl FnOnce() -> bool) -> bool {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let address = std::ptr::from_ref(word) as u64;
    let maps = Protections::read();
    let found = maps.0.iter().find(|(range, _)| range.contains(&address));
    found.is_some_and(|(_, rights)| with_writable(word, *rights, true, change))
}

/// Runs `change` while the page of `word` is writable, and restores `rights`, which are what it had when they were read.
/// Where they are not `settled`, the dynamic linker may have taken the right to write since, so it is asked for again.
/// Called under [`WRITING`].
pub fn with_writable(word: &AtomicUsize, rights: c_int, settled: bool, change: impl FnOnce() -> bool) -> bool {
    if settled && rights & libc::PROT_WRITE != 0 {
        return change();
    }
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let start = (std::ptr::from_ref(word) as usize / page * page) as *mut c_void;
    // SAFETY: the page is mapped by a loaded object that cannot go away now; only rights are added.
    if unsafe { libc::mprotect(start, page, rights | libc::PROT_WRITE) } != 0 {
        return false;
    }
    let changed = change();
    // A page that was writable stays so: the dynamic linker may not be done with it, and takes the right itself.
    if rights & libc::PROT_WRITE == 0 {
        // SAFETY: as above; takes the added right back.
        unsafe { libc::mprotect(start, page, rights) };
    }
    changed
}

/// The rights of this process's pages, read once per binding.
pub struct Protections(Vec<(Range<u64>, c_int)>);

impl Protections {
    /// As they are now; nothing is known without /proc.
    pub fn read() -> Self {
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

    /// Those of a place in an object; without /proc, what the object asked for.
    pub fn of(&self, object: &Loaded<'_>, offset: u64) -> c_int {
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
    use std::sync::atomic::Ordering;

    /// A page of zeros with these rights, never unmapped, and its first words.
    fn page(rights: c_int) -> (*mut c_void, [&'static AtomicUsize; 2]) {
        // SAFETY: a fresh private page.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page is zero bytes, aligned, and never unmapped.
        let word = |index| unsafe { AtomicUsize::from_ptr(page.cast::<usize>().add(index)) };
        (page, [word(0), word(1)])
    }

    fn rights_of(page: *mut c_void) -> c_int {
        let all = Protections::read().0;
        let found = all.into_iter().find(|(range, _)| range.contains(&(page as u64)));
        found.expect("the page is mapped").1
    }

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
        for settled in [true, false] {
            let (page, [word, _]) = page(libc::PROT_READ);
            assert_eq!(rights_of(page), libc::PROT_READ);
            assert!(with_writable(word, rights_of(page), settled, || {
                word.store(7, Ordering::Relaxed);
                true
            }));
            assert_eq!((word.load(Ordering::Relaxed), rights_of(page)), (7, libc::PROT_READ));
        }
    }

    #[test]
    fn a_slot_whose_page_became_read_only_after_its_rights_were_read_is_written() {
        let (page, [word, _]) = page(libc::PROT_READ | libc::PROT_WRITE);
        let stale = rights_of(page);
        // SAFETY: the page is this test's own; so the dynamic linker ends the loading of an object.
        assert_eq!(unsafe { libc::mprotect(page, 4096, libc::PROT_READ) }, 0);
        assert!(with_writable(word, stale, false, || {
            word.store(7, Ordering::Relaxed);
            true
        }));
        assert_eq!(word.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn two_threads_that_erase_symbols_of_one_page_do_not_fault() {
        let (page, words) = page(libc::PROT_READ);
        std::thread::scope(|scope| {
            for word in words {
                scope.spawn(move || {
                    for round in 1..=2000 {
                        assert!(change_word(word, || {
                            std::thread::yield_now();
                            word.store(round, Ordering::Relaxed);
                            true
                        }));
                    }
                });
            }
        });
        assert_eq!(words.map(|word| word.load(Ordering::Relaxed)), [2000, 2000]);
        assert_eq!(rights_of(page), libc::PROT_READ);
    }
}
