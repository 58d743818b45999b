//! What an L2 entry says of the guest bytes it covers (B.4, B.6, B.7).

use super::format::{
    CompressedRun, EntryWidth, Geometry, L2Entry, SubclusterBitmap, SubclusterState, Version,
};
use super::same_entries::SameEntries;
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::{Error, Result};

/// No cluster lies at or beyond this offset: entries have no more bits for it.
const HOST_END: u64 = 1 << 56;

/// A run of guest bytes with one mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) mapping: Mapping,
    pub(super) len: u64,
}

/// Whether host bytes may be overwritten where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnWrite {
    /// Something else references the cluster too.
    CopyFirst,
    InPlace,
}

impl OnWrite {
    pub(super) const fn of(entry: L2Entry) -> Self {
        if entry.is_copied() { Self::InPlace } else { Self::CopyFirst }
    }
}

/// Guest bytes as far as this image alone knows them.
///
/// `Unallocated` is not zero: the backing layer decides, and only where there is none it is zeros.
/// Offsets are those of the first byte asked about, not of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    Compressed(CompressedRun),
    Data { host: HostOffset, on_write: OnWrite },
    Unallocated { reserved: Option<HostOffset> },
    Zero { reserved: Option<HostOffset> },
}

impl Mapping {
    /// Says whether `next`, `distance` bytes on, belongs to the same run.
    pub(super) fn is_continued_by(self, next: Self, distance: u64) -> bool {
        let moved = |host: Option<HostOffset>| host.map(|host| host + distance);
        match (self, next) {
            (Self::Data { host, on_write }, Self::Data { host: there, on_write: then }) => {
                host + distance == there && on_write == then
            }
            (Self::Unallocated { reserved }, Self::Unallocated { reserved: there })
            | (Self::Zero { reserved }, Self::Zero { reserved: there }) => moved(reserved) == there,
            _ => false,
        }
    }

    /// Returns the host bytes behind the range: its data or what is reserved for it.
    pub(super) const fn host(self) -> Option<HostOffset> {
        match self {
            Self::Compressed(_) => None,
            Self::Data { host, .. } => Some(host),
            Self::Unallocated { reserved } | Self::Zero { reserved } => reserved,
        }
    }
}

/// Where guest data lies: in the image file, or in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataPlace {
    External,
    ImageFile,
}

/// Decodes entries of one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decoder {
    pub(super) geometry: Geometry,
    pub(super) place: DataPlace,
    /// The cluster that shares its zeros. An entry that may be written in place never means it.
    pub(super) zero_cluster: Option<HostOffset>,
}

impl Decoder {
    /// Returns the host cluster of an entry. In an external data file, offset 0 with the copied
    /// flag is a cluster as any other (B.4).
    pub(super) fn host(&self, entry: L2Entry) -> Option<HostOffset> {
        match self.place {
            DataPlace::External if !entry.is_compressed() && entry.is_copied() => {
                entry.host().or(Some(HostOffset(0)))
            }
            _ => entry.host(),
        }
    }

    /// Says whether the entry is one of those that share the cluster of zeros.
    fn shares_zeros(&self, entry: L2Entry) -> bool {
        self.zero_cluster.is_some_and(|zeros| entry == shared_entry(zeros))
    }

    /// Refuses an entry whose cluster starts within another: freeing it would free that one.
    pub(super) fn check_alignment(&self, entry: L2Entry, guest: GuestOffset) -> Result<()> {
        match self.host(entry) {
            Some(host) if !self.geometry.is_aligned(host.0) => {
                Err(corrupt(guest, entry, "points to no multiple of the cluster size"))
            }
            _ => Ok(()),
        }
    }

    /// Returns what the entry says of the byte at `guest`, and of how many bytes of the cluster
    /// from there on.
    pub(super) fn decode(&self, entry: L2Entry, guest: GuestOffset) -> Result<(Mapping, u64)> {
        let within = self.geometry.within_cluster(guest.0);
        let rest = self.geometry.cluster_bytes() - within;
        if let Some(run) = entry.compressed_run(&self.geometry) {
            if self.place == DataPlace::External {
                return Err(corrupt(guest, entry, "is compressed, but data lies in a data file"));
            }
            return Ok((Mapping::Compressed(run), rest));
        }
        self.check_alignment(entry, guest)?;
        let host = self.host(entry).map(|host| host + within);
        match self.geometry.has_subclusters() {
            true => self.decode_subcluster(entry, guest, host),
            false => Ok((self.decode_standard(entry, guest, host)?, rest)),
        }
    }

