//! See `testkit::fuzz::backup_manifest`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| testkit::fuzz::backup_manifest(data));
