//! L1 tables: where they point.

use super::finding::FindingKind;
use super::read::read_words;
use super::references::Mark;
use super::survey::Survey;
use super::tables::Uses;
use crate::qcow2::format::L1Entry;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Whose L1 table it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Active,
    Snapshot,
}

impl Survey {
    pub(super) async fn walk_active_l1<S: Storage>(&mut self, storage: &S) {
        let l1 = self.header.l1;
        // Decoding the header has bounded the number of entries.
        let entries = u64::from(l1.entries);
        self.l1_is_inside = self.refer_metadata(HostRange::new(l1.offset, entries * 8));
        match read_words(storage, l1.offset, entries).await {
            Ok(words) => {
                self.count_l1(&words, Owner::Active);
                self.l1 = words;
            }
            Err(error) => self.note_unreadable(l1.offset, 1, &error, 1),
        }
    }

    pub(super) fn count_l1(&mut self, words: &[u64], owner: Owner) {
        for (index, word) in words.iter().enumerate() {
            if *word != 0 {
                self.count_l1_entry(index as u64, L1Entry(*word), owner);
            }
        }
    }

    fn count_l1_entry(&mut self, index: u64, entry: L1Entry, owner: Owner) {
        if entry.has_reserved_bits() && entry.table().is_some() {
            self.report.record(FindingKind::L1Reserved { index, entry: entry.0 }, 1);
        }
        let Some(offset) = entry.table() else {
            self.repairable_entries += u64::from(owner == Owner::Active);
            self.report.record(FindingKind::L1Headless { index, entry: entry.0 }, 1);
            return;
        };
        let aligned = self.geometry.is_aligned(offset.0);
        let mark = match owner {
            Owner::Active if aligned => Mark::of(entry.is_copied()),
            _ => Mark::None,
        };
        self.refer(HostRange::new(offset, self.geometry.cluster_bytes()), 1, mark);
        match aligned {
            true => self.note_table(offset, owner),
            false => self.note_unaligned_table(index, offset, owner),
        }
    }

    fn note_table(&mut self, offset: HostOffset, owner: Owner) {
        let cluster = self.geometry.host_cluster(offset).0;
        // Past the end everything reads as zeros: no entries.
        if !self.is_inside(cluster) {
            return;
        }
        match owner {
            Owner::Active => self.tables.add_active(cluster),
            Owner::Snapshot => self.tables.add_inactive(cluster),
        }
    }

    fn note_unaligned_table(&mut self, index: u64, offset: HostOffset, owner: Owner) {
        self.report.record(FindingKind::L1Unaligned { index, offset }, 1);
        self.is_complete = false;
        self.flags_suspect = true;
        let active = u64::from(owner == Owner::Active);
        if !self.tables.add_unaligned(offset, Uses { active, total: 1 }) {
            self.report.record(FindingKind::TooManyTables { at: offset }, 1);
        }
    }
}
