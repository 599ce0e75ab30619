#![no_main]
use twoshot_fuzz::targets;

libfuzzer_sys::fuzz_target!(init: targets::write_seeds("slots"), |data: &[u8]| targets::slots(data));
