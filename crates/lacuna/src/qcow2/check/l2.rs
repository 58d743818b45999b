//! L2 tables: what each entry refers to, and whether it may look like that (B.4, B.5, B.7).

use super::finding::FindingKind;
use super::references::Mark;
use super::survey::Survey;
use super::tables::Uses;
use crate::qcow2::format::{EntryWidth, L2Entry, SubclusterBitmap, Version};
use crate::units::{HostOffset, HostRange};

const COPIED: u64 = 1 << 63;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The table that is being counted.
struct Table {
    at: HostOffset,
    uses: Uses,
    /// Where the next cluster would lie if the data were contiguous; 0 before the first.
    expected: u64,
}

/// What an entry means for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    Compressed,
    /// A host cluster, holding data or reserved.
    Allocated(HostOffset),
    /// No host cluster.
    Nothing,
}

impl Survey {
    /// Says what an entry means, as far as the file is concerned.
    pub(crate) fn meaning(&self, entry: L2Entry) -> Meaning {
        if entry.is_compressed() {
            return Meaning::Compressed;
        }
        match entry.host() {
            Some(host) => Meaning::Allocated(host),
            // In a data file offset 0 is a place like any other; the copied flag tells.
            None if self.has_data_file() && entry.is_copied() => Meaning::Allocated(HostOffset(0)),
            None => Meaning::Nothing,
        }
    }

