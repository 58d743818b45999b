//! Brings the stored bitmaps after what was marked in memory (B.10).
//!
//! * Always: what is on its way to storage counts for readers until it has arrived.
//! * Always: new clusters of bits have their refcounts on storage before a table names them.

use super::super::format::{BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry};
use super::super::image::Image;
use super::super::meta::Meta;
use super::super::need::{Need, Planned};
use super::super::write_back::Refcounting;
use super::{Bitmaps, Tracked, add_bits, changing_fields};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

impl Bitmaps {
    /// Sends all that is marked on its way; returns the bitmaps.
    fn begin_storing(&mut self, size_bytes: u64) -> Vec<(HostOffset, BitmapEntry)> {
        self.cut_at(size_bytes);
        self.tracked.iter_mut().for_each(Tracked::begin_storing);
        self.tracked.iter().map(|it| (it.at, it.entry.clone())).collect()
    }

    /// Returns the first chunk on its way from `index` on.
    fn sent_from(&self, at: HostOffset, index: u64) -> Option<(u64, Vec<u8>)> {
        let (index, chunk) = self.find(at)?.storing.range(index..).next()?;
        Some((*index, chunk.clone()))
    }

    /// Storage has what was sent: what readers know of the tables is out of date.
    fn stored(&mut self) {
        self.tracked.iter_mut().for_each(|bitmap| bitmap.storing.clear());
        self.generation += 1;
        self.in_use = false;
    }
}

impl Meta {
    /// Refuses a place that the image names and that nobody can have written: the file would become as long.
    fn check_in_file(&self, range: HostRange) -> Result<()> {
        let end = self.zero_from.0.next_multiple_of(self.geometry().cluster_bytes());
        match range.end().0 <= end {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "A bitmap lies at {}, behind the end of the file at {}",
                range.start, self.zero_from
            ))
            .at(range.start)),
        }
    }

    /// Allocates clusters, not while the file is being cut.
    pub(super) fn allocate_for_bitmap(&mut self, count: u64) -> Planned<HostOffset> {
        match self.paused {
            true => Err(Need::Turn(self.in_flight.wait()).into()),
            false => self.allocate(count),
        }
    }
}

