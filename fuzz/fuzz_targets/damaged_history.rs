//! See `testkit::fuzz::damaged_history`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::damaged_history(data));
