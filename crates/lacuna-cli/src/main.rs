//! The `lacuna` command; also `qemu-img`, `qemu-io` and `qemu-nbd` when called by those names.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(lacuna_cli::run_os(std::env::args_os().collect()))
}
