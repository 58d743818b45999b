//! The snapshot table made right: version 3 demands the 64-bit VM state size and the disk size,
//! and nobody reads entries with more than 1 KiB of extra data.
//!
//! What is beyond that is the only thing that goes. The new table has every snapshot of the old one, in its order, and goes to fresh clusters; 12
//! bytes of the header switch to it.

use super::super::check::FindingKind;
use super::super::check::refcounts::Block;
use super::super::check::references::Mark;
use super::Round;
use crate::Result;
use crate::qcow2::format::{Snapshot, SnapshotTableLocation};
use crate::storage::Storage;
use crate::units::HostRange;

/// A new table that is written but not yet in force.
pub(super) struct NewTable {
    location: SnapshotTableLocation,
    old: HostRange,
}

impl<S: Storage> Round<'_, S> {
    /// Writes a complete table to free clusters, where one is needed, and flushes. Its clusters
    /// get their refcounts with all others.
    pub(super) async fn prepare_snapshots(&mut self) -> Result<()> {
        let survey = &mut *self.survey;
        let Some(snapshots) = survey.snapshots.table.take() else { return Ok(()) };
        let old = survey.header.snapshots;
        // An entry without a disk size was made when the disk was as large as it is now.
        let Ok(bytes) = Snapshot::encode_table(&snapshots, survey.header.size_bytes) else {
            self.give_up("the snapshot table would be too large with all that it must have");
            return Ok(());
        };
        let clusters = survey.geometry.clusters_for(bytes.len() as u64);
        let Some(first) = self.unreferenced_from(self.first_free(), clusters) else {
            self.give_up("there is no room for a new snapshot table");
            return Ok(());
        };
        let offset = self.survey.host(first);
        self.write(offset, &bytes).await?;
        self.flush().await?;
        let survey = &mut *self.survey;
        let per_block = survey.geometry.refcount_block_entries();
        for cluster in first..first + clusters {
            survey.references.add(cluster, 1, Mark::None);
            let block = survey.refcounts.block(cluster / per_block);
            survey.needs_rebuild |= !matches!(block, Block::At(_));
        }
        survey.clusters = survey.clusters.max(first + clusters);
        self.quiet.push(first..first + clusters);
        let location = SnapshotTableLocation { offset, ..old };
        let old = HostRange::new(old.offset, survey.snapshots.table_bytes);
        self.new_snapshots = Some(NewTable { location, old });
        Ok(())
    }

    /// Switches to the new table, whose refcounts are durable now, and flushes.
    pub(super) async fn switch_snapshots(&mut self) -> Result<()> {
        let Some(new) = self.new_snapshots.take() else { return Ok(()) };
        let (at, bytes) = new.location.header_update();
        self.write(at, &bytes).await?;
        self.flush().await?;
        let survey = &mut *self.survey;
        survey.header.snapshots = new.location;
        let first = survey.geometry.host_cluster(new.old.start).0;
        let last = first + survey.geometry.clusters_for(new.old.len);
        for cluster in first..last {
            survey.references.subtract_one(cluster);
        }
        self.quiet.push(first..last);
        for index in std::mem::take(&mut survey.snapshots.incomplete) {
            self.report.record_repaired(FindingKind::SnapshotIncomplete { index }, 1);
        }
        for (index, bytes) in std::mem::take(&mut survey.snapshots.too_large) {
            self.report.record_repaired(FindingKind::SnapshotExtraTooLarge { index, bytes }, 1);
        }
        Ok(())
    }
}