    /// Counts what a table refers to, as often as the table itself is used.
    pub(super) fn count_table(&mut self, at: HostOffset, bytes: &[u8], uses: Uses) {
        let mut table = Table { at, uses, expected: 0 };
        match self.geometry.entry_width() {
            EntryWidth::Standard => {
                for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                    let word = u64::from_be_bytes(*word);
                    if word != 0 {
                        self.count_word(&mut table, index as u64, word);
                    }
                }
            }
            EntryWidth::Extended => {
                for (index, words) in bytes.as_chunks::<16>().0.iter().enumerate() {
                    let words = u128::from_be_bytes(*words);
                    if words != 0 {
                        let subclusters = SubclusterBitmap(words as u64);
                        let entry = L2Entry { word: (words >> 64) as u64, subclusters };
                        self.count_entry(&mut table, index as u64, entry);
                    }
                }
            }
        }
    }

    /// The common case, made fast: one ordinary cluster inside of the file.
    #[inline]
    fn count_word(&mut self, table: &mut Table, index: u64, word: u64) {
        let offset = word & OFFSET_MASK;
        let cluster = offset >> self.geometry.cluster_bits();
        let is_plain = word & !OFFSET_MASK == COPIED
            && self.geometry.is_aligned(offset)
            && offset != 0
            && offset < self.file_bytes;
        if !is_plain || self.has_data_file() {
            let entry = L2Entry { word, subclusters: SubclusterBitmap(0) };
            self.count_entry(table, index, entry);
            return;
        }
        self.count_fragment(table, offset);
        let mark = if table.uses.active > 0 { Mark::Copied } else { Mark::None };
        self.references.add(cluster, table.uses.total, mark);
    }

    fn count_fragment(&mut self, table: &mut Table, offset: u64) {
        self.report.allocated_clusters += table.uses.active;
        if table.expected != 0 && offset != table.expected {
            self.report.fragmented_clusters += table.uses.active;
        }
        table.expected = offset + self.geometry.cluster_bytes();
    }

    fn count_entry(&mut self, table: &mut Table, index: u64, entry: L2Entry) {
        match self.meaning(entry) {
            Meaning::Compressed => self.count_compressed(table, index, entry),
            Meaning::Allocated(host) => {
                self.judge_bits(table, index, entry);
                self.count_allocated(table, index, entry, host);
            }
            Meaning::Nothing => {
                self.judge_bits(table, index, entry);
                if entry.subclusters.has_data() {
                    let kind = FindingKind::UnallocatedWithSubclusters { table: table.at, index };
                    self.report.record(kind, table.uses.total);
                }
            }
        }
    }

    fn judge_bits(&mut self, table: &Table, index: u64, entry: L2Entry) {
        let (at, times, word) = (table.at, table.uses.total, entry.word);
        if entry.without_zero_flag().has_reserved_bits(&self.geometry) {
            self.report.record(FindingKind::L2Reserved { table: at, index, entry: word }, times);
        }
        let zero_has_meaning =
            self.geometry.version() == Version::V3 && !self.geometry.has_subclusters();
        if entry.has_zero_flag() && !zero_has_meaning {
            let kind = FindingKind::ZeroFlagReserved { table: at, index, entry: word };
            self.report.record(kind, times);
        }
    }

    fn count_allocated(&mut self, table: &mut Table, index: u64, entry: L2Entry, host: HostOffset) {
        let (at, uses) = (table.at, table.uses);
        if entry.subclusters.is_invalid() {
            let kind = FindingKind::SubclustersInvalid { table: at, index, offset: host };
            self.report.record(kind, uses.total);
        }
        let is_aligned = self.geometry.is_aligned(host.0);
        if !is_aligned {
            self.note_unaligned_cluster(table, index, entry, host);
        }
        self.count_fragment(table, host.0);
        if self.has_data_file() {
            self.flags_suspect |= uses.active > 0 && !entry.is_copied();
            return;
        }
        let mark = match uses.active > 0 && is_aligned {
            true => Mark::of(entry.is_copied()),
            false => Mark::None,
        };
        self.refer(HostRange::new(host, self.geometry.cluster_bytes()), uses.total, mark);
    }

    fn note_unaligned_cluster(
        &mut self,
        table: &Table,
        index: u64,
        entry: L2Entry,
        offset: HostOffset,
    ) {
        self.flags_suspect = true;
        let (table, times) = (table.at, table.uses.total);
        if self.holds_data(entry) {
            // Where the data really is nobody knows: nothing may be freed.
            self.is_complete = false;
            self.report.record(FindingKind::DataUnaligned { table, index, offset }, times);
        } else {
            self.repairable_entries += times;
            self.report.record(FindingKind::PreallocatedUnaligned { table, index, offset }, times);
        }
    }

    /// Says whether the host cluster of an allocated entry holds guest data, not only room for it.
    pub(crate) const fn holds_data(&self, entry: L2Entry) -> bool {
        if self.geometry.has_subclusters() {
            entry.subclusters.has_data()
        } else {
            !entry.has_zero_flag()
        }
    }

    fn count_compressed(&mut self, table: &mut Table, index: u64, entry: L2Entry) {
        let (at, uses, word) = (table.at, table.uses, entry.word);
        let Some(run) = entry.compressed_run(&self.geometry) else { return };
        let range = run.range();
        if entry.is_copied() {
            let offset = range.start;
            let kind = FindingKind::CompressedCopied { table: at, index, entry: word, offset };
            self.report.record(kind, uses.total);
            self.repairable_entries += uses.total;
        }
        if self.has_data_file() {
            let entry = word & !COPIED;
            let kind = FindingKind::CompressedInDataFile { table: at, index, entry };
            self.report.record(kind, uses.total);
            return;
        }
        if entry.subclusters.0 != 0 {
            // The bytes may be there all the same, but nobody counts them.
            self.is_complete = false;
            let entry = word & !COPIED;
            let kind = FindingKind::CompressedWithSubclusters { table: at, index, entry };
            self.report.record(kind, uses.total);
            return;
        }
        let plain = L2Entry { word: word & !COPIED, ..entry };
        if plain.has_reserved_bits(&self.geometry) {
            // The offset has bits above the 56 that there are: far past any end.
            self.is_complete = false;
            let kind = FindingKind::L2Reserved { table: at, index, entry: word };
            self.report.record(kind, uses.total);
        } else {
            self.refer(range, uses.total, Mark::None);
        }
        self.report.allocated_clusters += uses.active;
        self.report.compressed_clusters += uses.active;
        self.report.fragmented_clusters += uses.active;
    }
}
