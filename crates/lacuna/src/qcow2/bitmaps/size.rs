//! Bitmaps of a disk that gets another size (B.10).
//!
//! * Always: at any moment every table on storage covers the disk. A growing disk gets its longer
//!   tables first, a shrinking one its shorter tables last.
//! * Always: bits behind the end of the disk are clear before a larger size may show them.
//! * Never: a disk is resized with a bitmap that could not follow.

use super::super::format::{BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry, Geometry};
use super::super::image::Image;
use super::super::quarantine::FreedBy;
use super::super::write_back::Refcounting;
use super::store::table_bytes;
use super::{changing_fields, clear_bits_from, directory};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

const SECTOR_BYTES: u64 = 512;

/// Says how many bits a bitmap has and how they are spread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measure {
    pub(super) granularity_bits: u8,
    pub(super) chunk_bits: u64,
}

impl Measure {
    pub(super) fn of(entry: &BitmapEntry, geometry: &Geometry) -> Self {
        let chunk_bits = geometry.cluster_bytes() * 8;
        Self { granularity_bits: entry.granularity_bits, chunk_bits }
    }

    pub(super) const fn bits(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(1 << self.granularity_bits)
    }

    /// Clusters of bits; a table has one entry at least.
    pub(super) fn chunks(self, size_bytes: u64) -> u64 {
        self.bits(size_bytes).div_ceil(self.chunk_bits).max(1)
    }
}

/// A bitmap that is to fit another size.
struct Fitting {
    at: HostOffset,
    entry: BitmapEntry,
    measure: Measure,
    old: u64,
    new: u64,
}

impl<S: Storage> Image<S> {
    /// Refuses where a bitmap could not follow a change of the size.
    pub(in crate::qcow2) async fn check_bitmaps(&self, old: u64, new: u64) -> Result<()> {
        let header = self.header();
        for (at, entry) in directory(&self.0.storage, &header).await? {
            // Followed, it was marked in use by us: maybe a moment ago, or by a call that was dropped.
            let is_ours = self.0.meta.lock().bitmaps.followed(at).is_some();
            if entry.flags.contains(BitmapFlags::IN_USE) && !is_ours {
                let name = &entry.name;
                return Err(Error::invalid(format!(
                    "Bitmap '{name}' is inconsistent and cannot be used"
                )));
            }
            entry.check(&header.geometry, old)?;
            let chunks = Measure::of(&entry, &header.geometry).chunks(new);
            let table_entries = u32::try_from(chunks).unwrap_or(u32::MAX);
            BitmapEntry { table_entries, ..entry }.check(&header.geometry, new)?;
        }
        Ok(())
    }

    /// Gives every bitmap a table for a disk of `new` bytes, durably. What was behind the smaller
    /// of the two sizes is clear.
    pub(in crate::qcow2) async fn resize_bitmaps(&self, old: u64, new: u64) -> Result<()> {
        let _turn = self.take_bitmap_turn().await?;
        // A call that was dropped must not write an entry after this one.
        self.wait_for_metadata_writes().await;
        let header = self.header();
        for (at, entry) in directory(&self.0.storage, &header).await? {
            let measure = Measure::of(&entry, &header.geometry);
            self.fit_bitmap(Fitting { at, entry, measure, old, new }).await?;
        }
        Ok(())
    }

    async fn fit_bitmap(&self, fitting: Fitting) -> Result<()> {
        let Fitting { entry, measure, old, new, .. } = &fitting;
        let stored = self.load_bitmap_table(entry).await?;
        let kept = measure.chunks(*old.min(new)).min(stored.len() as u64) as usize;
        let mut table = stored[..kept].to_vec();
        self.clear_behind(&mut table, *measure, *old.min(new)).await?;
        table.resize(measure.chunks(*new) as usize, BitmapTableEntry::default());
        if table == stored {
            return Ok(());
        }
        let moved = self.write_table(entry, &table).await?;
        self.switch_table(&fitting, &moved).await?;
        // Before anything can be reused that a reader found by the old table.
        self.0.meta.lock().bitmaps.generation += 1;
        self.free_table(entry, &stored[kept..]).await
    }

