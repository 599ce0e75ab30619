#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| twoshot_fuzz::topology::topology(data));
