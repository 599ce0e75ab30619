#![no_main]
use twoshot_fuzz::targets;

libfuzzer_sys::fuzz_target!(init: targets::write_seeds("statistics"), |data: &[u8]| targets::statistics(data));
