//! See `testkit::fuzz::damaged_jobs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::damaged_jobs(data));
