//! Runs of a disk, put into regions of equal size, with a lane for each file of the chain.
//!
//! * Always: a run is kept once, in the lane of the file that decides it. What the other lanes show
//!   there follows from that, so that adding a run costs the same with a thousand files.

use lacuna::units::GuestRange;

use super::content::{Content, Shares};

/// Rows of characters for all lanes together, where there are fewer lanes than that.
const ROWS: usize = 16;
/// A row is a multiple of so many regions, so that rows begin at round offsets.
const COLUMNS_STEP: usize = 16;
/// Columns beside the regions of a row: an offset and a frame.
const MARGIN: usize = 12;

/// How a picture is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Regions in a row.
    pub(crate) columns: usize,
    /// Bytes of a region: a power of two.
    pub(crate) cell_bytes: u64,
}

impl Shape {
    /// Lays out `bytes` in `lanes` on a terminal of so many columns; a region is no smaller than
    /// `granule_bytes`, the smallest part that can differ from its neighbours.
    pub(crate) fn new(bytes: u64, lanes: usize, columns: usize, granule_bytes: u64) -> Self {
        let columns = columns.saturating_sub(MARGIN) / COLUMNS_STEP * COLUMNS_STEP;
        let columns = columns.max(COLUMNS_STEP);
        let rows = (ROWS / lanes.max(1)).max(1);
        let least = bytes.div_ceil((columns * rows) as u64).max(granule_bytes).max(1);
        Self { columns, cell_bytes: least.checked_next_power_of_two().unwrap_or(1 << 63) }
    }

    /// Returns the bytes of a row.
    pub(crate) const fn row_bytes(&self) -> u64 {
        self.cell_bytes.saturating_mul(self.columns as u64)
    }
}

/// What one region shows in one lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// What the file of the lane decides; unallocated is also what files below it decide.
    pub(crate) shares: Shares,
    /// What files above decide, or where this one was not asked.
    pub(crate) hidden_bytes: u64,
}

/// The regions of a range of a disk.
#[derive(Debug)]
pub(crate) struct Picture {
    pub(crate) range: GuestRange,
    pub(crate) shape: Shape,
    lanes: Vec<Vec<Shares>>,
}

impl Picture {
    /// Makes an empty picture of `range` with a lane for each file.
    pub(crate) fn new(range: GuestRange, lanes: usize, shape: Shape) -> Self {
        let cells = range.len.div_ceil(shape.cell_bytes) as usize;
        Self { range, shape, lanes: vec![vec![Shares::default(); cells]; lanes] }
    }

    /// Adds a run inside of the range, which the file of `lane` decides.
    pub(crate) fn add(&mut self, run: GuestRange, lane: usize, content: Content) {
        let end = run.end().0.min(self.range.end().0) - self.range.start.0;
        let mut at = run.start.0.saturating_sub(self.range.start.0);
        while at < end {
            let index = at / self.shape.cell_bytes;
            let next = ((index + 1).saturating_mul(self.shape.cell_bytes)).min(end);
            self.lanes[lane][index as usize].add(content, next - at);
            at = next;
        }
    }

    /// Returns the number of lanes.
    pub(crate) const fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Returns what a lane shows, from the start of the range on.
    pub(crate) fn lane(&self, lane: usize) -> impl Iterator<Item = Cell> + '_ {
        let decided = |lanes: &[Vec<Shares>], index: usize| {
            lanes.iter().map(|cells| cells[index].total()).sum::<u64>()
        };
        (0..self.lanes[lane].len()).map(move |index| {
            let mut shares = self.lanes[lane][index];
            shares.add(Content::Unallocated, decided(&self.lanes[lane + 1..], index));
            Cell { shares, hidden_bytes: decided(&self.lanes[..lane], index) }
        })
    }

    /// Returns how much of the range is what, decided by the file of `lane`.
    pub(crate) fn decided(&self, lane: usize) -> Shares {
        self.lanes[lane].iter().fold(Shares::default(), Shares::plus)
    }
}

#[cfg(test)]
mod tests {
    use lacuna::units::GuestOffset;

    use super::*;

    fn run(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    #[test]
    fn rows_begin_at_round_offsets_on_any_terminal() {
        for (bytes, lanes, columns, expected) in [
            (1 << 40, 1, 80, (64, 1 << 30)),
            (1 << 40, 1, 100, (80, 1 << 30)),
            (1 << 40, 4, 80, (64, 1 << 32)),
            (1 << 40, 1000, 80, (64, 1 << 34)),
            (4 << 20, 1, 80, (64, 65536)),
            (0, 1, 0, (16, 65536)),
            (u64::MAX, 1000, 0, (16, 1 << 60)),
        ] {
            let shape = Shape::new(bytes, lanes, columns, 65536);
            assert_eq!((shape.columns, shape.cell_bytes), expected, "{bytes} {lanes} {columns}");
        }
    }

    #[test]
    fn other_lanes_follow_from_the_one_that_decides() {
        let shape = Shape { columns: 16, cell_bytes: 8 };
        let mut picture = Picture::new(run(16, 20), 3, shape);
        picture.add(run(16, 12), 1, Content::Data);
        picture.add(run(28, 8), 2, Content::Unallocated);
        let cell = |content, bytes, hidden_bytes| {
            let mut shares = Shares::default();
            shares.add(content, bytes);
            Cell { shares, hidden_bytes }
        };
        let nothing = |bytes| cell(Content::Unallocated, bytes, 0);
        let lanes: Vec<Vec<Cell>> = (0..3).map(|lane| picture.lane(lane).collect()).collect();
        assert_eq!(lanes[0], [nothing(8), nothing(8), nothing(4)]);
        let mut half = cell(Content::Data, 4, 0);
        half.shares.add(Content::Unallocated, 4);
        assert_eq!(lanes[1], [cell(Content::Data, 8, 0), half, nothing(4)]);
        let hidden = |bytes| cell(Content::Data, 0, bytes);
        assert_eq!(lanes[2], [hidden(8), cell(Content::Unallocated, 4, 4), nothing(4)]);
        assert_eq!(picture.decided(1).bytes(Content::Data), 12);
    }

    #[test]
    fn runs_at_the_end_of_all_offsets_are_drawn() {
        let range = run(0, u64::MAX);
        let mut picture = Picture::new(range, 1, Shape::new(u64::MAX, 1, 80, 512));
        picture.add(range, 0, Content::Zero);
        assert_eq!(picture.decided(0).total(), u64::MAX);
    }
}