    /// Returns the run at the start of `range` as far as `entries` tell: those of a table from the
    /// entry of `range.start` on.
    pub(super) fn run(&self, entries: &[u8], range: GuestRange) -> Result<Run> {
        let width = self.geometry.entry_width();
        let first = L2Entry::at_start(entries, width);
        let (mapping, mut len) = self.decode(first, range.start)?;
        let later = &entries[width.bytes() as usize..];
        let reaches_end = |len: u64| self.geometry.is_aligned(range.start.0 + len);
        if self.is_alike_throughout(first) && reaches_end(len) {
            let ahead = self.same_ahead(later, first, mapping, range.len);
            len += ahead * self.geometry.cluster_bytes();
            return Ok(Run { mapping, len: len.min(range.len) });
        }
        for entry in later.chunks_exact(width.bytes() as usize) {
            if len >= range.len || !reaches_end(len) {
                break;
            }
            let entry = L2Entry::at_start(entry, width);
            match self.decode(entry, range.start + len) {
                Ok((next, more)) if mapping.is_continued_by(next, len) => len += more,
                _ => break,
            }
        }
        Ok(Run { mapping, len: len.min(range.len) })
    }

    /// Says whether the entry means the same for every byte of its cluster, so that equal entries
    /// can go on with its run.
    fn is_alike_throughout(&self, entry: L2Entry) -> bool {
        let uniform = [SubclusterBitmap(0), SubclusterBitmap::ALL_DATA, SubclusterBitmap::ALL_ZERO];
        !entry.is_compressed() && uniform.contains(&entry.subclusters)
    }

    /// Counts the entries at the start of `later` that say the same as `first` for one cluster
    /// further on each: equal words, but for the host offset.
    fn same_ahead(&self, later: &[u8], first: L2Entry, mapping: Mapping, len: u64) -> u64 {
        let cluster_bytes = self.geometry.cluster_bytes();
        let (step, room) = match mapping.host() {
            Some(host) => (cluster_bytes, HOST_END.saturating_sub(host.0 + 1) / cluster_bytes),
            None => (0, u64::MAX),
        };
        let at_most = len.div_ceil(cluster_bytes).min(room);
        match self.geometry.entry_width() {
            EntryWidth::Standard => SameEntries { first: [first.word], step }.count(later, at_most),
            EntryWidth::Extended => {
                let first = [first.word, first.subclusters.0];
                SameEntries { first, step }.count(later, at_most)
            }
        }
    }

    fn decode_standard(
        &self,
        entry: L2Entry,
        guest: GuestOffset,
        host: Option<HostOffset>,
    ) -> Result<Mapping> {
        if entry.has_zero_flag() {
            return match self.geometry.version() {
                Version::V2 => Err(corrupt(guest, entry, "has the zero flag of version 3")),
                Version::V3 => Ok(Mapping::Zero { reserved: host }),
            };
        }
        Ok(match host {
            Some(_) if self.shares_zeros(entry) => Mapping::Zero { reserved: None },
            Some(host) => Mapping::Data { host, on_write: OnWrite::of(entry) },
            None => Mapping::Unallocated { reserved: None },
        })
    }

    fn decode_subcluster(
        &self,
        entry: L2Entry,
        guest: GuestOffset,
        host: Option<HostOffset>,
    ) -> Result<(Mapping, u64)> {
        let subcluster = self.geometry.subcluster_bytes();
        let within = self.geometry.within_cluster(guest.0);
        let (state, end) = entry.subclusters.run((within / subcluster) as u32);
        let mapping = match (state, host) {
            (SubclusterState::Data, Some(host)) => {
                Mapping::Data { host, on_write: OnWrite::of(entry) }
            }
            (SubclusterState::Unallocated, reserved) => Mapping::Unallocated { reserved },
            (SubclusterState::Zero, reserved) => Mapping::Zero { reserved },
            (SubclusterState::Data | SubclusterState::Invalid, _) => {
                return Err(corrupt(guest, entry, "has an impossible subcluster bitmap"));
            }
        };
        Ok((mapping, u64::from(end) * subcluster - within))
    }
}

