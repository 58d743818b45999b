//! The `lacuna` command; also `qemu-img` and `qemu-io` when called by those names.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A name that is changed to fit would be the name of another file.
    let words = std::env::args_os().map(std::ffi::OsString::into_string);
    match words.collect::<Result<Vec<_>, _>>() {
        Ok(words) => ExitCode::from(lacuna_cli::run(words)),
        Err(word) => {
            let name = env!("CARGO_BIN_NAME");
            eprintln!("{name}: The argument '{}' is not UTF-8 text", word.display());
            ExitCode::FAILURE
        }
    }
}
