//! Where the disk may have changed since bitmaps were stored: by this they survive a crash.
//!
//! What changes is marked in memory, and storage learns of it later. An *intent* is a bit for a region
//! of the disk, in a header extension of ours, that is durable before the first change in its region.
//! After a crash a bitmap names what is stored, and all regions with an intent
//! (`docs/design/bitmaps.md`).
//!
//! * Always: intents count only where the image has their autoclear bit, which every writer takes off
//!   that does not know them.
//! * Always bounded: after every few writes of intents, the regions that one write covers double, so
//!   that a disk is covered after some hundred writes, whatever is asked of it.
//! * Always: the last region reaches to the end of the disk, however that grows.

use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};

/// Bytes in front of the bits: the binary logarithm of a region's bytes, then zeros.
const HEAD_BYTES: usize = 8;
/// Regions are not smaller than this.
const LEAST_REGION_BITS: u32 = 20;
/// What storage does not tear, and what is written at a time.
const SECTOR_BYTES: usize = 512;
/// After so many writes the regions that the next one covers double.
const WRITES_TO_DOUBLE: u32 = 8;
/// Bitmaps are stored at a flush after so many changes, at least, ...
const LEAST_CHANGES: u64 = 4096;
/// ... and after so many for each write of intents, which would all be needed again.
const CHANGES_PER_WRITE: u64 = 2048;

/// The intents of an open image.
#[derive(Debug, Default)]
pub(super) struct Intents {
    /// Where the bits lie; nothing where there are none, so that nobody waits for them.
    place: Option<HostRange>,
    region_bits: u32,
    /// Durable ones.
    bits: Vec<u8>,
    /// Ranges that somebody waits to change.
    wanted: Vec<GuestRange>,
    /// Storage may have fewer bits than it had.
    pub(super) is_clearing: bool,
    /// Writes and changes since the bitmaps were stored.
    writes: u32,
    changes: u64,
}

/// What is to be written next.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) pieces: Vec<(HostOffset, Vec<u8>)>,
    bits: Vec<u8>,
}

/// Returns an extension without an intent, for a disk of this size.
pub(super) fn empty(size_bytes: u64, cluster_bytes: u64) -> Vec<u8> {
    let bits = room_bytes(cluster_bytes) * 8;
    let mut region_bits = LEAST_REGION_BITS;
    while size_bytes.div_ceil(1 << region_bits) > bits as u64 {
        region_bits += 1;
    }
    let mut data = vec![0; HEAD_BYTES + bits / 8];
    data[0] = region_bits as u8;
    data
}

/// Returns how many bytes of bits fit into the first cluster beside all else, twice over: while a
/// header is replaced, the old and the new one are there.
const fn room_bytes(cluster_bytes: u64) -> usize {
    match cluster_bytes {
        ..4096 => 8,
        4096..0x4000 => 256,
        0x4000..0x1_0000 => 1024,
        _ => 4096,
    }
}

impl Intents {
    /// Takes up what an image has.
    pub(super) fn new(place: HostRange, data: &[u8]) -> Option<Self> {
        let (head, bits) = data.split_at_checked(HEAD_BYTES)?;
        let region_bits = u32::from(head[0]);
        let is_sound = (LEAST_REGION_BITS..=62).contains(&region_bits)
            && !bits.is_empty()
            && head[1..].iter().all(|byte| *byte == 0)
            && place.len == data.len() as u64;
        let (place, bits) = (Some(place), bits.to_vec());
        is_sound.then_some(Self { place, region_bits, bits, ..Self::default() })
    }

    /// Says whether there are any to be kept.
    pub(super) const fn are_kept(&self) -> bool {
        self.place.is_some()
    }

    /// Says whether the regions fit a disk: neither too coarse nor too few.
    pub(super) fn fit(&self, size_bytes: u64, cluster_bytes: u64) -> bool {
        let right = empty(size_bytes, cluster_bytes);
        self.place.is_some()
            && self.region_bits == u32::from(right[0])
            && self.bits.len() + HEAD_BYTES == right.len()
    }

    fn index(&self, offset: u64) -> u64 {
        (offset >> self.region_bits).min(self.bits.len() as u64 * 8 - 1)
    }

    fn indices(&self, range: GuestRange) -> std::ops::RangeInclusive<u64> {
        self.index(range.start.0)..=self.index(range.end().0 - 1)
    }

    /// Says whether a range may change; if not, it is asked for.
    pub(super) fn cover(&mut self, range: GuestRange) -> bool {
        if self.place.is_none() || range.is_empty() {
            return true;
        }
        let covered = self.has_all(self.indices(range));
        match covered {
            true => self.changes += 1,
            false => self.wanted.push(range),
        }
        covered
    }

    fn has_all(&self, indices: std::ops::RangeInclusive<u64>) -> bool {
        indices.into_iter().all(|index| has_bit(&self.bits, index))
    }

