//! The project's own commands: `cargo xtask VERB`.
//!
//! * `ci.rs` — what everybody runs before saying "done", and the steps it is made of
//! * `conform.rs` — the conformance kit before all the engines that it has a driver for
//! * `simulate.rs` — whole scenarios on simulated storage, sockets and order
//! * `crash_explore.rs` — what a power loss may leave of short runs
//! * `setup.rs` — the foreign tools that the tests are checked against
//! * `tidy/` — the rules of the house that a program can check
//! * `licences.rs` — whether every dependency may be shipped
//! * `harness.rs` — benchmarks and QEMU's iotests, which live outside of this repository
//! * `figures/` — what a benchmark run reached, as a table
//! * `guest.rs` — a guest that lives on a disk of ours
//! * `power/` — a guest whose disk loses power
//! * `fuzz/` — coverage-guided fuzzing, which needs a tool of its own
//! * `real/` — real file systems before and after space is given back
//! * `torture.rs`, `random.rs` — commands killed at random moments
//! * `dedup/` — a benchmark of our own: what finding and sharing equal clusters costs
//! * `reclaim/` — a benchmark of our own: an image made short in place
//! * `vsock.rs` — a guest that serves itself over a socket of virtual machines
//! * `looks.rs`, `cells.rs` — what stock tools say of images, and how tables say it
//! * `watched.rs`, `scratch.rs` — programs that are measured, and where their files lie
//! * `written.rs` — what the command writes of itself for packages
//! * `run.rs` — starting programs
//! * `wire/` — benchmarks of our own: NBD in plaintext and under TLS, servers and clients
//! * `wipe/` — a benchmark of our own: a full disk wiped with zeros
//! * `zeros.rs` — a benchmark of our own: nothing copied onto nothing

mod cells;
mod ci;
mod conform;
mod crash_explore;
mod dedup;
mod figures;
mod fuzz;
mod guest;
mod harness;
mod licences;
mod looks;
mod power;
mod random;
mod real;
mod reclaim;
mod run;
mod scratch;
mod setup;
mod simulate;
mod tidy;
mod torture;
mod vsock;
mod watched;
mod wipe;
mod wire;
mod written;
mod zeros;

use std::process::ExitCode;

/// Why a command did not succeed, as a sentence for the person at the terminal.
type Outcome<T = ()> = Result<T, String>;

const USAGE: &str = "\
usage: cargo xtask VERB [ARGUMENTS]

  ci                          format, lints, tests, docs, tidy, licences: all that must pass
  test [FILTER...]            installs missing peers, then runs every test and doc example
  setup                       installs the foreign tools that the tests need (apt)
  tidy                        the rules of the house: module arrows, banned words, sizes
  man, completions            the command's manual pages, completions of shells: target/VERB/
  licences                    whether the licence of every dependency allows shipping it
  bench    [--harness DIR] [ARGUMENTS...]   benchmarks against QEMU's tools (DIR/bench);
           --table runs what has a target and prints how it did; --from FILE: an earlier --json;
           --zeros copies an empty disk of 8 TiB onto an empty image (needs no DIR, and a minute);
           --wipe wipes a full disk with zeros and counts what is written (no DIR, some minutes);
           --tls measures servers and --client clients of NBD beside their peers, both in plaintext
           and under TLS (no DIR, some minutes each);
           --reclaim [--size 10G] makes an image of which 30 % are in use short (no DIR, as large
           a disk as it has and a quarter of an hour);
           --dedup [rates|online|peers] measures how equal clusters are found, and what others find
  iotests  [--harness DIR] [ARGUMENTS...]   QEMU's own tests (DIR/run-iotests)
  guest    [--harness DIR] [FS...]          boots a guest on a served disk (DIR/guest): ext4, btrfs,
           xfs; makes, fills, trims and checks a file system; the image must be clean and smaller;
           guest vsock: server and clients on a guest's sockets of virtual machines;
           guest power [FS...] [--rounds N] [--steps N] [--states N] [--seed N]: power losses of
           its disk, the server and the emulator: what was flushed is there after a boot
  real     [INPUT...]        reclaim and dedup on file systems of guests and tools: guest-ext4,
           guest-btrfs (need LACUNA_HARNESS), debian, ntfs; every file is hashed before and after
  torture  [--rounds N] [--seed N]   reclaim and dedup killed (kill -9) at random moments
  simulate --seeds N [--from N] [--states N] [--qemu-every N]   whole scenarios from seeds: guests,
           servers, jobs and crashes; a failure is told with its seed and the fewest steps that
           fail (--seed N --parts N,...); --states: states of the medium looked at after a crash
  crash-explore [--seeds N] [--from N] [--path NAME] [--qemu-every N] [--exhaustive N]   what a power
           loss may leave of short runs of each way to write an image; a failure names its seed
  conform                     the conformance kit with lacuna, stock qemu-io and imago (which it builds):
           fails where one of them fails more than is known
  fuzz     [--seconds N] [--fast] [TARGET...]   cargo-fuzz on all targets, or on some; --fast: without
           the address sanitizer; --coverage: lines that the tests of the corpus reach, by module

LACUNA_HARNESS stands in for --harness.";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let verb = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    match dispatch(&verb, &rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("xtask {verb}: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(verb: &str, rest: &[String]) -> Outcome {
    std::env::set_current_dir(run::workspace())
        .map_err(|error| format!("cannot enter the workspace: {error}"))?;
    match verb {
        "ci" => ci::all(),
        "test" => ci::test(rest),
        "setup" => setup::peers(),
        "tidy" => tidy::workspace(),
        "man" | "completions" => written::by_the_command(verb),
        "licences" | "deny" => licences::check(),
        "bench" => harness::bench(rest),
        "guest" => guest::boot(rest),
        "real" => real::run(rest),
        "conform" => conform::run(),
        "crash-explore" => crash_explore::run(rest),
        "simulate" => simulate::run(rest),
        "torture" => torture::run(rest),
        "iotests" => harness::iotests(rest),
        "fuzz" => fuzz::targets(rest),
        "" | "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("no such verb\n\n{USAGE}")),
    }
}
