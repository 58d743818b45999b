//! The fewest requests, jobs and faults with which a run still fails.

use crate::scenario::Scenario;
use crate::{Looks, run};

/// Leaves out halves, quarters, and so on, as long as the run fails in some way. Returns the parts that
/// are needed, and how it fails with them alone.
pub(crate) fn minimise(scenario: &Scenario, error: String, looks: &Looks) -> (Vec<usize>, String) {
    let (mut needed, mut error): (Vec<usize>, _) = ((0..scenario.parts()).collect(), error);
    let mut piece = needed.len().div_ceil(2).max(1);
    loop {
        let mut shrunk = false;
        let mut start = 0;
        while start < needed.len() {
            let end = (start + piece).min(needed.len());
            let fewer: Vec<usize> = needed[..start].iter().chain(&needed[end..]).copied().collect();
            match only(scenario, &fewer, looks) {
                Err(other) => {
                    (needed, error, shrunk) = (fewer, other, true);
                }
                Ok(()) => start = end,
            }
        }
        match (piece, shrunk) {
            (1, false) => return (needed, error),
            (1, true) => {}
            _ => piece = piece.div_ceil(2),
        }
    }
}

/// Runs with these parts alone.
pub(crate) fn only(scenario: &Scenario, parts: &[usize], looks: &Looks) -> Result<(), String> {
    let mut scenario = scenario.clone();
    scenario.retain(&|number| parts.binary_search(&number).is_ok());
    run(&scenario, looks).map(drop)
}
