//! What a power loss may leave of short runs (`crates/powerloss`), optimised, and with every assertion.

use crate::Outcome;
use crate::run::{cargo, run as start};

/// Hands the arguments on.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let mut words = vec!["run", "--profile", "simulate", "--locked", "-q", "-p", "powerloss", "--"];
    words.extend(arguments.iter().map(String::as_str));
    start(cargo(&words))
}
