//! Gives the pins' L1 table and the snapshot table another place.

use super::table::pin_l1_range;
use crate::qcow2::format::Snapshot;
use crate::qcow2::meta::Meta;
use crate::qcow2::moved::Moved;
use crate::qcow2::need::Planned;
use crate::qcow2::overlap::Structure;
use crate::units::{HostOffset, HostRange};

/// What became of tables that were to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Relocated {
    /// So many clusters.
    Moved(u64),
    /// There is no hole for them.
    NoRoom,
    /// They lie well.
    Stay,
}

impl crate::qcow2::sharing::Pins {
    /// Returns the snapshots of the image as its table is to have them.
    pub(in crate::qcow2) fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }
}

impl Meta {
    /// Has the next write-back switch to a table of `snapshots` at `at`, which was allocated, and free
    /// the L1 tables that it replaces.
    pub(in crate::qcow2) fn switch_snapshot_table(
        &mut self,
        snapshots: Vec<Snapshot>,
        at: HostOffset,
        replaced: impl IntoIterator<Item = HostRange>,
    ) -> Planned<()> {
        self.put_snapshot_table(snapshots, at, None)?;
        if let Some(new) = &mut self.pins.new_table {
            new.replaced.extend(replaced);
        }
        Ok(())
    }

    /// Moves the snapshot table and the L1 table of the pins to the lowest hole before cluster `limit`,
    /// or as much behind it as they take, if one of them lies behind that. Nobody else may change pins meanwhile.
    pub(in crate::qcow2) fn move_snapshot_table(&mut self, limit: u64) -> Planned<Relocated> {
        self.before_metadata_change()?;
        let geometry = *self.geometry();
        let pin = self.pins.snapshots.iter().position(Snapshot::is_pin);
        let l1 = pin.and_then(|at| pin_l1_range(&self.pins.snapshots[at]));
        let of_l1 = |l1: Option<HostRange>| l1.map_or(0, |range| geometry.clusters_for(range.len));
        let of_table = self.snapshot_table_clusters(&self.pins.snapshots)?;
        // The old ones are there until the new ones are.
        let limit = limit + of_l1(l1) + of_table;
        let is_behind =
            |range: &HostRange| !range.is_empty() && geometry.host_cluster(range.start).0 >= limit;
        let l1 = l1.filter(is_behind);
        if !is_behind(&self.pins.table_range) && l1.is_none() {
            return Ok(Relocated::Stay);
        }
        let (l1_clusters, clusters) = (of_l1(l1), of_l1(l1) + of_table);
        let Some(at) = self.allocate_below(clusters, limit, &mut 0)? else {
            return Ok(Relocated::NoRoom);
        };
        let mut snapshots = self.pins.snapshots.clone();
        if let (Some(pin), Some(_)) = (pin, l1) {
            snapshots[pin].l1.offset = at;
            (self.pins.l1.offset, self.pins.l1.moved) = (at, Moved::Unwritten);
            self.structures.add(self.pins.l1.range(), Structure::InactiveL1);
        }
        let table = at + l1_clusters * geometry.cluster_bytes();
        self.put_snapshot_table(snapshots, table, l1)?;
        Ok(Relocated::Moved(clusters))
    }
}
