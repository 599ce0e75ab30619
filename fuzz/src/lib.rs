//! What twoshot parses, under a fuzzer. The targets themselves are also replayed by `tests/fuzz_corpus.rs`.
#![deny(unsafe_code)]

pub mod targets;
#[allow(unsafe_code)]
pub mod topology;
