//! See `testkit::fuzz::history`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::history(data));