/// Returns the entry of a cluster that shares the zeros at `zeros`: never to be written in place.
pub(super) fn shared_entry(zeros: HostOffset) -> L2Entry {
    L2Entry::standard(zeros).with_copied(false)
}

fn corrupt(guest: GuestOffset, entry: L2Entry, what: &str) -> Error {
    Error::corrupt(format!(
        "L2 entry {:#018x} (subclusters {:#018x}) of guest offset {guest} {what}",
        entry.word, entry.subclusters.0
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPIED: u64 = 1 << 63;
    const CLUSTER: u64 = 65536;

    /// As [`Decoder::run`], cluster by cluster.
    fn slow_run(decoder: &Decoder, entries: &[L2Entry], range: GuestRange) -> Run {
        let entry = |len: u64| {
            let index = (decoder.geometry.within_cluster(range.start.0) + len) >> 16;
            entries.get(index as usize).copied()
        };
        let (mapping, mut len) = decoder.decode(entry(0).unwrap(), range.start).unwrap();
        while len < range.len && decoder.geometry.is_aligned(range.start.0 + len) {
            let next = entry(len).map(|entry| decoder.decode(entry, range.start + len));
            match next {
                Some(Ok((next, more))) if mapping.is_continued_by(next, len) => len += more,
                _ => break,
            }
        }
        Run { mapping, len: len.min(range.len) }
    }

    /// Compares over `len` entries from `first` on and a few others behind them.
    fn compare(width: EntryWidth, first: L2Entry, len: u64) {
        let geometry = Geometry::new(Version::V3, 16, 4, width).unwrap();
        let decoder = Decoder { geometry, place: DataPlace::ImageFile, zero_cluster: None };
        let step = if first.word & !(COPIED | 1) == 0 { 0 } else { CLUSTER };
        let at = |at| L2Entry { word: first.word + at * step, ..first };
        let others = [CLUSTER * 99, 0, 1, 0].map(|word| L2Entry { word, ..L2Entry::UNALLOCATED });
        let entries: Vec<L2Entry> = (0..len).map(at).chain(others).collect();
        let words = entries.iter().flat_map(|entry| [entry.word, entry.subclusters.0]);
        let words =
            words.enumerate().filter(|(at, _)| at % 2 == 0 || width == EntryWidth::Extended);
        let bytes: Vec<u8> = words.flat_map(|(_, word)| word.to_be_bytes()).collect();
        for (start, wanted) in [(0, 99 * CLUSTER), (512, 3 * CLUSTER), (0, 100), (9, CLUSTER)] {
            let range = GuestRange::new(GuestOffset(start), wanted);
            let run = decoder.run(&bytes, range).unwrap();
            let slow = slow_run(&decoder, &entries, range);
            let text = format!("{first:x?} {len} {start} {wanted}");
            assert_eq!((run.mapping, run.len), (slow.mapping, slow.len), "{text}");
        }
    }

    #[test]
    fn a_run_over_many_entries_is_what_each_of_them_says() {
        let last = (1 << 56) - CLUSTER;
        for len in [1, 7, 8, 9, 16, 17, 30] {
            for word in
                [0, 1, COPIED | CLUSTER, CLUSTER, COPIED | CLUSTER | 1, COPIED | last, 1 << 62]
            {
                let first = L2Entry { word, ..L2Entry::UNALLOCATED };
                compare(EntryWidth::Standard, first, len);
            }
            for word in [COPIED | CLUSTER, CLUSTER, COPIED | last, 1 << 62] {
                for states in [0, 0xffff_ffff, 0xffff_ffff << 32, 0xffff_fffe, 0xfffe << 32 | 1] {
                    let subclusters = SubclusterBitmap(states);
                    compare(EntryWidth::Extended, L2Entry { word, subclusters }, len);
                }
            }
            for states in [0, 0xffff_ffff << 32, 0xff << 32] {
                let subclusters = SubclusterBitmap(states);
                compare(EntryWidth::Extended, L2Entry { word: 0, subclusters }, len);
            }
        }
    }
}
