//! The simulator's topology file. C++: gcc gives comparisons but no coverage, so the inputs to begin with matter more.
use std::ffi::{c_char, c_int};

unsafe extern "C" {
    fn fuzz_topology(text: *const c_char, bytes: usize) -> c_int;
}

/// Reads a topology, which may be anything.
pub fn topology(data: &[u8]) {
    // SAFETY: reads exactly so many bytes.
    unsafe { fuzz_topology(data.as_ptr().cast(), data.len()) };
}
