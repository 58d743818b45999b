//! The `lacuna` command; also `qemu-img` and `qemu-io` when called by those names.

use std::process::ExitCode;

fn main() -> ExitCode {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    ExitCode::from(lacuna_cli::run(words.collect()))
}
