//! Cuts a disk into pieces to copy, by its extents. Pure: extents in, pieces out.
//!
//! * Always in guest order, without gaps or overlap.
//! * Data pieces start where their extent starts and have the size of a request; boundaries are
//!   QEMU's, because they decide in which order a new image allocates.

use std::collections::VecDeque;

use super::{Rules, TargetContent};
use crate::Result;
use crate::block::{AllocationDepth, Extent, ExtentStatus, no_status};
use crate::units::{GuestOffset, GuestRange};

/// Zeros that need a request come in pieces of this size, so that progress shows and a dropped
/// job stops soon.
const ZERO_BYTES: u64 = 1 << 30;

/// What to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Read and write.
    Copy,
    /// Write bytes that are known to be zeros, as bytes.
    Expand,
    /// Leave the target alone.
    Skip,
    /// Make the target read as zeros.
    Zero,
}

/// A range and what to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: GuestRange,
    pub(super) action: Action,
}

/// What a [`Cutter`] has to say.
#[derive(Debug)]
pub(super) enum Next {
    /// All pieces are out.
    End,
    /// The extents of this range are needed first.
    Need(GuestRange),
    /// The next piece.
    Piece(Piece),
}

/// Where the cutting stands.
#[derive(Debug)]
pub(super) struct Cutter {
    rules: Rules,
    at: GuestOffset,
    known: VecDeque<Extent>,
}

impl Cutter {
    pub(super) fn new(rules: Rules) -> Self {
        let range = GuestRange::new(GuestOffset(0), rules.size_bytes);
        let zeros = Extent { range, status: ExtentStatus::UNALLOCATED };
        let known = rules.source_is_zero.then_some(zeros).into_iter().collect();
        Self { rules, at: GuestOffset(0), known }
    }

    /// Takes the extents that were needed.
    ///
    /// # Errors
    /// Where the first one does not hold the place they were needed for: asking again for ever
    /// would be the alternative.
    pub(super) fn learn(&mut self, extents: Vec<Extent>) -> Result<()> {
        self.known = extents.into();
        match self.known.front() {
            Some(first) if first.range.contains(self.at) => Ok(()),
            _ => Err(no_status(GuestRange::new(self.at, 0))),
        }
    }

    /// Says what comes next.
    pub(super) fn next(&mut self) -> Next {
        let left = self.rules.size_bytes - self.at.0;
        if left == 0 {
            return Next::End;
        }
        while self.known.front().is_some_and(|extent| extent.range.end() <= self.at) {
            self.known.pop_front();
        }
        let rest = GuestRange::new(self.at, left);
        match self.known.front().and_then(|extent| extent.range.intersection(&rest)) {
            Some(found) if found.start == self.at => {
                let piece = self.cut(self.known[0], found);
                self.at = piece.range.end();
                Next::Piece(piece)
            }
            _ => Next::Need(rest),
        }
    }

    /// Cuts a piece off the front of `found`, which lies in `extent`.
    fn cut(&self, extent: Extent, found: GuestRange) -> Piece {
        let (action, limit) = self.action(extent, found.start);
        let range = GuestRange::new(found.start, found.len.min(limit));
        match self.rules.unit_bytes {
            Some(unit) => self.whole_units(Piece { range, action }, unit),
            None => Piece { range, action },
        }
    }

    /// Chooses what to do at `start`, and for how many bytes at most.
    fn action(&self, extent: Extent, start: GuestOffset) -> (Action, u64) {
        let zero = extent.status.reads_zero;
        match self.rules.options.content {
            TargetContent::Backing { source_bytes, target_bytes } => {
                let below = extent.status.depth != AllocationDepth::TOP;
                let backed = source_bytes.min(target_bytes);
                if below && start.0 < backed {
                    return (Action::Skip, backed - start.0);
                }
                if zero && start.0 >= target_bytes {
                    return (Action::Skip, u64::MAX);
                }
                let (action, limit) = self.by_content(zero);
                (action, limit.min(until(start, backed)).min(until(start, target_bytes)))
            }
            TargetContent::Beneath { shown_bytes }
                if extent.status.depth == AllocationDepth::NOWHERE && start.0 < shown_bytes =>
            {
                (Action::Skip, shown_bytes - start.0)
            }
            TargetContent::Beneath { .. } | TargetContent::Unknown | TargetContent::Zero => {
                self.by_content(zero)
            }
        }
    }

    fn by_content(&self, zero: bool) -> (Action, u64) {
        match zero {
            true if self.rules.writes_everything() => (Action::Expand, self.rules.request_bytes),
            true if self.rules.zeros_are_there() => (Action::Skip, u64::MAX),
            true => (Action::Zero, ZERO_BYTES),
            false => (Action::Copy, self.rules.request_bytes),
        }
    }

    /// Compressed data is written in whole units: what is shorter is read, whatever it is.
    fn whole_units(&self, piece: Piece, unit: u64) -> Piece {
        let start = piece.range.start;
        let left = self.rules.size_bytes - start.0;
        match piece.range.len / unit {
            0 if piece.range.len == left => piece,
            0 => Piece { range: GuestRange::new(start, unit.min(left)), action: Action::Copy },
            units => Piece { range: GuestRange::new(start, units * unit), ..piece },
        }
    }
}

