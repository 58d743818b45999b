//! See `testkit::fuzz::backup_segment`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::backup_segment(data));
