//! Which bytes of a read have arrived.

use smallvec::SmallVec;

use crate::ByteRange;

/// Most separate pieces that are kept in mind; a server that leaves more gaps is up to no good.
const MAX_PIECES: usize = 8192;

/// The parts of a read that have arrived: in order, apart from each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Coverage(SmallVec<[Piece; 2]>);

/// From `start` up to, but not including, `end`.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    end: u64,
}

impl Coverage {
    /// Adds a range, which is not empty; false where it overlaps what is there, or there are too
    /// many gaps.
    pub(super) fn add(&mut self, range: ByteRange) -> bool {
        let Some(end) = range.end() else { return false };
        // The first piece that ends behind the start of the range.
        let at = self.0.partition_point(|piece| piece.end <= range.start);
        if self.0.get(at).is_some_and(|piece| piece.start < end) {
            return false;
        }
        let joins_next = self.0.get(at).is_some_and(|piece| piece.start == end);
        let before = at.checked_sub(1);
        let joins_before =
            before.and_then(|before| self.0.get(before)).is_some_and(|p| p.end == range.start);
        match (before.filter(|_| joins_before), joins_next) {
            (Some(before), true) => {
                let next = self.0.remove(at);
                self.change(before, |piece| piece.end = next.end);
            }
            (Some(before), false) => self.change(before, |piece| piece.end = end),
            (None, true) => self.change(at, |piece| piece.start = range.start),
            (None, false) => {
                self.0.insert(at, Piece { start: range.start, end });
            }
        }
        self.0.len() <= MAX_PIECES
    }

    /// Says whether all of the range is there.
    pub(super) fn is_all_of(&self, range: ByteRange) -> bool {
        match self.0.as_slice() {
            [] => range.len == 0,
            [piece] => piece.start <= range.start && Some(piece.end) >= range.end(),
            _ => false,
        }
    }

    fn change(&mut self, at: usize, change: impl FnOnce(&mut Piece)) {
        if let Some(piece) = self.0.get_mut(at) {
            change(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_in_any_order_and_never_overlap() {
        let range = |start, len| ByteRange { start, len };
        let mut coverage = Coverage::default();
        assert!(coverage.is_all_of(range(7, 0)));
        for (start, len) in [(20, 10), (0, 10), (40, 10), (10, 10), (30, 10)] {
            assert!(!coverage.is_all_of(range(0, 50)));
            assert!(coverage.add(range(start, len)));
            for (start, len) in [(start, len), (start + len - 1, 5), (0, 100)] {
                assert!(!coverage.add(range(start, len)));
            }
        }
        assert!(coverage.is_all_of(range(0, 50)) && coverage.0.len() == 1);
        assert!(!coverage.is_all_of(range(0, 51)));
        assert!(!coverage.add(range(u64::MAX, 2)));
    }

    #[test]
    fn gaps_have_a_bound() {
        let mut coverage = Coverage::default();
        let pieces = (0..MAX_PIECES as u64 + 1).map(|n| ByteRange { start: n * 2, len: 1 });
        assert_eq!(pieces.map(|piece| coverage.add(piece)).filter(|is_fine| !is_fine).count(), 1);
    }
}
