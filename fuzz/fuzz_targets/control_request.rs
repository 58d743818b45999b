//! See `lacuna_cli::parse_hostile_request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|line: &[u8]| lacuna_cli::parse_hostile_request(line));
