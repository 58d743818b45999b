//! What internal snapshots refer to (B.9).

use super::finding::FindingKind;
use super::l1::Owner;
use super::read::{read_vec, read_words};
use super::survey::Survey;
use crate::Result;
use crate::qcow2::format::{
    MAX_L1_BYTES, Snapshot, SnapshotTableDecoder, SnapshotTableLocation, Version,
};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Bytes of L1 and bitmap tables that may be read beyond the length of the file. Tables that do
/// not overlap stay below it; those that do must not make a check take for ever.
const SLACK_BYTES: u64 = 64 << 20;

/// What of the snapshot table a repair can put right.
#[derive(Debug, Default)]
pub(crate) struct SnapshotDamage {
    /// The whole table, if some entry lacks data that version 3 demands.
    pub(crate) table: Option<Vec<Snapshot>>,
    /// The entries that do.
    pub(crate) incomplete: Vec<u64>,
    /// How long the table is in the file.
    pub(crate) table_bytes: u64,
}

async fn read_table<S: Storage>(
    storage: &S,
    location: SnapshotTableLocation,
) -> Result<(Vec<Snapshot>, u64)> {
    let mut decoder = SnapshotTableDecoder::new(location);
    while let Some(range) = decoder.wanted() {
        decoder.feed(&read_vec(storage, range.start, range.len).await?)?;
    }
    let bytes = decoder.table_bytes();
    Ok((decoder.into_snapshots(), bytes))
}

impl Survey {
    pub(super) async fn walk_snapshots<S: Storage>(&mut self, storage: &S) {
        let location = self.header.snapshots;
        if location.count == 0 {
            return;
        }
        let (snapshots, table_bytes) = match read_table(storage, location).await {
            Ok(table) => table,
            Err(error) => {
                self.is_complete = false;
                self.io_failed |= error.kind() != crate::ErrorKind::Corrupt;
                let (at, text) = (location.offset, error.to_string());
                self.report.record(FindingKind::SnapshotTableUnusable { at, text }, 1);
                return;
            }
        };
        if self.has_data_file() {
            let count = location.count.into();
            self.report.record(FindingKind::SnapshotsWithDataFile { count }, 1);
        }
        self.walk_snapshot_tables(storage, &snapshots).await;
        self.refer_metadata(HostRange::new(location.offset, table_bytes));
        self.judge_snapshots(snapshots, table_bytes);
    }

    fn judge_snapshots(&mut self, snapshots: Vec<Snapshot>, table_bytes: u64) {
        if self.geometry.version() == Version::V2 {
            return;
        }
        for (index, snapshot) in snapshots.iter().enumerate() {
            if snapshot.disk_size_bytes.is_none() {
                let index = index as u64;
                self.snapshots.incomplete.push(index);
                self.report.record(FindingKind::SnapshotIncomplete { index }, 1);
            }
        }
        if !self.snapshots.incomplete.is_empty() {
            self.snapshots.table = Some(snapshots);
            self.snapshots.table_bytes = table_bytes;
        }
    }

    async fn walk_snapshot_tables<S: Storage>(&mut self, storage: &S, snapshots: &[Snapshot]) {
        let mut budget = self.table_budget();
        for snapshot in snapshots {
            if let Some(kind) = self.l1_defect(snapshot) {
                self.is_complete = false;
                self.report.record(kind, 1);
                continue;
            }
            let at = snapshot.l1.offset;
            let entries = u64::from(snapshot.l1.entries);
            let Some(left) = budget.checked_sub(entries * 8) else {
                self.is_complete = false;
                self.report.record(FindingKind::TooManyTables { at }, 1);
                continue;
            };
            budget = left;
            self.refer_metadata(HostRange::new(at, entries * 8));
            match read_words(storage, at, self.words_inside(at, entries)).await {
                Ok(words) => self.count_l1(&words, Owner::Snapshot),
                Err(error) => self.note_unreadable(at, 1, &error, 1),
            }
        }
    }

    /// Returns how many bytes of tables are read at most.
    pub(super) const fn table_budget(&self) -> u64 {
        self.file_bytes.saturating_add(SLACK_BYTES)
    }

    /// Returns how many of the words lie in the file; the others read as zeros.
    pub(super) fn words_inside(&self, at: HostOffset, words: u64) -> u64 {
        words.min(self.file_bytes.saturating_sub(at.0).div_ceil(8))
    }

    fn l1_defect(&self, snapshot: &Snapshot) -> Option<FindingKind> {
        let id = snapshot.id.to_string_lossy().into_owned();
        let name = snapshot.name.to_string_lossy().into_owned();
        let entries = u64::from(snapshot.l1.entries);
        if !self.geometry.is_aligned(snapshot.l1.offset.0) {
            return Some(FindingKind::SnapshotL1Unaligned { id, name, offset: snapshot.l1.offset });
        }
        let too_large = entries * 8 > MAX_L1_BYTES;
        too_large.then_some(FindingKind::SnapshotL1TooLarge { id, name, entries })
    }
}
