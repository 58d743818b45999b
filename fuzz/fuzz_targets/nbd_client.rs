//! See `testkit::fuzz::nbd_client`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::nbd_client(data));