    /// Returns the first range from `offset` on, up to `end`, that has an intent.
    pub(super) fn first_in(&self, offset: u64, end: u64) -> Option<GuestRange> {
        if self.place.is_none() || offset >= end {
            return None;
        }
        let last = self.index(end - 1);
        let found = (self.index(offset)..=last).find(|index| has_bit(&self.bits, *index))?;
        let behind = (found..=last).find(|index| !has_bit(&self.bits, *index));
        let start = (found << self.region_bits).max(offset);
        let end = behind.map_or(end, |index| index << self.region_bits).min(end);
        Some(GuestRange::new(GuestOffset(start), end - start))
    }

    /// Plans what is asked for, and as much around it as is due.
    pub(super) fn batch(&mut self) -> Batch {
        let mut bits = self.bits.clone();
        let all = bits.len() as u64 * 8;
        let group = 1 << (self.writes / WRITES_TO_DOUBLE).min(all.ilog2());
        for range in std::mem::take(&mut self.wanted) {
            let indices = self.indices(range);
            let first = indices.start() / group * group;
            let last = (indices.end() / group * group + group).min(all);
            (first..last).for_each(|index| set_bit(&mut bits, index));
        }
        let pieces = self.differing(&bits);
        Batch { pieces, bits }
    }

    /// A batch is durable.
    pub(super) fn written(&mut self, batch: Batch) {
        self.bits = batch.bits;
        self.writes += 1;
    }

    /// Takes all intents back; the pieces make storage forget them.
    pub(super) fn clear(&mut self) -> Vec<(HostOffset, Vec<u8>)> {
        let none = vec![0; self.bits.len()];
        let pieces = self.differing(&none);
        self.is_clearing = !pieces.is_empty();
        (self.bits, self.writes, self.changes) = (none, 0, 0);
        pieces
    }

    /// Says whether it is time to store the bitmaps.
    pub(super) fn are_due(&self) -> bool {
        let least = LEAST_CHANGES.max(CHANGES_PER_WRITE * u64::from(self.writes));
        self.place.is_some() && self.writes > 0 && self.changes >= least
    }

    /// Returns the parts that differ from what storage has, a sector at most each.
    fn differing(&self, bits: &[u8]) -> Vec<(HostOffset, Vec<u8>)> {
        let Some(place) = self.place else { return Vec::new() };
        let parts = self.bits.chunks(SECTOR_BYTES).zip(bits.chunks(SECTOR_BYTES)).enumerate();
        let differing = parts.filter(|(_, (old, new))| old != new);
        let at = |part: usize| place.start + (HEAD_BYTES + part * SECTOR_BYTES) as u64;
        differing.map(|(part, (_, new))| (at(part), new.to_vec())).collect()
    }
}

fn has_bit(bits: &[u8], index: u64) -> bool {
    bits[(index / 8) as usize] >> (index % 8) & 1 == 1
}

fn set_bit(bits: &mut [u8], index: u64) {
    bits[(index / 8) as usize] |= 1 << (index % 8);
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn intents(size: u64, cluster: u64) -> Intents {
        let data = empty(size, cluster);
        Intents::new(HostRange::new(HostOffset(616), data.len() as u64), &data).unwrap()
    }

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    #[test]
    fn regions_cover_the_disk_and_what_it_may_become() {
        for (size, cluster, region) in
            [(GIB, 1 << 16, 1 << 20), (1 << 40, 1 << 16, 1 << 25), (GIB, 512, 1 << 24)]
        {
            let mut intents = intents(size, cluster);
            assert_eq!(1_u64 << intents.region_bits, region);
            assert!(intents.fit(size, cluster) && !intents.fit(size << 20, cluster));
            assert!(!intents.cover(range(size - 1, 1)) && intents.cover(range(0, 0)));
            let batch = intents.batch();
            assert_eq!(batch.pieces.len(), 1);
            intents.written(batch);
            assert!(intents.cover(range(size - region, region)));
            assert!(!intents.cover(range(0, 1)));
        }
    }

    #[test]
    fn a_disk_is_covered_after_some_hundred_writes_whatever_is_asked() {
        let mut intents = intents(1 << 40, 1 << 16);
        let (mut at, mut writes) = (0_u64, 0);
        while intents.first_in(0, 1 << 40) != Some(range(0, 1 << 40)) {
            at = at.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            if !intents.cover(range(at >> 24, 1)) {
                let batch = intents.batch();
                intents.written(batch);
                writes += 1;
            }
        }
        assert!(writes < 160, "{writes}");
        assert_eq!(intents.clear().len(), 8);
        assert_eq!(intents.first_in(0, 1 << 40), None);
    }

    #[test]
    fn what_is_not_of_this_form_is_not_taken_up() {
        let place = |data: &[u8]| HostRange::new(HostOffset(616), data.len() as u64);
        for wrong in
            [&[][..], &[20; 16], &[20, 0, 0, 0, 0, 0, 0, 0], &[63, 0, 0, 0, 0, 0, 0, 0, 1], &[9; 9]]
        {
            assert!(Intents::new(place(wrong), wrong).is_none());
        }
    }
}