impl<S: Storage> Image<S> {
    /// Marks the bitmaps in use, durably; changes may follow then.
    pub(in crate::qcow2) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        let _turn = self.take_bitmap_turn().await?;
        if !self.0.meta.lock().gate.bitmaps {
            return Ok(());
        }
        if self.0.meta.lock().bitmaps.outdated {
            self.reload_bitmaps().await?;
        }
        self.prepare_intents().await?;
        // Before the marks: if this is dropped among them, they are to be taken off again.
        self.0.meta.lock().bitmaps.in_use = true;
        self.write_bitmap_flags(BitmapFlags::IN_USE).await?;
        self.0.meta.lock().gate.bitmaps = false;
        Ok(())
    }

    async fn write_bitmap_flags(&self, in_use: BitmapFlags) -> Result<()> {
        let entries: Vec<_> = {
            let meta = self.0.meta.lock();
            // With the table: the entry that tells of a moved one may not have been written.
            let of = |it: &Tracked| {
                let flags = it.entry.flags.difference(BitmapFlags::IN_USE).union(in_use);
                (it.at, changing_fields(&it.entry, flags))
            };
            meta.bitmaps.tracked.iter().map(of).collect()
        };
        for (at, bytes) in entries {
            self.write_bytes(at, &bytes).await?;
        }
        self.sync().await
    }

    /// Merges what changed into the stored bitmaps and takes the marks off.
    pub(in crate::qcow2) async fn store_bitmaps(&self) -> Result<()> {
        let _turn = self.take_bitmap_turn().await?;
        self.store_bitmaps_in_turn().await
    }

    pub(super) async fn store_bitmaps_in_turn(&self) -> Result<()> {
        let sent = {
            let mut meta = self.0.meta.lock();
            if !meta.bitmaps.in_use {
                return Ok(());
            }
            let size_bytes = meta.size_bytes;
            // What changes from here on marks them in use again, behind the turn.
            meta.gate.bitmaps = true;
            meta.bitmaps.begin_storing(size_bytes)
        };
        let mut tables = Vec::new();
        for (at, entry) in &sent {
            tables.push(self.merge_chunks(*at, entry).await?);
        }
        // New clusters of bitmap data have their refcounts on storage before a table names them.
        self.write_back(Refcounting::Written).await?;
        for ((_, entry), table) in sent.iter().zip(tables) {
            self.write_bitmap(entry.table_offset, &table_bytes(&table)).await?;
        }
        self.sync().await?;
        self.clear_intents().await?;
        // A mark that was dropped on its way must not land on what takes it off.
        self.wait_for_metadata_writes().await;
        self.write_bitmap_flags(BitmapFlags::empty()).await?;
        let mut meta = self.0.meta.lock();
        meta.bitmaps.intents.is_clearing = false;
        meta.bitmaps.stored();
        Ok(())
    }

    /// Stores the bitmaps where that is due, so that a crash has them name little more than what
    /// changed. Comes with flushes.
    pub(in crate::qcow2) async fn store_bitmaps_if_due(&self) -> Result<()> {
        let is_due = || {
            let meta = self.0.meta.lock();
            meta.bitmaps.in_use && meta.bitmaps.intents.are_due()
        };
        if !is_due() {
            return Ok(());
        }
        let _turn = self.take_bitmap_turn().await?;
        match is_due() {
            true => self.store_bitmaps_in_turn().await,
            false => Ok(()),
        }
    }

    /// Reads the table of a bitmap whose entry was checked.
    pub(in crate::qcow2) async fn load_bitmap_table(
        &self,
        entry: &BitmapEntry,
    ) -> Result<Vec<BitmapTableEntry>> {
        let table_bytes = u64::from(entry.table_entries) * 8;
        let bytes = self.load(entry.table_offset, table_bytes, "bitmap table").await?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| BitmapTableEntry(u64::from_be_bytes(*word))).collect())
    }

    /// Writes the chunks of one bitmap. Returns its table as it must be stored next.
    async fn merge_chunks(
        &self,
        at: HostOffset,
        entry: &BitmapEntry,
    ) -> Result<Vec<BitmapTableEntry>> {
        let mut table = self.load_bitmap_table(entry).await?;
        let mut next = 0;
        loop {
            let sent = self.0.meta.lock().bitmaps.sent_from(at, next);
            let Some((index, chunk)) = sent else { return Ok(table) };
            next = index + 1;
            let Some(entry) = table.get_mut(index as usize) else { continue };
            *entry = self.merge_chunk(*entry, chunk).await?;
        }
    }

    /// The image says where a bitmap lies, and may lie.
    pub(super) async fn write_bitmap(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        let range = HostRange::new(offset, bytes.len() as u64);
        let checked = {
            let meta = self.0.meta.lock();
            meta.check_in_file(range).and_then(|()| meta.structures.check(range, None))
        };
        match checked {
            Ok(()) => self.write_bytes(offset, bytes).await,
            Err(error) => Err(self.mark_corrupt(error).await),
        }
    }

    async fn merge_chunk(
        &self,
        entry: BitmapTableEntry,
        mut chunk: Vec<u8>,
    ) -> Result<BitmapTableEntry> {
        let offset = match entry.cluster() {
            BitmapCluster::AllOnes => return Ok(entry),
            BitmapCluster::AllZeros => self.plan(|meta| meta.allocate_for_bitmap(1)).await?,
            BitmapCluster::Data(offset) => {
                let stored = self.load(offset, chunk.len() as u64, "bitmap data").await?;
                add_bits(&mut chunk, &stored);
                offset
            }
        };
        self.write_bitmap(offset, &chunk).await?;
        Ok(BitmapTableEntry::new(BitmapCluster::Data(offset)))
    }
}

/// Encodes a table.
pub(super) fn table_bytes(table: &[BitmapTableEntry]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
}
