//! The whole refcount structure made anew, in clusters that nothing uses.
//!
//! The new blocks hold the counts as they are to be: without the old structure, with the new one.
//! So after the switch nothing is left to be cleaned up, and before it the old structure is whole.

use super::super::check::FindingKind;
use super::super::check::refcounts::{Block, RefcountReader, RefcountTable};
use super::super::check::references::Mark;
use super::Round;
use crate::Result;
use crate::qcow2::format::{MAX_REFCOUNT_TABLE_BYTES, RefcountTableLocation};
use crate::storage::Storage;

/// Where the new structure goes: blocks first, then the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    first: u64,
    /// Which blocks there are, by index; in order.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Layout {
    const fn end(&self) -> u64 {
        self.first + self.blocks.len() as u64 + self.table_clusters
    }
}

impl<S: Storage> Round<'_, S> {
    /// Writes a new refcount structure and switches to it. Returns whether that was possible.
    pub(super) async fn rebuild(&mut self) -> Result<bool> {
        let old = std::mem::take(&mut self.survey.refcount_clusters);
        for cluster in &old {
            self.survey.references.subtract_one(u64::from(*cluster));
        }
        let Some(layout) = self.layout() else {
            for cluster in old {
                self.survey.references.add(cluster.into(), 1, Mark::None);
            }
            self.give_up("there is no room for a new refcount table and its blocks");
            return Ok(false);
        };
        let entries = self.write_structure(&layout).await?;
        self.switch(&layout).await?;
        self.survey.clusters = self.survey.clusters.max(layout.end());
        for cluster in layout.first..layout.end() {
            self.survey.references.add(cluster, 1, Mark::None);
        }
        self.survey.refcounts =
            RefcountTable::new(self.survey.geometry, entries, self.survey.host(layout.end()).0);
        self.record();
        Ok(true)
    }

    /// Chooses where the new structure goes, and how large it is, itself included.
    fn layout(&self) -> Option<Layout> {
        let survey = &self.survey;
        let cluster_bytes = survey.geometry.cluster_bytes();
        let per_block = survey.geometry.refcount_block_entries();
        let wanted = self.wanted_blocks();
        let mut layout = Layout { first: self.first_free(), blocks: Vec::new(), table_clusters: 1 };
        loop {
            layout.first = self.unreferenced_from(layout.first, layout.end() - layout.first)?;
            let own = layout.first / per_block..=(layout.end() - 1) / per_block;
            let mut blocks: Vec<u64> = wanted.iter().copied().chain(own).collect();
            blocks.sort_unstable();
            blocks.dedup();
            let table_bytes = (blocks.last()? + 1) * 8;
            if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
                return None;
            }
            let table_clusters = table_bytes.div_ceil(cluster_bytes).max(layout.table_clusters);
            // Start, blocks and table only grow, and the table is bounded: this ends.
            let next = Layout { first: layout.first, blocks, table_clusters };
            if next == layout {
                return Some(layout);
            }
            layout = next;
        }
    }

    /// Returns the blocks that hold a refcount other than zero, the new structure aside.
    fn wanted_blocks(&self) -> Vec<u64> {
        let survey = &self.survey;
        let per_block = survey.geometry.refcount_block_entries();
        let used = survey.references.iter_from(0).map(|(cluster, _)| cluster);
        let mut blocks = Vec::new();
        for cluster in used.take_while(|cluster| *cluster < survey.clusters) {
            if blocks.last() != Some(&(cluster / per_block)) {
                blocks.push(cluster / per_block);
            }
        }
        if !survey.is_complete {
            let all = 0..survey.clusters.div_ceil(per_block);
            blocks.extend(all.filter(|index| survey.refcounts.block(*index) != Block::Absent));
            blocks.sort_unstable();
            blocks.dedup();
        }
        blocks
    }

    /// Returns a cluster behind which nothing is used. With references unknown that is the end of
    /// the file.
    pub(super) fn first_free(&self) -> u64 {
        if !self.survey.is_complete {
            return self.survey.clusters;
        }
        let used = self.survey.references.iter_from(0).map(|(cluster, _)| cluster);
        used.take_while(|cluster| *cluster < self.survey.clusters).last().map_or(1, |last| last + 1)
    }

    /// Returns the start of `len` clusters from `first` on that nothing refers to, not even a
    /// damaged entry that points past the end of the file.
    pub(super) fn unreferenced_from(&self, first: u64, len: u64) -> Option<u64> {
        let mut start = first;
        for (cluster, _) in self.survey.references.iter_from(first) {
            if cluster >= start + len {
                break;
            }
            start = cluster + 1;
        }
        (start + len <= self.survey.references.len()).then_some(start)
    }

    /// Writes blocks and table. Returns the entries of the table.
    async fn write_structure(&mut self, layout: &Layout) -> Result<Vec<u64>> {
        let geometry = self.survey.geometry;
        let refcounts = self.survey.refcounts.clone();
        let mut reader = RefcountReader::new(self.storage, &refcounts);
        let table_bytes = layout.table_clusters * geometry.cluster_bytes();
        let mut entries = vec![0; (table_bytes / 8) as usize];
        for (place, index) in layout.blocks.iter().enumerate() {
            let at = self.survey.host(layout.first + place as u64);
            let block = self.fill_block(*index, layout, &mut reader).await?;
            self.write(at, &block).await?;
            entries[*index as usize] = at.0;
        }
        let table = self.survey.host(layout.first + layout.blocks.len() as u64);
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write(table, &bytes).await?;
        Ok(entries)
    }

    async fn fill_block(
        &self,
        index: u64,
        layout: &Layout,
        reader: &mut RefcountReader<'_, S>,
    ) -> Result<Vec<u8>> {
        let geometry = self.survey.geometry;
        let width = self.survey.refcounts.width;
        let per_block = geometry.refcount_block_entries();
        let mut block = vec![0; geometry.cluster_bytes() as usize];
        for within in 0..per_block {
            let cluster = index * per_block + within;
            let refcount = if (layout.first..layout.end()).contains(&cluster) {
                1
            } else if cluster >= self.survey.clusters {
                0
            } else if self.survey.is_complete {
                self.survey.target(cluster, 0)
            } else {
                // An unusable block says nothing.
                self.survey.target(cluster, reader.read(cluster).await.unwrap_or(0))
            };
            if refcount > 0 {
                width.write(&mut block, within as usize, refcount);
            }
        }
        Ok(block)
    }

    /// Makes the new structure durable, then the one that counts.
    async fn switch(&mut self, layout: &Layout) -> Result<()> {
        self.flush().await?;
        let table = layout.first + layout.blocks.len() as u64;
        let clusters = layout.table_clusters as u32;
        let location = RefcountTableLocation { offset: self.survey.host(table), clusters };
        let (at, bytes) = location.header_update();
        self.write(at, &bytes).await?;
        self.survey.header.refcount_table = location;
        self.flush().await
    }

    /// Lists what the new structure put right.
    fn record(&mut self) {
        let survey = &self.survey;
        for finding in &survey.report.findings {
            let leak = matches!(
                finding.kind,
                FindingKind::RefcountMismatch { refcount, references, .. } if refcount > references
            );
            if finding.kind.is_of_refcounts() && (survey.is_complete || !leak) {
                self.report.list_repaired(finding.clone());
            }
        }
        self.report.corruptions_fixed += survey.refcount_corruptions;
        if survey.is_complete {
            self.report.leaks_fixed += survey.report.leaks;
        }
    }
}
