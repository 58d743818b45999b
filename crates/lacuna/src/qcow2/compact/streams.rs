//! Packing compressed streams anew.
//!
//! The true length of a stream is not stored, only its last sector, in which the next one may begin. Where
//! that is so, the next one's start is its end; else the rest of the sector goes with it.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::bits::Bits;
use super::moves::Move;
use crate::qcow2::format::{CompressedRun, Geometry, L2Entry};
use crate::units::HostOffset;

const SECTOR: u64 = 512;
/// Ends of runs with room that are remembered.
const GAPS: usize = 32;

/// Room behind a stream that was packed.
#[derive(Clone, Copy, Debug)]
struct Gap {
    at: u64,
    end: u64,
}

/// Gives streams places in free clusters.
pub(super) struct Packer {
    geometry: Geometry,
    /// Runs of free clusters, the longest last.
    runs: Vec<(u64, u64)>,
    gaps: Vec<Gap>,
    /// Counts of clusters that got a stream.
    counts: HashMap<u64, u64, RandomState>,
}

impl Packer {
    pub(super) fn new(geometry: Geometry, holes: &Bits) -> Self {
        let mut runs = holes.runs();
        runs.sort_by_key(|(first, clusters)| (*clusters, std::cmp::Reverse(*first)));
        Self { geometry, runs, gaps: Vec::new(), counts: HashMap::default() }
    }

    /// Gives every stream among `moves` a place, as far as there are places, and takes the clusters
    /// out of `holes`.
    pub(super) fn pack(&mut self, moves: &mut [Move], holes: &mut Bits) {
        let mut streams: Vec<&mut Move> = moves.iter_mut().filter(|it| it.is_stream()).collect();
        streams.sort_by_key(|stream| (stream.from.start, stream.from.len));
        shorten(&mut streams);
        for stream in streams {
            let Some(start) = self.place(stream.len, stream.weight) else { continue };
            let run = CompressedRun::new(HostOffset(start), stream.len);
            stream.to = Some(run.range());
            stream.new = L2Entry::compressed(run, &self.geometry).word;
            for cluster in self.geometry.host_clusters(run.range()) {
                *self.counts.entry(cluster).or_insert(0) += stream.weight;
                holes.remove(cluster);
            }
        }
    }

    fn place(&mut self, len: u64, weight: u64) -> Option<u64> {
        for index in 0..self.gaps.len() {
            if let Some(start) = self.fit(self.gaps[index], len, weight) {
                self.gaps[index].at = start + len;
                return Some(start);
            }
        }
        let bytes = self.geometry.cluster_bytes();
        let (first, clusters) = self.runs.pop()?;
        let gap = Gap { at: first * bytes, end: (first + clusters) * bytes };
        let start = self.fit(gap, len, weight)?;
        if self.gaps.len() == GAPS {
            let least =
                (0..GAPS).min_by_key(|index| self.gaps[*index].end - self.gaps[*index].at)?;
            self.gaps.swap_remove(least);
        }
        self.gaps.push(Gap { at: start + len, ..gap });
        Some(start)
    }

    /// Returns where in a gap a stream can begin so that no count overflows.
    fn fit(&self, gap: Gap, len: u64, weight: u64) -> Option<u64> {
        let bytes = self.geometry.cluster_bytes();
        let count = |cluster| self.counts.get(&cluster).copied().unwrap_or(0);
        let has_room = count(gap.at / bytes) + weight <= self.geometry.refcount_max();
        let start = if has_room { gap.at } else { gap.at.next_multiple_of(bytes) };
        let end = (start + len).next_multiple_of(SECTOR);
        let is_inside = end <= gap.end && start < CompressedRun::offset_limit(&self.geometry);
        is_inside.then_some(start)
    }
}

/// Cuts each stream where the next one begins in its last sector.
fn shorten(streams: &mut [&mut Move]) {
    let starts: Vec<u64> = streams.iter().map(|stream| stream.from.start.0).collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        let (start, end) = (stream.from.start.0, stream.from.end().0);
        let next = starts[index..].iter().copied().find(|next| *next > start);
        if let Some(next) = next.filter(|next| end - SECTOR <= *next && *next < end) {
            stream.len = next - start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::format::{EntryWidth, Version};

    fn geometry(bits: u32, order: u32) -> Geometry {
        Geometry::new(Version::V3, bits, order, EntryWidth::Standard).unwrap()
    }

    fn stream(start: u64, len: u64, weight: u64) -> Move {
        let run = CompressedRun::new(HostOffset(start), len);
        let from = run.range();
        Move { from, to: None, len: from.len, old: start, new: 0, mask: !0, weight }
    }

    fn holes(clusters: impl IntoIterator<Item = u64>) -> Bits {
        let mut bits = Bits::new(100);
        clusters.into_iter().for_each(|cluster| bits.insert(cluster));
        bits
    }

    fn packed(geometry: Geometry, moves: &mut [Move], holes: &mut Bits) -> Vec<Option<(u64, u64)>> {
        Packer::new(geometry, holes).pack(moves, holes);
        moves.iter().map(|it| it.to.map(|to| (to.start.0, it.len))).collect()
    }

    #[test]
    fn streams_that_touch_stay_as_short_as_they_are() {
        let mut holes = holes([5, 6]);
        let start = 90 * 4096;
        let mut moves = [stream(start, 700, 1), stream(start + 700, 2000, 1)];
        let found = packed(geometry(12, 4), &mut moves, &mut holes);
        // The last one ends somewhere in its sector.
        let last = 3072 - 700;
        assert_eq!(found, [Some((5 * 4096, 700)), Some((5 * 4096 + 700, last))]);
        assert_eq!(holes.iter().collect::<Vec<_>>(), [6]);
    }

    #[test]
    fn a_count_takes_no_more_than_fits() {
        let mut one_each = holes([5, 6, 8]);
        let mut moves: Vec<Move> = (0..4).map(|at| stream((90 + at) * 4096, 512, 1)).collect();
        let found = packed(geometry(12, 0), &mut moves, &mut one_each);
        let starts: Vec<_> = found.iter().map(|it| it.map(|(start, _)| start / 4096)).collect();
        assert_eq!(starts, [Some(5), Some(6), Some(8), None]);
        assert_eq!(one_each.next(0), None);
    }

    #[test]
    fn a_stream_that_does_not_fit_behind_another_leaves_room_for_one_that_does() {
        let mut holes = holes([5, 7]);
        let sizes = [3000, 3000, 1000];
        let mut moves: Vec<Move> =
            (0..).zip(sizes).map(|(at, len)| stream((90 + at) * 4096, len, 1)).collect();
        let found = packed(geometry(12, 4), &mut moves, &mut holes);
        assert_eq!(found[2].unwrap().0 / 4096, 5);
        assert_eq!(found[1].unwrap().0 / 4096, 7);
    }

    #[test]
    fn a_stream_crosses_into_the_next_free_cluster() {
        let mut holes = holes([3, 5, 6, 7]);
        let mut moves: Vec<Move> = (0..4).map(|at| stream((90 + at) * 4096, 3000, 1)).collect();
        let found = packed(geometry(12, 4), &mut moves, &mut holes);
        assert_eq!(found[3].unwrap().0 + 3072, 5 * 4096 + 4 * 3072);
        assert_eq!(holes.iter().collect::<Vec<_>>(), [3]);
    }
}
