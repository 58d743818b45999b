//! A disk's map as a picture of characters, and the totals beside it. Pure.

use lacuna::block::Extent;

/// Cells in a line of the picture.
const WIDTH: u64 = 64;
/// Lines of the picture.
const LINES: u64 = 3;

/// How much of a range is what; the three add up to its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shares {
    /// May hold anything, takes space.
    pub(super) data_bytes: u64,
    /// The image itself says that it reads as zeros.
    pub(super) zero_bytes: u64,
    /// The image says nothing.
    pub(super) unallocated_bytes: u64,
}

impl Shares {
    fn add(&mut self, extent: &Extent, len: u64) {
        let status = extent.status;
        let share = match (status.depth.0, status.reads_zero) {
            (0, _) => &mut self.unallocated_bytes,
            (_, true) => &mut self.zero_bytes,
            (_, false) => &mut self.data_bytes,
        };
        *share += len;
    }
}

/// The characters of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Palette {
    /// Works on every terminal.
    Ascii,
    /// Block elements.
    Unicode,
}

impl Palette {
    /// Chooses by the locale, the first of LC_ALL, LC_CTYPE and LANG that says anything.
    pub(super) fn of_locale(locale: &str) -> Self {
        let locale = locale.to_ascii_lowercase();
        if locale.contains("utf-8") || locale.contains("utf8") {
            Self::Unicode
        } else {
            Self::Ascii
        }
    }

    /// Explains the characters.
    pub(super) fn legend(self) -> &'static str {
        match self {
            Self::Ascii => "# data   + partly   - little   0 known zeros   . nothing",
            Self::Unicode => "█ data   ▓ ▒ ░ partly   0 known zeros   · nothing",
        }
    }

    fn cell(self, shares: Shares) -> char {
        let all = shares.data_bytes + shares.zero_bytes + shares.unallocated_bytes;
        let quarters = (shares.data_bytes * 4).div_ceil(all.max(1));
        match (self, quarters) {
            (_, 0) if shares.zero_bytes > shares.unallocated_bytes => '0',
            (Self::Ascii, 0) => '.',
            (Self::Ascii, 1) => '-',
            (Self::Ascii, 2 | 3) => '+',
            (Self::Ascii, _) => '#',
            (Self::Unicode, 0) => '·',
            (Self::Unicode, 1) => '░',
            (Self::Unicode, 2) => '▒',
            (Self::Unicode, 3) => '▓',
            (Self::Unicode, _) => '█',
        }
    }
}

/// Adds up what all extents of a disk are.
pub(super) fn totals(extents: &[Extent]) -> Shares {
    let mut totals = Shares::default();
    for extent in extents {
        totals.add(extent, extent.range.len);
    }
    totals
}

/// Draws the extents of a disk, which cover it in order, as lines of equal length.
pub(super) fn lines(extents: &[Extent], size_bytes: u64, palette: Palette) -> Vec<String> {
    let cells = cells(extents, size_bytes, WIDTH * LINES);
    let line = |cells: &[Shares]| cells.iter().map(|&shares| palette.cell(shares)).collect();
    cells.chunks(WIDTH as usize).map(line).collect()
}

fn cells(extents: &[Extent], size_bytes: u64, count: u64) -> Vec<Shares> {
    let cell_bytes = size_bytes.div_ceil(count).max(1);
    let mut cells = vec![Shares::default(); size_bytes.div_ceil(cell_bytes) as usize];
    for extent in extents {
        let mut at = extent.range.start.0;
        while at < extent.range.end().0 {
            let index = at / cell_bytes;
            let end = ((index + 1) * cell_bytes).min(extent.range.end().0);
            if let Some(cell) = cells.get_mut(index as usize) {
                cell.add(extent, end - at);
            }
            at = end;
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use lacuna::block::{AllocationDepth, ExtentStatus};
    use lacuna::units::{GuestOffset, GuestRange};

    use super::*;

    fn extent(start: u64, len: u64, depth: u32, reads_zero: bool) -> Extent {
        let status =
            ExtentStatus { depth: AllocationDepth(depth), reads_zero, ..ExtentStatus::UNALLOCATED };
        Extent { range: GuestRange::new(GuestOffset(start), len), status }
    }

    #[test]
    fn cells_show_how_much_is_data() {
        let size_bytes = WIDTH * LINES * 8;
        let extents =
            [extent(0, 8, 1, false), extent(8, 10, 1, true), extent(18, size_bytes - 18, 0, true)];
        let lines = lines(&extents, size_bytes, Palette::Ascii);
        assert_eq!(lines.len() as u64, LINES);
        assert!(lines[0].starts_with("#0.."), "{lines:?}");
        assert!(lines.iter().all(|line| line.chars().count() as u64 == WIDTH));
    }

    #[test]
    fn any_data_shows() {
        let size_bytes = WIDTH * LINES * 100;
        let extents = [extent(0, 1, 1, false), extent(1, size_bytes - 1, 0, true)];
        assert!(lines(&extents, size_bytes, Palette::Unicode)[0].starts_with("░·"));
    }

    #[test]
    fn totals_add_up() {
        let extents = [extent(0, 5, 1, false), extent(5, 7, 1, true), extent(12, 9, 0, true)];
        let expected = Shares { data_bytes: 5, zero_bytes: 7, unallocated_bytes: 9 };
        assert_eq!(totals(&extents), expected);
    }

    #[test]
    fn disks_smaller_than_the_picture_are_drawn_as_they_are() {
        assert_eq!(lines(&[extent(0, 3, 1, false)], 3, Palette::Ascii), ["###"]);
        assert_eq!(lines(&[], 0, Palette::Ascii), [""; 0]);
    }

    #[test]
    fn locale_decides_the_characters() {
        assert_eq!(Palette::of_locale("de_DE.UTF-8"), Palette::Unicode);
        assert_eq!(Palette::of_locale("C"), Palette::Ascii);
    }
}
