//! See `lacuna_cli::parse_hostile_rules`.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| lacuna_cli::parse_hostile_rules(text));
