//! The fewest requests, jobs and faults with which a run still fails in the same way.

use crate::kind::Kind;
use crate::scenario::Scenario;
use crate::{Looks, run};

/// Leaves out halves, quarters, and so on, as long as the run fails in the way that it began with. Returns
/// the parts that are needed, and how it fails with them alone.
pub(crate) fn minimise(scenario: &Scenario, error: String, looks: &Looks) -> (Vec<usize>, String) {
    fewest(scenario.parts(), error, |parts| only(scenario, parts, looks))
}

fn fewest(
    count: usize,
    error: String,
    mut run: impl FnMut(&[usize]) -> Result<(), String>,
) -> (Vec<usize>, String) {
    let kind = Kind::of(&error);
    let (mut needed, mut error): (Vec<usize>, _) = ((0..count).collect(), error);
    let mut piece = needed.len().div_ceil(2).max(1);
    loop {
        let mut shrunk = false;
        let mut start = 0;
        while start < needed.len() {
            let end = (start + piece).min(needed.len());
            let fewer: Vec<usize> = needed[..start].iter().chain(&needed[end..]).copied().collect();
            match run(&fewer) {
                // Another failure is another story, with a seed of its own some day.
                Err(other) if Kind::of(&other) == kind => {
                    (needed, error, shrunk) = (fewer, other, true);
                }
                _ => start = end,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Part 9 alone fails, in another way than parts 3 and 6 together do.
    #[test]
    fn another_failure_on_the_way_is_not_taken_for_the_first() {
        let run = |parts: &[usize]| match parts {
            _ if parts.contains(&3) && parts.contains(&6) => {
                Err(format!("The check finds {} leaks", parts.len()))
            }
            _ if parts.contains(&9) => Err("byte 0x1 is 0x02; changes there:".to_owned()),
            _ => Ok(()),
        };
        let (needed, error) = fewest(20, "The check finds 20 leaks".to_owned(), run);
        assert_eq!((needed, error.as_str()), (vec![3, 6], "The check finds 2 leaks"));
    }
}
