//! Refcounts put right where they are.

use super::super::check::FindingKind;
use super::super::check::read::read_bytes;
use super::super::check::refcounts::Block;
use super::Round;
use crate::Result;
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};

/// Runs of freed clusters that are remembered for punching; more stay allocated on the host.
const MAX_FREED_RUNS: usize = 1 << 18;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Down,
    Up,
}

impl<S: Storage> Round<'_, S> {
    /// Raises refcounts that are lower than the references, and flushes.
    pub(super) async fn raise(&mut self) -> Result<()> {
        self.adjust(Direction::Up).await?;
        self.flush().await
    }

    /// Lowers refcounts that are higher than the references, if all references are known, and
    /// flushes.
    pub(super) async fn lower(&mut self) -> Result<()> {
        if self.survey.is_complete {
            self.adjust(Direction::Down).await?;
            self.flush().await?;
        }
        Ok(())
    }

    async fn adjust(&mut self, direction: Direction) -> Result<()> {
        let per_block = self.survey.geometry.refcount_block_entries();
        for index in 0..self.survey.clusters.div_ceil(per_block) {
            if let Some(offset) = self.usable_block(index) {
                self.adjust_block(index, offset, direction).await?;
            }
        }
        Ok(())
    }

    /// Returns where a block lies that is a refcount block and nothing else. What an entry with reserved bits
    /// names was not counted, and may be anything.
    fn usable_block(&self, index: u64) -> Option<HostOffset> {
        let table = &self.survey.refcounts;
        if table.entry(index).has_reserved_bits() {
            return None;
        }
        let Block::At(offset) = table.block(index) else { return None };
        let cluster = self.survey.geometry.host_cluster(offset).0;
        let is_ours = cluster < self.survey.clusters && self.survey.references.count(cluster) == 1;
        is_ours.then_some(offset)
    }

    async fn adjust_block(
        &mut self,
        index: u64,
        offset: HostOffset,
        direction: Direction,
    ) -> Result<()> {
        let geometry = self.survey.geometry;
        let old = read_bytes(self.storage, offset, geometry.cluster_bytes() as usize).await?;
        let mut new = old.to_vec();
        let first = index * geometry.refcount_block_entries();
        let end = (first + geometry.refcount_block_entries()).min(self.survey.clusters);
        for cluster in first..end {
            self.adjust_one(cluster, (cluster - first) as usize, &mut new, direction);
        }
        self.write_changes(offset, &old, &new).await
    }

    fn adjust_one(&mut self, cluster: u64, within: usize, block: &mut [u8], direction: Direction) {
        let width = self.survey.refcounts.width;
        let refcount = width.read(block, within);
        let references = self.survey.target(cluster, refcount);
        let wrong = match direction {
            Direction::Down => refcount > references,
            Direction::Up => refcount < references,
        };
        if !wrong {
            return;
        }
        width.write(block, within, references);
        let kind =
            FindingKind::RefcountMismatch { cluster: HostCluster(cluster), refcount, references };
        if !self.quiet.iter().any(|clusters| clusters.contains(&cluster)) {
            self.report.record_repaired(kind, 1);
        }
        if references == 0 {
            self.note_freed(cluster);
        }
    }

    fn note_freed(&mut self, cluster: u64) {
        let cluster_bytes = self.survey.geometry.cluster_bytes();
        let start = self.survey.host(cluster);
        if let Some(last) = self.freed.last_mut().filter(|last| last.end() == start) {
            last.len += cluster_bytes;
        } else if self.freed.len() < MAX_FREED_RUNS {
            self.freed.push(HostRange::new(start, cluster_bytes));
        }
    }
}
