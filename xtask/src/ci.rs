//! The one command before saying "done", and the tests alone.
//!
//! * Cheap steps all run, so that one round shows everything they find.
//! * Dear steps run only when the cheap ones passed: nobody waits for tests of code that is
//!   going to change anyway.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::run::{cargo, find, run};
use crate::{Outcome, guest, licences, setup, tidy};

/// A step and what it does.
type Step = (&'static str, fn() -> Outcome);

const CHEAP: [Step; 3] =
    [("format", format), ("tidy", tidy::workspace), ("licences", licences::check)];
const LINTS: [Step; 2] = [("clippy", clippy), ("docs", docs)];
/// The corpus replay and seeded mutation of every fuzz target are plain tests among these.
const TESTS: [Step; 4] = [
    ("setup", setup::peers),
    ("tests", tests),
    ("doc examples", examples),
    ("guest", guest::sample),
];

/// Runs everything that must pass.
pub(crate) fn all() -> Outcome {
    let mut results = Vec::new();
    for class in [&CHEAP[..], &LINTS, &TESTS] {
        results.extend(class.iter().map(|step| timed(*step)));
        if results.iter().any(|result| result.outcome.is_err()) {
            break;
        }
    }
    summary(&results)
}

/// Installs missing peers, then runs all tests whose names contain one of `filters`.
pub(crate) fn test(filters: &[String]) -> Outcome {
    setup::peers()?;
    let mut command = test_command();
    command.args(filters);
    run(command)?;
    if filters.is_empty() { examples() } else { Ok(()) }
}

struct StepResult {
    name: &'static str,
    outcome: Outcome,
    took: Duration,
}

fn timed((name, step): Step) -> StepResult {
    eprintln!("== {name}");
    let start = Instant::now();
    let outcome = step();
    if let Err(reason) = &outcome {
        eprintln!("{name}: {reason}");
    }
    StepResult { name, outcome, took: start.elapsed() }
}

fn summary(results: &[StepResult]) -> Outcome {
    println!();
    for result in results {
        let verdict = if result.outcome.is_ok() { "ok" } else { "FAILED" };
        println!("{:<14} {verdict:<7} {:>7.1} s", result.name, result.took.as_secs_f64());
    }
    let failed = results.iter().filter(|result| result.outcome.is_err());
    let names: Vec<&str> = failed.map(|result| result.name).collect();
    if names.is_empty() { Ok(()) } else { Err(format!("failed: {}", names.join(", "))) }
}

fn format() -> Outcome {
    run(cargo(&["fmt", "--all", "--check"]))
}

fn clippy() -> Outcome {
    run(cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
}

fn docs() -> Outcome {
    let mut command = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    run(command)
}

fn tests() -> Outcome {
    run(test_command())
}

fn test_command() -> Command {
    if find("cargo-nextest").is_some() {
        cargo(&["nextest", "run", "--workspace", "--locked", "--no-fail-fast"])
    } else {
        cargo(&["test", "--workspace", "--all-targets", "--locked", "--no-fail-fast"])
    }
}

fn examples() -> Outcome {
    run(cargo(&["test", "--workspace", "--doc", "--locked"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &'static str, outcome: Outcome) -> StepResult {
        StepResult { name, outcome, took: Duration::ZERO }
    }

    #[test]
    fn summary_fails_when_any_step_did() {
        assert!(summary(&[result("one", Ok(()))]).is_ok());
        let results = [result("one", Ok(())), result("two", Err("because".into()))];
        assert_eq!(summary(&results), Err("failed: two".into()));
    }

    #[test]
    fn a_failing_step_is_remembered_with_its_reason() {
        let failing = timed(("example", || Err("nothing works".into())));
        assert_eq!(failing.outcome, Err("nothing works".into()));
    }
}
