//! The `lacuna` command; also `qemu-img` and `qemu-io` when called by those names.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(lacuna_cli::run_os(std::env::args_os().collect()))
}
