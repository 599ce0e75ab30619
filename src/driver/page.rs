//! Words of this process that other processes may read while it runs.
//!
//! An anonymous file, found by its name among the process's descriptors: the kernel lets only those look who may look
//! into the process anyway, and it goes with the process, so that nothing is ever left behind.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// What the link in `/proc/PID/fd` of an anonymous file of this name says.
pub fn link_of(name: &str) -> String {
    format!("/memfd:{name} (deleted)")
}

/// Zeroed words that live as long as the process, in an anonymous file of this name.
pub fn published(name: &str, words: usize) -> std::io::Result<&'static [AtomicU64]> {
    let file = File::from(create(name)?);
    let bytes = words * size_of::<AtomicU64>();
    file.set_len(bytes as u64)?;
    // Nobody who opens it can take the memory away under the counters.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file.as_fd(), 0)
    }?;
    // Open for good: through it readers find the memory.
    std::mem::forget(file);
    // SAFETY: page-aligned, zeroed, `words` long, never unmapped, and accessed by atomics only.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<AtomicU64>(), words) })
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
}
