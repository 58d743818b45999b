//! Whole scenarios on simulated storage, sockets and order (`crates/simulate`), optimised, and with every
//! assertion.

use crate::Outcome;
use crate::run::{cargo, run as start};

/// Hands the arguments on.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let mut words = vec!["run", "--profile", "simulate", "--locked", "-q", "-p", "simulate", "--"];
    words.extend(arguments.iter().map(String::as_str));
    start(cargo(&words))
}
