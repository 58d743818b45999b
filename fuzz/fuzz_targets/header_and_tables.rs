//! See `testkit::fuzz::header_and_tables`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::header_and_tables(data));
