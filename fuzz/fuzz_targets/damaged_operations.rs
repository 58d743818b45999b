//! See `testkit::fuzz::damaged_operations`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::damaged_operations(data));
