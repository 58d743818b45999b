//! How many host clusters are in use, by the refcounts in the file.

use super::format::{MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, RefcountWidth};
use super::image::Image;
use super::in_flight::Touch;
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl<S: Storage> Image<S> {
    /// Says whether at least `count` clusters of the image file have a refcount in storage.
    ///
    /// More than the host has allocated means that the image was preallocated, or had holes punched
    /// into it: there are holes below clusters that it takes for data. What was not flushed yet is not
    /// counted; nor is what lies past the end of the file. Reads no more than it needs to be sure.
    ///
    /// # Errors
    /// `Corrupt` for a refcount block that lies where none can lie; else what reading gives.
    ///
    /// ```
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
    /// // The header, the refcount table, its block, the L1 table.
    /// assert!(image.uses_clusters(4).await? && !image.uses_clusters(5).await?);
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn uses_clusters(&self, count: u64) -> Result<bool> {
        // What is freed meanwhile is not reused for something else.
        let _hold = self.enter(Touch::Read, GuestRange::new(GuestOffset(0), 0)).await?;
        let (geometry, table) = {
            let header = self.0.header.lock();
            (header.geometry, header.refcount_table)
        };
        let mut left = self.storage().len().await?.div_ceil(geometry.cluster_bytes());
        let table_bytes = (u64::from(table.clusters) * geometry.cluster_bytes())
            .min(MAX_REFCOUNT_TABLE_BYTES)
            .min(left.div_ceil(geometry.refcount_block_entries()) * 8);
        let entries = self.load(table.offset, table_bytes, "refcount table").await?;
        let mut found = 0;
        for entry in entries.as_chunks::<8>().0 {
            if found >= count {
                break;
            }
            let here = geometry.refcount_block_entries().min(left);
            left -= here;
            if let Some(block) = RefcountTableEntry(u64::from_be_bytes(*entry)).block() {
                found += self.count_in_block(block, here).await?;
            }
        }
        Ok(found >= count)
    }

    /// Counts the clusters in use among the first `clusters` of a block.
    async fn count_in_block(&self, block: HostOffset, clusters: u64) -> Result<u64> {
        let geometry = self.geometry();
        let width = RefcountWidth::of(&geometry);
        let bytes = self.load(block, geometry.cluster_bytes(), "refcount block").await?;
        if width == RefcountWidth::Bits16 {
            let counts = &bytes.as_chunks::<2>().0[..clusters as usize];
            return Ok(counts.iter().filter(|count| **count != [0, 0]).count() as u64);
        }
        Ok((0..clusters as usize).filter(|index| width.read(&bytes, *index) > 0).count() as u64)
    }
}
