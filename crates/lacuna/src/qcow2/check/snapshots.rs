//! What internal snapshots refer to (B.9).

use super::finding::FindingKind;
use super::l1::Owner;
use super::read::{read_vec, read_words};
use super::survey::Survey;
use crate::qcow2::format::{
    MAX_L1_BYTES, Snapshot, SnapshotTableDecoder, SnapshotTableLocation, Version,
};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Bytes of L1 and bitmap tables that may be read beyond the length of the file. Tables that do
/// not overlap stay below it; those that do must not make a check take for ever.
const SLACK_BYTES: u64 = 64 << 20;

/// What of the snapshot table a repair can put right.
#[derive(Debug, Default)]
pub(crate) struct SnapshotDamage {
    /// The whole table, if some entry has too little extra data, or too much.
    pub(crate) table: Option<Vec<Snapshot>>,
    /// The entries that lack what version 3 demands.
    pub(crate) incomplete: Vec<u64>,
    /// The entries with more extra data than allowed, and how much that is.
    pub(crate) too_large: Vec<(u64, u64)>,
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

/// Extra data of an entry that is kept where there is too much of it.
const KEPT_EXTRA_BYTES: u64 = 1024;
/// The part of an entry before its extra data.
const ENTRY_BYTES: u64 = 40;

/// A table that QEMU does not read, because entries have too much extra data.
struct Salvage {
    snapshots: Vec<Snapshot>,
    table_bytes: u64,
    /// Index and size of extra data that is cut.
    cut: Vec<(u64, u64)>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Survey {
    /// Reads a table entry by entry, leaving out extra data beyond the limit. Nothing where the
    /// table is damaged in another way.
    async fn salvage<S: Storage>(
        &self,
        storage: &S,
        location: SnapshotTableLocation,
    ) -> Option<Salvage> {
        let (mut at, mut short, mut cut) = (location.offset.0, Vec::new(), Vec::new());
        for index in 0..u64::from(location.count) {
            let mut entry = read_vec(storage, HostOffset(at), ENTRY_BYTES).await.ok()?;
            let extra = number::<4>(&entry, 36);
            let names = number::<2>(&entry, 12) + number::<2>(&entry, 14);
            let kept = extra.min(KEPT_EXTRA_BYTES);
            let end = at.checked_add(ENTRY_BYTES + extra + names)?;
            if end > self.file_bytes {
                return None;
            }
            if kept < extra {
                cut.push((index, extra));
            }
            entry[36..40].copy_from_slice(&(kept as u32).to_be_bytes());
            short.extend_from_slice(&entry);
            short.extend(read_vec(storage, HostOffset(at + ENTRY_BYTES), kept).await.ok()?);
            short.extend(read_vec(storage, HostOffset(end - names), names).await.ok()?);
            short.resize(short.len().next_multiple_of(8), 0);
            at = end.next_multiple_of(8);
        }
        let snapshots = Snapshot::decode_table(&short, location.count).ok()?;
        Some(Salvage { snapshots, table_bytes: at - location.offset.0, cut })
    }

    /// Walks a table with too much extra data, as far as it can be made sense of.
    async fn walk_salvage<S: Storage>(
        &mut self,
        storage: &S,
        location: SnapshotTableLocation,
        error: &Error,
    ) {
        let salvage = match error.kind() {
            ErrorKind::Corrupt => self.salvage(storage, location).await,
            _ => None,
        };
        let Some(salvage) = salvage.filter(|salvage| !salvage.cut.is_empty()) else {
            self.is_complete = false;
            self.io_failed |= error.kind() != ErrorKind::Corrupt;
            let (at, text) = (location.offset, error.to_string());
            self.report.record(FindingKind::SnapshotTableUnusable { at, text }, 1);
            return;
        };
        for (index, bytes) in &salvage.cut {
            let (index, bytes) = (*index, *bytes);
            self.report.record(FindingKind::SnapshotExtraTooLarge { index, bytes }, 1);
        }
        self.walk_snapshot_tables(storage, &salvage.snapshots).await;
        self.refer_metadata(HostRange::new(location.offset, salvage.table_bytes));
        self.snapshots.too_large = salvage.cut;
        self.snapshots.table = Some(salvage.snapshots);
        self.snapshots.table_bytes = salvage.table_bytes;
    }

    pub(super) async fn walk_snapshots<S: Storage>(&mut self, storage: &S) {
        let location = self.header.snapshots;
        if location.count == 0 {
            return;
        }
        let (snapshots, table_bytes) = match read_table(storage, location).await {
            Ok(table) => table,
            Err(error) => return self.walk_salvage(storage, location, &error).await,
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
