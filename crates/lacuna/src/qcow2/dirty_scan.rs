//! From the table and the bits of a dirty bitmap to runs of guest bytes (B.10). Pure.
//!
//! * Always in guest order, without gaps; neighbours of one state are one run.
//! * Never: an entry that stands for a whole cluster of equal bits is turned into bits.

use std::ops::Range;

use super::dirty::DirtyExtent;
use super::format::{BitmapCluster, BitmapTableEntry};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Bytes of bits that are looked at in one go.
const PIECE_BYTES: u64 = 16 << 10;

/// What the table says of the bits at the start of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stretch {
    /// The bits lie in storage.
    Data(Part),
    /// All are clear there, up to the end of this many clusters of bits; some may have been set in
    /// memory.
    Clear { chunks: u64 },
    /// All are set, up to the end of this many clusters of bits.
    Set { chunks: u64 },
}

/// A part of one cluster of bits: whole bytes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Index of the cluster of bits.
    pub(super) chunk: u64,
    /// The cluster, where there is one.
    pub(super) cluster: Option<HostOffset>,
    /// The first byte within it, and how many.
    pub(super) from: u64,
    pub(super) len: u64,
}

/// Looks up the bits at the start of a range that is not empty. Past the end of the table all are
/// clear: such a table is not used.
pub(super) fn stretch(table: &[BitmapTableEntry], chunk_bits: u64, bits: &Range<u64>) -> Stretch {
    let chunk = bits.start / chunk_bits;
    let rest = table.get(chunk as usize..).unwrap_or_default();
    let alike = |cluster| rest.iter().take_while(|entry| entry.cluster() == cluster).count() as u64;
    match rest.first().map(|entry| entry.cluster()) {
        Some(BitmapCluster::Data(offset)) => {
            Stretch::Data(Part { cluster: Some(offset), ..part(chunk_bits, bits) })
        }
        Some(BitmapCluster::AllOnes) => Stretch::Set { chunks: alike(BitmapCluster::AllOnes) },
        Some(BitmapCluster::AllZeros) => Stretch::Clear { chunks: alike(BitmapCluster::AllZeros) },
        None => Stretch::Clear { chunks: bits.end.div_ceil(chunk_bits) - chunk },
    }
}

/// Returns the bytes that hold the bits at the start of a range: not past their cluster, and not
/// too many.
pub(super) fn part(chunk_bits: u64, bits: &Range<u64>) -> Part {
    let chunk = bits.start / chunk_bits;
    let first = chunk * chunk_bits;
    let from = (bits.start - first) / 8;
    let end = (bits.end - first).min(chunk_bits).div_ceil(8);
    Part { chunk, cluster: None, from, len: (end - from).min(PIECE_BYTES) }
}

/// The answer to a question about a range, as it grows.
#[derive(Debug)]
pub(super) struct Answer {
    asked: GuestRange,
    granularity_bits: u8,
    at_most: usize,
    extents: Vec<DirtyExtent>,
    /// The bits that nothing was said about yet.
    open: Range<u64>,
}

impl Answer {
    pub(super) fn about(asked: GuestRange, granularity_bits: u8, at_most: usize) -> Self {
        let end = asked.end().0.div_ceil(1 << granularity_bits);
        let open = match asked.is_empty() {
            true => 0..0,
            false => asked.start.0 >> granularity_bits..end,
        };
        Self { asked, granularity_bits, at_most: at_most.max(1), extents: Vec::new(), open }
    }

    /// Returns the bits to go on with; an empty range at the end.
    pub(super) const fn open(&self) -> &Range<u64> {
        &self.open
    }

    /// Says that all bits before `end` are alike.
    pub(super) fn push(&mut self, end: u64, is_dirty: bool) {
        let end = end.min(self.open.end);
        let range = self.clipped(self.open.start, end);
        let is_full = self.extents.len() == self.at_most;
        match self.extents.last_mut() {
            Some(last) if last.is_dirty == is_dirty => last.range.len += range.len,
            _ if is_full => {
                self.open.start = self.open.end;
                return;
            }
            _ => self.extents.push(DirtyExtent { range, is_dirty }),
        }
        self.open.start = end;
    }

