#![no_main]
use twoshot_fuzz::targets;

libfuzzer_sys::fuzz_target!(init: targets::write_seeds("votes"), |data: &[u8]| targets::votes(data));