    /// Clears the bits of the last chunk that lie behind the end of a disk.
    async fn clear_behind(
        &self,
        table: &mut [BitmapTableEntry],
        measure: Measure,
        size_bytes: u64,
    ) -> Result<()> {
        let bits = measure.bits(size_bytes);
        let Some(last) = table.get_mut((bits / measure.chunk_bits) as usize) else {
            return Ok(());
        };
        let (from, chunk_bytes) = (bits % measure.chunk_bits, measure.chunk_bits / 8);
        match last.cluster() {
            BitmapCluster::AllZeros => Ok(()),
            BitmapCluster::AllOnes => {
                let mut chunk = vec![0xff; chunk_bytes as usize];
                clear_bits_from(&mut chunk, from);
                let offset = self.plan(|meta| meta.allocate_for_bitmap(1)).await?;
                self.write_bitmap(offset, &chunk).await?;
                *last = BitmapTableEntry::new(BitmapCluster::Data(offset));
                Ok(())
            }
            BitmapCluster::Data(offset) => {
                let mut chunk = self.load(offset, chunk_bytes, "bitmap data").await?.to_vec();
                match clear_bits_from(&mut chunk, from) {
                    true => self.write_bitmap(offset, &chunk).await,
                    false => Ok(()),
                }
            }
        }
    }

    /// Writes a table to new clusters, durably; nothing points to it yet.
    pub(super) async fn write_table(
        &self,
        entry: &BitmapEntry,
        table: &[BitmapTableEntry],
    ) -> Result<BitmapEntry> {
        let bytes = table_bytes(table);
        let clusters = self.geometry().clusters_for(bytes.len() as u64);
        let table_offset = self.plan(|meta| meta.allocate_for_bitmap(clusters)).await?;
        self.write_bitmap(table_offset, &bytes).await?;
        // The refcounts of all that is new; syncs the table as well.
        self.write_back(Refcounting::Written).await?;
        Ok(BitmapEntry { table_offset, table_entries: table.len() as u32, ..entry.clone() })
    }

    /// Has the directory name another table. Memory goes first: closing tells the directory again.
    async fn switch_table(&self, fitting: &Fitting, moved: &BitmapEntry) -> Result<()> {
        self.0.meta.lock().bitmaps.move_table(fitting.at, moved);
        let fields = changing_fields(moved, moved.flags);
        let (offset, count) = (&fields[..8], &fields[8..12]);
        let crosses = fitting.at.0 % SECTOR_BYTES + 12 > SECTOR_BYTES;
        match (crosses, fitting.new < fitting.old) {
            (false, _) => self.write_header_field(fitting.at, &fields[..12]).await,
            (true, true) => {
                self.write_header_field(fitting.at + 8, count).await?;
                self.write_header_field(fitting.at, offset).await
            }
            (true, false) => {
                self.write_header_field(fitting.at, offset).await?;
                self.write_header_field(fitting.at + 8, count).await
            }
        }
    }

    /// Frees a table that nothing names any more, and data that the new one does not name.
    async fn free_table(&self, entry: &BitmapEntry, dropped: &[BitmapTableEntry]) -> Result<()> {
        for range in ranges_of(entry, dropped, &self.geometry()) {
            self.free_bitmap_range(range).await?;
        }
        Ok(())
    }

    /// The image says where a bitmap lies, and may lie.
    pub(super) async fn free_bitmap_range(&self, range: HostRange) -> Result<()> {
        let checked = self.0.meta.lock().structures.check(range, None);
        if let Err(error) = checked {
            return Err(self.mark_corrupt(error).await);
        }
        for cluster in self.geometry().host_clusters(range) {
            self.plan(|meta| meta.free(HostCluster(cluster), FreedBy::Other)).await?;
        }
        Ok(())
    }
}

/// Returns where a table lies, and what data some of its entries name.
pub(super) fn ranges_of(
    entry: &BitmapEntry,
    table: &[BitmapTableEntry],
    geometry: &Geometry,
) -> Vec<HostRange> {
    let data = table.iter().filter_map(|entry| match entry.cluster() {
        BitmapCluster::Data(offset) => Some(HostRange::new(offset, geometry.cluster_bytes())),
        _ => None,
    });
    let table = HostRange::new(entry.table_offset, u64::from(entry.table_entries) * 8);
    std::iter::once(table).chain(data).collect()
}