    /// Says what the bits of a part are; the first open bit lies in its first byte.
    pub(super) fn push_bits(&mut self, part: Part, chunk_bits: u64, bytes: &[u8]) {
        let first = part.chunk * chunk_bits + part.from * 8;
        let end = self.open.end.min(first + bytes.len() as u64 * 8);
        while self.open.start < end {
            let run = run(bytes, self.open.start - first);
            self.push(end.min(first + run.end), run.is_dirty);
        }
    }

    fn clipped(&self, from: u64, to: u64) -> GuestRange {
        let start = (from << self.granularity_bits).max(self.asked.start.0);
        let end = (to << self.granularity_bits).min(self.asked.end().0);
        GuestRange::new(GuestOffset(start), end - start)
    }

    pub(super) fn finish(self) -> Vec<DirtyExtent> {
        self.extents
    }
}

struct Run {
    end: u64,
    is_dirty: bool,
}

/// Returns the run of equal bits from bit `from` on, lowest bit of a byte first.
fn run(bytes: &[u8], from: u64) -> Run {
    let first = (from / 8) as usize;
    let is_dirty = bytes[first] >> (from % 8) & 1 == 1;
    let same = if is_dirty { 0xff } else { 0 };
    let differing = (bytes[first] ^ same) >> (from % 8);
    if differing != 0 {
        return Run { end: from + u64::from(differing.trailing_zeros()), is_dirty };
    }
    let other = bytes[first + 1..].iter().position(|byte| *byte != same);
    let end = match other.map(|behind| first + 1 + behind) {
        Some(at) => at as u64 * 8 + u64::from((bytes[at] ^ same).trailing_zeros()),
        None => bytes.len() as u64 * 8,
    };
    Run { end, is_dirty }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    fn answer(asked: GuestRange, at_most: usize, bytes: &[u8]) -> Vec<(u64, u64, bool)> {
        let mut answer = Answer::about(asked, 9, at_most);
        while !answer.open().is_empty() {
            let part = part(bytes.len() as u64 * 8, answer.open());
            let from = part.from as usize;
            answer.push_bits(part, bytes.len() as u64 * 8, &bytes[from..from + part.len as usize]);
        }
        let told = answer.finish().into_iter();
        told.map(|it| (it.range.start.0, it.range.len, it.is_dirty)).collect()
    }

    #[test]
    fn every_range_of_random_bits_is_told_as_bit_by_bit() {
        let bytes: Vec<u8> = vec![0, 0xff, 0x81, 0, 0, 0x7e, 0xff, 0xff, 1];
        let is_dirty = |at: u64| bytes[(at / 512 / 8) as usize] >> (at / 512 % 8) & 1 == 1;
        for start in (0..72 * 512).step_by(256) {
            for end in (start + 256..=72 * 512).step_by(768) {
                let told = answer(range(start, end - start), usize::MAX, &bytes);
                let mut at = start;
                for (index, (from, len, dirty)) in told.iter().enumerate() {
                    assert_eq!(*from, at, "{start}..{end}");
                    assert!((*from..from + len).step_by(256).all(|at| is_dirty(at) == *dirty));
                    assert!(index == 0 || told[index - 1].2 != *dirty, "neighbours are joined");
                    at += len;
                }
                assert_eq!(at, end);
                let first: Vec<_> = told.iter().take(2).copied().collect();
                assert_eq!(answer(range(start, end - start), 2, &bytes), first);
            }
        }
    }

    #[test]
    fn no_range_has_no_extent() {
        assert!(answer(range(512, 0), 5, &[0xff]).is_empty());
    }

    #[test]
    fn entries_without_data_are_told_in_one_go() {
        let zeros = [0; 5].map(BitmapTableEntry);
        let ones = [1; 3].map(BitmapTableEntry);
        let data = [BitmapTableEntry(0x30000)];
        let table: Vec<_> = [&zeros[..], &ones[..], &data[..]].concat();
        assert_eq!(stretch(&table, 4096, &(4096..40000)), Stretch::Clear { chunks: 4 });
        assert_eq!(stretch(&table, 4096, &(5 * 4096 + 9..40000)), Stretch::Set { chunks: 3 });
        let there = Part { chunk: 8, cluster: Some(HostOffset(0x30000)), from: 1, len: 2 };
        let bits = 8 * 4096 + 9..8 * 4096 + 20;
        assert_eq!(stretch(&table, 4096, &bits), Stretch::Data(there));
        assert_eq!(stretch(&table, 4096, &(9 * 4096..40000)), Stretch::Clear { chunks: 1 });
    }
}