/// Bytes from `start` to `boundary` where that lies ahead.
const fn until(start: GuestOffset, boundary: u64) -> u64 {
    match boundary.checked_sub(start.0) {
        Some(ahead) if ahead > 0 => ahead,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::ExtentStatus;
    use crate::job::ConvertOptions;

    fn extent(start: u64, len: u64, depth: u32, reads_zero: bool) -> Extent {
        let range = GuestRange::new(GuestOffset(start), len);
        let depth = AllocationDepth(depth);
        Extent { range, status: ExtentStatus { depth, reads_zero, ..ExtentStatus::UNALLOCATED } }
    }

    fn pieces(
        options: ConvertOptions,
        unit_bytes: Option<u64>,
        extents: &[Extent],
    ) -> Vec<(u64, u64, Action)> {
        let size_bytes = extents.last().unwrap().range.end().0;
        let request_bytes = unit_bytes.unwrap_or(100);
        let rules = Rules {
            options,
            size_bytes,
            unit_bytes,
            request_bytes,
            same_size: true,
            source_is_zero: false,
        };
        let (mut cutter, mut out) = (Cutter::new(rules), Vec::new());
        loop {
            match cutter.next() {
                Next::End => return out,
                // Answers of one extent each, from wherever was asked.
                Next::Need(rest) => {
                    let known = extents
                        .iter()
                        .copied()
                        .filter(|extent| extent.range.overlaps(&rest))
                        .take(1)
                        .collect();
                    cutter.learn(known).unwrap();
                }
                Next::Piece(piece) => {
                    out.push((piece.range.start.0, piece.range.len, piece.action));
                }
            }
        }
    }

    #[test]
    fn known_zeros_are_skipped_zeroed_or_expanded_as_asked() {
        let disk = [extent(0, 250, 1, false), extent(250, 500, 0, true)];
        let with = |content, sparse_bytes| {
            let options = ConvertOptions { content, sparse_bytes, ..Default::default() };
            pieces(options, None, &disk).split_off(3)
        };
        assert_eq!(with(TargetContent::Zero, 4096), [(250, 500, Action::Skip)]);
        assert_eq!(with(TargetContent::Unknown, 4096), [(250, 500, Action::Zero)]);
        let expanded = with(TargetContent::Zero, 0);
        assert!(expanded.iter().all(|piece| piece.2 == Action::Expand && piece.1 == 100));
    }

    #[test]
    fn data_is_cut_from_the_start_of_its_extent() {
        let disk = [extent(0, 30, 0, true), extent(30, 210, 1, false), extent(240, 60, 2, false)];
        let options = ConvertOptions { content: TargetContent::Zero, ..Default::default() };
        let copies = [(30, 100), (130, 100), (230, 10), (240, 60)];
        let copies = copies.map(|(start, len)| (start, len, Action::Copy));
        assert_eq!(pieces(options, None, &disk)[1..], copies);
    }

    #[test]
    fn compressed_data_comes_in_whole_units() {
        let disk = [extent(0, 70, 0, true), extent(70, 10, 1, false), extent(80, 45, 0, true)];
        let options = ConvertOptions { content: TargetContent::Zero, ..Default::default() };
        let expected = [
            (0, 64, Action::Skip),
            (64, 16, Action::Copy),
            (80, 32, Action::Skip),
            (112, 13, Action::Skip),
        ];
        assert_eq!(pieces(options, Some(16), &disk), expected);
    }

    #[test]
    fn what_the_backing_layers_share_is_left_out() {
        let content = TargetContent::Backing { source_bytes: 100, target_bytes: 200 };
        let options = ConvertOptions { content, ..Default::default() };
        let disk = [
            extent(0, 50, 2, false),
            extent(50, 10, 1, true),
            extent(60, 290, 0, true),
            extent(350, 50, 1, false),
        ];
        let expected = [
            (0, 50, Action::Skip),
            (50, 10, Action::Zero),
            (60, 40, Action::Skip),
            // The target's backing layer may hold anything here; the source reads zeros.
            (100, 100, Action::Zero),
            (200, 150, Action::Skip),
            (350, 50, Action::Copy),
        ];
        assert_eq!(pieces(options, None, &disk), expected);
    }

    #[test]
    fn a_layer_without_an_answer_is_an_error_not_a_loop() {
        let options = ConvertOptions::default();
        let rules = Rules {
            options,
            size_bytes: 10,
            unit_bytes: None,
            request_bytes: 5,
            same_size: true,
            source_is_zero: false,
        };
        let mut cutter = Cutter::new(rules);
        assert!(matches!(cutter.next(), Next::Need(_)));
        assert!(cutter.learn(Vec::new()).is_err());
        assert!(cutter.learn(vec![extent(5, 5, 1, false)]).is_err());
    }
}
