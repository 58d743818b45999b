//! What persistent bitmaps refer to (B.10).
//!
//! A bitmap in use keeps its place; only its content means nothing. Where the directory cannot be
//! read nothing is freed, so that what it meant is still there.

use super::finding::FindingKind;
use super::read::{read_vec, read_words};
use super::survey::Survey;
use crate::qcow2::format::{
    AutoclearFeatures, BitmapCluster, BitmapEntry, BitmapTableEntry, BitmapsExtension,
};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Entries of a bitmap table that are read at once.
const ENTRIES_AT_ONCE: u64 = 1 << 17;

impl Survey {
    pub(super) async fn walk_bitmaps<S: Storage>(&mut self, storage: &S) {
        // Without the bit, somebody wrote who knew no bitmaps: the extension means nothing.
        let is_valid = self.header.features.autoclear.contains(AutoclearFeatures::BITMAPS);
        let Some(extension) = self.header.extensions.bitmaps.filter(|_| is_valid) else { return };
        let directory = HostRange::new(extension.directory_offset, extension.directory_bytes);
        let entries = match self.refer_metadata(directory) {
            true => read_directory(storage, &extension).await,
            false => Err(Error::corrupt("The bitmap directory lies past the end of the file")),
        };
        match entries {
            Ok(entries) => self.walk_bitmap_tables(storage, &entries).await,
            Err(error) => self.note_bitmap(directory.start, &error),
        }
    }

    fn note_bitmap(&mut self, at: HostOffset, error: &Error) {
        self.is_complete = false;
        self.io_failed |= error.kind() != ErrorKind::Corrupt;
        self.report.record(FindingKind::BitmapUnusable { at, text: error.to_string() }, 1);
    }

    async fn walk_bitmap_tables<S: Storage>(&mut self, storage: &S, entries: &[BitmapEntry]) {
        let mut budget = self.table_budget();
        for entry in entries {
            match entry.check(&self.geometry, self.header.size_bytes) {
                // What a bitmap that nobody here knows refers to can be counted all the same.
                Err(error) if error.kind() != ErrorKind::Unsupported => {
                    self.note_bitmap(entry.table_offset, &error);
                    continue;
                }
                _ => {}
            }
            let table = HostRange::new(entry.table_offset, u64::from(entry.table_entries) * 8);
            let Some(left) = budget.checked_sub(table.len) else {
                self.is_complete = false;
                self.report.record(FindingKind::TooManyTables { at: table.start }, 1);
                continue;
            };
            budget = left;
            self.refer_metadata(table);
            self.walk_bitmap_table(storage, table).await;
        }
    }

    async fn walk_bitmap_table<S: Storage>(&mut self, storage: &S, table: HostRange) {
        let entries = self.words_inside(table.start, table.len / 8);
        let mut done = 0;
        while done < entries {
            let part = (entries - done).min(ENTRIES_AT_ONCE);
            match read_words(storage, table.start + done * 8, part).await {
                Ok(words) => self.count_bitmap_entries(table.start, done, &words),
                Err(error) => self.note_unreadable(table.start, 1, &error, 1),
            }
            done += part;
        }
    }

    fn count_bitmap_entries(&mut self, table: HostOffset, first: u64, words: &[u64]) {
        for (index, word) in words.iter().enumerate() {
            let entry = BitmapTableEntry(*word);
            let cluster = entry.cluster();
            let is_aligned = match cluster {
                BitmapCluster::Data(offset) => self.geometry.is_aligned(offset.0),
                _ => true,
            };
            if entry.has_reserved_bits() || !is_aligned {
                // What it meant nobody knows.
                self.is_complete = false;
                let (index, entry) = (first + index as u64, *word);
                self.report.record(FindingKind::BitmapEntryInvalid { table, index, entry }, 1);
            }
            if let (true, BitmapCluster::Data(offset)) = (is_aligned, cluster) {
                self.refer_metadata(HostRange::new(offset, self.geometry.cluster_bytes()));
            }
        }
    }
}

async fn read_directory<S: Storage>(
    storage: &S,
    extension: &BitmapsExtension,
) -> Result<Vec<BitmapEntry>> {
    // Decoding the header has bounded the size.
    let bytes = read_vec(storage, extension.directory_offset, extension.directory_bytes).await?;
    BitmapEntry::decode_directory(&bytes, extension)
}
