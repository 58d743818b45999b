//! Adds what one bitmap says to another (B.10).
//!
//! * Always: bits that change go to new clusters, so that a crash finds the bitmap as it was, or
//!   with all that was added.

use super::super::dirty::{DirtyBitmap, DirtyRanges};
use super::super::format::{BitmapCluster, BitmapEntry, BitmapTableEntry, StoredName};
use super::super::image::Image;
use super::size::Measure;
use super::{clear_bits_from, set_bits};
use crate::storage::Storage;
use crate::units::GuestRange;
use crate::{Error, Result};

/// Ranges in guest order.
pub(super) enum Ranges<T: Storage> {
    /// What a bitmap names.
    Of(DirtyRanges<T>),
    Listed(std::vec::IntoIter<GuestRange>),
}

impl<T: Storage> Ranges<T> {
    async fn next(&mut self) -> Result<Option<GuestRange>> {
        match self {
            Self::Of(ranges) => ranges.next().await,
            Self::Listed(ranges) => Ok(ranges.next()),
        }
    }
}

impl<S: Storage> Image<S> {
    /// Adds to a bitmap what another one names: of this image, or of one with a disk of the same
    /// size. Durable on return. The granularities may differ; what is added is rounded outwards.
    ///
    /// # Errors
    /// As [`bitmap`](Self::bitmap); `InvalidRequest` for disks of different sizes; `ReadOnly`; what
    /// reading and writing give. The bitmap is as it was then.
    ///
    /// ```no_run
    /// # async fn example<S: lacuna::storage::Storage>(
    /// #     image: &lacuna::qcow2::Image<S>,
    /// # ) -> lacuna::Result<()> {
    /// let tuesday = image.bitmap(&"since-tuesday".into()).await?;
    /// image.merge_bitmap(&"since-monday".into(), &tuesday).await
    /// # }
    /// ```
    pub async fn merge_bitmap<T: Storage>(
        &self,
        name: &StoredName,
        source: &DirtyBitmap<T>,
    ) -> Result<()> {
        let rest = self.bitmaps_at_rest().await?;
        let index = rest.usable(name)?;
        let (own, others) = (self.size(), source.size_bytes());
        if own != others {
            return Err(Error::invalid(format!(
                "Bitmaps are of different sizes (destination size is {own}, source size is {others}) \
                 and can't be merged"
            )));
        }
        let ranges = Ranges::Of(source.ranges());
        let table = self.merged_table(&rest.entries[index], ranges).await?;
        rest.store(index, &table).await
    }

    /// Writes the bits of a bitmap with those of some ranges set, where that changes any.
    pub(super) async fn merged_table<T: Storage>(
        &self,
        entry: &BitmapEntry,
        mut ranges: Ranges<T>,
    ) -> Result<Vec<BitmapTableEntry>> {
        let measure = Measure::of(entry, &self.geometry());
        let mut table = self.checked_table(entry).await?;
        let mut open = ranges.next().await?;
        while let Some(range) = open {
            let first = range.start.0 >> measure.granularity_bits;
            let chunk = first / measure.chunk_bits;
            let mut bits = self.chunk_of(&table, chunk, measure).await?;
            let end = ((chunk + 1) * measure.chunk_bits) << measure.granularity_bits;
            while let Some(range) = open.filter(|range| range.start.0 < end) {
                let (here, rest) = split_at(range, end);
                set_range(&mut bits, here, measure, chunk);
                open = match rest.is_empty() {
                    true => ranges.next().await?,
                    false => Some(rest),
                };
            }
            let place = table.get_mut(chunk as usize);
            let place = place.ok_or_else(|| Error::corrupt("A bitmap does not cover the disk"))?;
            *place = self.write_chunk(bits, measure, chunk).await?;
        }
        Ok(table)
    }

    /// Reads a cluster of bits.
    pub(super) async fn chunk_of(
        &self,
        table: &[BitmapTableEntry],
        chunk: u64,
        measure: Measure,
    ) -> Result<Vec<u8>> {
        let bytes = measure.chunk_bits / 8;
        match table.get(chunk as usize).map(|entry| entry.cluster()) {
            Some(BitmapCluster::Data(offset)) => {
                Ok(self.load(offset, bytes, "bitmap data").await?.to_vec())
            }
            Some(BitmapCluster::AllOnes) => Ok(vec![0xff; bytes as usize]),
            _ => Ok(vec![0; bytes as usize]),
        }
    }

    /// Writes a cluster of bits to a new place, unless all of them are set.
    pub(super) async fn write_chunk(
        &self,
        mut bits: Vec<u8>,
        measure: Measure,
        chunk: u64,
    ) -> Result<BitmapTableEntry> {
        if bits.iter().all(|byte| *byte == 0xff) {
            return Ok(BitmapTableEntry::new(BitmapCluster::AllOnes));
        }
        let end = measure.bits(self.size()).saturating_sub(chunk * measure.chunk_bits);
        if end < measure.chunk_bits {
            clear_bits_from(&mut bits, end);
        }
        let offset = self.plan(|meta| meta.allocate_for_bitmap(1)).await?;
        self.write_bitmap(offset, &bits).await?;
        Ok(BitmapTableEntry::new(BitmapCluster::Data(offset)))
    }
}

/// Splits a range that begins before `end`.
fn split_at(range: GuestRange, end: u64) -> (GuestRange, GuestRange) {
    let len = range.len.min(end - range.start.0);
    let here = GuestRange::new(range.start, len);
    (here, GuestRange::new(here.end(), range.len - len))
}

/// Sets the bits of a range that lies in one cluster of bits.
fn set_range(bits: &mut [u8], range: GuestRange, measure: Measure, chunk: u64) {
    let start = chunk * measure.chunk_bits;
    let first = range.start.0 >> measure.granularity_bits;
    let last = (range.end().0 - 1) >> measure.granularity_bits;
    set_bits(bits, first - start, last - start);
}
