//! See `testkit::fuzz::nbd_server`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::nbd_server(data));
