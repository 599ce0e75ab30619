//! Words of this process that other processes may read while it runs, and words that two processes share.
//!
//! An anonymous file. The first is found by its name among the process's descriptors: the kernel lets only those look who
//! may look into the process anyway, and it goes with the process, so that nothing is ever left behind. The second is
//! handed over by its descriptor.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What the link in `/proc/PID/fd` of an anonymous file of this name says.
pub fn link_of(name: &str) -> String {
    format!("/memfd:{name} (deleted)")
}

/// Zeroed words that live as long as the process, in an anonymous file of this name.
pub fn published(name: &str, words: usize) -> std::io::Result<&'static [AtomicU64]> {
    let (shared, file) = SharedWords::create(name, words)?;
    // Open for good: through it readers find the memory.
    std::mem::forget(file);
    let shared = std::mem::ManuallyDrop::new(shared);
    // SAFETY: as in `words`, and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts(shared.address.as_ptr(), shared.words) })
}

/// Words that two processes of a host share; unmapped when dropped.
pub struct SharedWords {
    address: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory belongs to no thread, and is accessed by atomics only.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Zeroed words in an anonymous file of this name, and the descriptor by which the other process opens them.
    pub fn create(name: &str, words: usize) -> std::io::Result<(Self, OwnedFd)> {
        let file = File::from(create(name)?);
        file.set_len((words * size_of::<AtomicU64>()) as u64)?;
        // Nobody who opens it can take the memory away under its readers.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok((Self::map(file.as_fd(), words)?, file.into()))
    }

    /// Opens what another process created with as many words.
    pub fn open(file: BorrowedFd<'_>, words: usize) -> std::io::Result<Self> {
        let bytes = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
        if bytes != (words * size_of::<AtomicU64>()) as u64 || !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) {
            return Err(std::io::Error::other("shared words of another size, or that can be cut off"));
        }
        Self::map(file, words)
    }

    fn map(file: BorrowedFd<'_>, words: usize) -> std::io::Result<Self> {
        let (bytes, access) = (words * size_of::<AtomicU64>(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        let address = NonNull::new(address.cast()).ok_or_else(|| std::io::Error::other("mapped at address 0"))?;
        Ok(Self { address, words })
    }

    /// All of them.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: page-aligned, `words` long, mapped as long as `self` lives, and accessed by atomics only; the file
        // cannot shrink.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: mapped once with this size; nobody borrows it any more.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

fn create(name: &str) -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the last flag; some later ones insist on it.
        Err(Errno::INVAL) => Ok(memfd_create(name, flags)?),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_is_counted_is_read_from_outside_under_the_name() {
        let words = published("twoshot-test-page", 1000).expect("an anonymous file");
        words[999].store(0x0123_4567_89ab_cdef, Ordering::Relaxed);
        let entries = std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten();
        let link = link_of("twoshot-test-page");
        let path = entries
            .map(|entry| entry.path())
            .find(|path| std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy() == link));
        let file = File::open(path.expect("listed")).expect("opens again");
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 999 * 8).expect("as long as asked");
        assert_eq!(u64::from_ne_bytes(word), 0x0123_4567_89ab_cdef);
        assert!(file.read_exact_at(&mut word, 1000 * 8).is_err(), "and no longer");
    }
    #[test]
    fn what_one_end_stores_the_other_loads_and_what_can_shrink_or_has_another_size_is_refused() {
        let (ours, file) = SharedWords::create("twoshot-test-shared", 700).expect("an anonymous file");
        let theirs = SharedWords::open(file.as_fd(), 700).expect("opens");
        ours.words()[699].store(u64::MAX, Ordering::Release);
        assert_eq!((theirs.words()[699].load(Ordering::Acquire), theirs.words().len()), (u64::MAX, 700));
        assert!(SharedWords::open(file.as_fd(), 699).is_err());
        let loose = File::from(create("twoshot-test-loose").expect("an anonymous file"));
        loose.set_len(700 * 8).expect("a length");
        assert!(SharedWords::open(loose.as_fd(), 700).is_err());
    }
}
