//! What differs between the disk and a snapshot, for the bitmaps that follow the disk.

use super::change::Change;
use crate::Result;
use crate::buffer::Buffer;
use crate::qcow2::format::{L1Entry, L2Entry};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl<S: Storage> Change<'_, S> {
    /// Marks what differs, by what maps say, up to `end`.
    pub(super) async fn mark_differences(
        &self,
        here: &[L1Entry],
        there: &[L1Entry],
        end: u64,
    ) -> Result<()> {
        if self.image.0.meta.lock().bitmaps.is_empty() {
            return Ok(());
        }
        let table = |l1: &[L1Entry], index: usize| l1.get(index).and_then(|entry| entry.table());
        for index in 0..self.geometry.l1_entries_for(end) as usize {
            let (old, new) = (table(here, index), table(there, index));
            if old == new {
                continue;
            }
            let (old, new) = (self.read_table(old).await?, self.read_table(new).await?);
            let start = index as u64 * self.geometry.l2_coverage_bytes();
            self.mark_entries(&old, &new, start, end);
        }
        Ok(())
    }

    async fn read_table(&self, table: Option<HostOffset>) -> Result<Buffer> {
        let bytes = self.geometry.cluster_bytes();
        match table {
            Some(at) => self.image.load(at, bytes, "L2 table").await,
            None => Ok(Buffer::zeroed(bytes as usize)),
        }
    }

    fn mark_entries(&self, old: &[u8], new: &[u8], start: u64, end: u64) {
        let width = self.geometry.entry_width();
        let step = self.geometry.cluster_bytes();
        let entries = |table: &[u8]| -> Vec<L2Entry> {
            let entries = table.chunks_exact(width.bytes() as usize);
            entries.map(|entry| L2Entry::at_start(entry, width).with_copied(false)).collect()
        };
        let mut meta = self.image.0.meta.lock();
        let starts = (start..end).step_by(step as usize);
        for ((old, new), at) in entries(old).into_iter().zip(entries(new)).zip(starts) {
            if old != new {
                let len = step.min(end - at);
                meta.bitmaps.mark(GuestRange::new(GuestOffset(at), len));
            }
        }
    }
}
