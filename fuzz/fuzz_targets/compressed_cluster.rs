//! See `testkit::fuzz::compressed_cluster`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::compressed_cluster(data));
