//! What was found out of the lower levels of a chain: which of them decides which bytes.
//!
//! * Never more than [`MOST_RUNS`] runs: those that were of no use for longest go, half of them at a
//!   time.
//! * Always true: backing layers do not change while they are open. What a host says of a raw disk
//!   is not kept: that others may write.

use std::collections::BTreeMap;

use crate::units::{GuestOffset, GuestRange};

/// How many runs are remembered: some 4 MiB.
pub(super) const MOST_RUNS: usize = 1 << 16;

/// Where the bytes of a run come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// This level holds them, or says that they are zeros.
    Level(usize),
    /// No level holds them: zeros.
    Nowhere,
}

/// A run of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: GuestRange,
    pub(super) source: Source,
}

/// Runs that do not overlap, by their start; the newer half takes in what of the older one is used.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    newer: BTreeMap<GuestOffset, Run>,
    older: BTreeMap<GuestOffset, Run>,
}

impl Resolved {
    /// Returns the run that starts where `rest` does, at most as long, as far as it is known.
    pub(super) fn at(&mut self, rest: GuestRange) -> Option<Run> {
        let run = match holding(&self.newer, rest.start) {
            Some(run) => run,
            None => {
                let run = holding(&self.older, rest.start)?;
                self.older.remove(&run.range.start);
                self.add(run);
                run
            }
        };
        let range = run.range.intersection(&rest)?;
        Some(Run { range, ..run })
    }

    /// Remembers runs in guest order that are not known yet. Neighbours of one source become one.
    pub(super) fn learn(&mut self, runs: Vec<Run>) {
        let mut joined: Option<Run> = None;
        for run in runs {
            match &mut joined {
                Some(last) if last.source == run.source && last.range.end() == run.range.start => {
                    last.range.len += run.range.len;
                }
                last => {
                    if let Some(last) = last.replace(run) {
                        self.add(last);
                    }
                }
            }
        }
        joined.into_iter().for_each(|last| self.add(last));
    }

    fn add(&mut self, run: Run) {
        if self.newer.len() >= MOST_RUNS / 2 {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(run.range.start, run);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.newer.len() + self.older.len()
    }
}

fn holding(runs: &BTreeMap<GuestOffset, Run>, at: GuestOffset) -> Option<Run> {
    let (_, run) = runs.range(..=at).next_back()?;
    run.range.contains(at).then_some(*run)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len: u64, source: Source) -> Run {
        Run { range: GuestRange::new(GuestOffset(start), len), source }
    }

    fn rest(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    #[test]
    fn neighbours_of_one_source_are_one_run() {
        let mut known = Resolved::default();
        let level = Source::Level(3);
        known.learn(vec![run(0, 4, level), run(4, 4, level), run(8, 4, Source::Nowhere)]);
        assert_eq!(known.at(rest(2, 100)), Some(run(2, 6, level)));
        assert_eq!(known.at(rest(8, 2)), Some(run(8, 2, Source::Nowhere)));
        assert_eq!(known.at(rest(12, 2)), None);
        assert_eq!(known.len(), 2);
    }

    #[test]
    fn runs_are_bounded_and_those_in_use_stay() {
        let mut known = Resolved::default();
        known.learn(vec![run(0, 1, Source::Level(7))]);
        for start in 1..4 * MOST_RUNS as u64 {
            known.learn(vec![run(start * 2, 1, Source::Nowhere)]);
            assert!(known.at(rest(0, 1)).is_some(), "after {start}");
        }
        assert!(known.len() <= MOST_RUNS + 1, "{}", known.len());
    }
}
