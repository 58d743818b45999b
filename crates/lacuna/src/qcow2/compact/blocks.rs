//! Refcount blocks that come and go, and the end of the file.
//!
//! | written | a crash right after it leaves |
//! |---|---|
//! | a new block, which counts itself; *flush*; its entry in the table; *flush* | bytes that nobody counts |
//! | entries of blocks that are to go, which count themselves alone or are counted by others that stay; *flush* | leaks |
//! | the length of the refcount table, which names none of them; *flush* | leaks |
//! | their counts; counts of what lies beyond the new end; *flush* | a long file |
//! | the length; *flush* | the dirty bit, where it was set |
//! | the dirty bit; *flush* | |

use super::Compaction;
use super::counts::Changes;
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::qcow2::check::read::read_bytes;
use crate::qcow2::check::refcounts::Block;
use crate::qcow2::format::RefcountTableLocation;
use crate::qcow2::patch::{Word, write_changes, write_words};
use crate::storage::{Capability, Storage};
use crate::units::{HostCluster, HostOffset};

/// Blocks that lie in the tail and are given up together, at most.
const LOOKED_AT: usize = 1 << 16;

impl<S: Storage> Compaction<'_, S> {
    /// Adds the blocks that are missing below `end`: each at the start of what it counts, where
    /// everything is free.
    pub(super) async fn add_blocks(&mut self, end: u64) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        for index in 0..end.div_ceil(per_block) {
            if self.counts.table.block(index) != Block::Absent {
                continue;
            }
            let cluster = index * per_block;
            let mut block = vec![0; self.geometry.cluster_bytes() as usize];
            self.counts.table.width.write(&mut block, 0, 1);
            let at = self.geometry.host_offset(HostCluster(cluster));
            self.storage.write_at(at, Buffer::from(&block[..])).await.0?;
            self.storage.flush().await?;
            self.set_block(index, 0, at.0).await?;
            self.storage.flush().await?;
            self.counts.reload(self.storage).await?;
            self.counts.note(cluster, 1);
            self.plan.holes.remove(cluster);
            self.report.metadata_bytes += block.len() as u64;
        }
        Ok(())
    }

    async fn set_block(&mut self, index: u64, old: u64, new: u64) -> Result<()> {
        let header = crate::qcow2::read_header(self.storage).await?;
        let at = header.refcount_table.offset + index * 8;
        let word = Word { at, old, new, mask: !0 };
        self.report.metadata_bytes += write_words(self.storage, &[word]).await?;
        Ok(())
    }

    /// Gives up the blocks that count nothing any more, and cuts the file behind what is in use.
    pub(super) async fn finish(&mut self) -> Result<()> {
        self.structures = super::structures::Structures::read(self.storage).await?;
        let end = self.give_up_blocks().await?;
        self.clear_counts(end).await?;
        self.storage.flush().await?;
        let bytes = end << self.geometry.cluster_bits();
        let len = self.storage.len().await?;
        self.report.after_bytes = len.min(bytes);
        // A block device has the length that it has.
        if bytes < len && self.storage.capabilities().set_len != Capability::Unsupported {
            self.storage.set_len(bytes, Hold::none()).await?;
            self.storage.flush().await?;
        }
        self.uncover().await
    }

    /// Gives up blocks from the last on, while they count at most themselves. Returns the end of what
    /// is in use afterwards.
    pub(super) async fn give_up_blocks(&mut self) -> Result<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let blocks: Vec<_> = self.blocks().collect();
        let mut given_up = Changes::new();
        for (index, cluster) in blocks.into_iter().rev() {
            let counted = self.counts.iter_from(index * per_block).map(|(it, _)| it);
            let others: Vec<u64> = counted.filter(|it| *it != cluster).take(LOOKED_AT).collect();
            let is_last = others.iter().all(|it| given_up.contains_key(it));
            // One that a later block counts would be in the file without a count for a while.
            if !is_last || others.len() == LOOKED_AT || cluster / per_block > index || index == 0 {
                break;
            }
            // What this one counts is gone for good before its count is.
            if !others.is_empty() {
                self.storage.flush().await?;
            }
            self.set_block(index, self.counts.table.entries[index as usize], 0).await?;
            given_up.insert(cluster, 0);
        }
        if given_up.is_empty() {
            return Ok(self.end());
        }
        self.storage.flush().await?;
        self.counts.reload(self.storage).await?;
        // What a block that is gone counted needs no count any more.
        let table = self.counts.table.clone();
        let is_counted = |cluster: &u64| table.block(cluster / per_block) != Block::Absent;
        let (kept, gone): (Changes, Changes) =
            given_up.into_iter().partition(|(cluster, _)| is_counted(cluster));
        gone.keys().for_each(|cluster| self.counts.note(*cluster, 0));
        self.report.metadata_bytes += self.counts.write(self.storage, &kept).await?;
        self.storage.flush().await?;
        self.punch(&kept).await;
        Ok(self.end())
    }

    /// Makes the refcount table as short as the blocks that there are allow; what was its end is free then.
    pub(super) async fn shorten_table(&mut self) -> Result<()> {
        let header = crate::qcow2::read_header(self.storage).await?;
        let RefcountTableLocation { offset, clusters } = header.refcount_table;
        let entries = self.blocks().last().map_or(1, |(index, _)| index + 1);
        let needed = self.geometry.clusters_for(entries * 8);
        if needed >= u64::from(clusters) {
            return Ok(());
        }
        let shorter = RefcountTableLocation { offset, clusters: needed as u32 };
        let (at, bytes) = shorter.header_update();
        self.storage.write_at(at, Buffer::from(&bytes[..])).await.0?;
        self.storage.flush().await?;
        self.report.metadata_bytes += bytes.len() as u64;
        self.counts.reload(self.storage).await?;
        let first = self.geometry.host_cluster(offset).0;
        let freed: Changes =
            (first + needed..first + u64::from(clusters)).map(|cluster| (cluster, 0)).collect();
        self.write_counts(&freed).await?;
        self.storage.flush().await?;
        self.punch(&freed).await;
        self.structures = super::structures::Structures::read(self.storage).await?;
        Ok(())
    }

    /// Clears counts of what lies beyond the end: nobody looks at those until the file grows.
    async fn clear_counts(&mut self, end: u64) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        let blocks: Vec<_> =
            self.blocks().filter(|(index, _)| (index + 1) * per_block > end).collect();
        for (index, cluster) in blocks {
            let at: HostOffset = self.geometry.host_offset(HostCluster(cluster));
            let old = read_bytes(self.storage, at, self.geometry.cluster_bytes() as usize).await?;
            let mut new = old.to_vec();
            for within in end.saturating_sub(index * per_block)..per_block {
                self.counts.table.width.write(&mut new, within as usize, 0);
            }
            let written = write_changes(self.storage, at, &old, &new).await?;
            self.report.metadata_bytes += written;
        }
        Ok(())
    }
}
