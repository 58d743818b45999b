//! Pins: entries that reference each shared cluster once, at offsets of no disk.
//!
//! * Always: a table of pins is referenced once, by the L1 table of the snapshot that holds them, so
//!   that it may be changed where it lies.
//! * A pin's offset counts pins: its tables are filled from the first entry on.

use std::collections::HashMap;

use super::NewSnapshotTable;
use crate::qcow2::format::{Geometry, L1Entry, L2Entry, Snapshot, SubclusterBitmap};
use crate::qcow2::mapping::shared_entry;
use crate::qcow2::meta::{L1Table, Meta};
use crate::qcow2::need::{Need, Planned};
use crate::qcow2::overlap::Structure;
use crate::qcow2::quarantine::FreedBy;
use crate::qcow2::view::View;
use crate::units::{GuestOffset, HostCluster, HostOffset, HostRange};

/// What is known of the pins of an open image.
#[derive(Debug)]
pub(in crate::qcow2) struct Pins {
    /// Whether the image was looked at for pins. All else is nothing until then.
    pub(super) is_loaded: bool,
    /// The L1 table of the snapshot that holds them; no entries where there is none.
    pub(in crate::qcow2) l1: L1Table,
    /// The snapshot table as it is to be.
    pub(super) snapshots: Vec<Snapshot>,
    /// Where the newest snapshot table lies.
    pub(super) table_range: HostRange,
    /// A snapshot table that storage does not have.
    pub(super) new_table: Option<NewSnapshotTable>,
    keepers: ClusterSet,
    /// No free entry lies before this one.
    pub(super) free_from: GuestOffset,
}

impl Default for Pins {
    fn default() -> Self {
        Self {
            is_loaded: false,
            l1: L1Table::new(Vec::new(), HostOffset(0)),
            snapshots: Vec::new(),
            table_range: HostRange::new(HostOffset(0), 0),
            new_table: None,
            keepers: ClusterSet::default(),
            free_from: GuestOffset(0),
        }
    }
}

impl Pins {
    /// Says whether a cluster has a pin.
    pub(in crate::qcow2) fn holds(&self, cluster: HostCluster) -> bool {
        self.keepers.contains(cluster)
    }

    /// Returns how many clusters have a pin.
    pub(super) fn count(&self) -> u64 {
        self.keepers.count()
    }

    /// There are no pins any more.
    pub(super) fn forget_all(&mut self) {
        self.l1 = L1Table::new(Vec::new(), HostOffset(0));
        self.keepers = ClusterSet::default();
        self.free_from = GuestOffset(0);
    }

    /// Takes note of a pin. False where the cluster has one already.
    pub(super) fn note(&mut self, cluster: HostCluster) -> bool {
        self.keepers.insert(cluster)
    }
}

impl Meta {
    /// Returns where the entries of the pins end.
    pub(super) fn pins_end(&self) -> GuestOffset {
        GuestOffset(self.pins.l1.entries.len() as u64 * self.geometry().l2_coverage_bytes())
    }

    /// Finds an entry for one more pin, and makes room where there is none.
    pub(in crate::qcow2) fn free_pin(&mut self) -> Planned<GuestOffset> {
        loop {
            match self.find_free_pin()? {
                Some(at) => return Ok(at),
                None => self.grow_pin_l1()?,
            }
        }
    }

    /// Finds an entry for one more pin, in a table that is there; nothing where all L1 entries have
    /// a table without room.
    fn find_free_pin(&mut self) -> Planned<Option<GuestOffset>> {
        while self.pins.free_from < self.pins_end() {
            let at = self.pins.free_from;
            if self.table_in(View::Pins, at)?.is_none() {
                self.make_pin_table(at)?;
            }
            if self.entry_in(View::Pins, at)?.unwrap_or_default() == L2Entry::UNALLOCATED {
                return Ok(Some(at));
            }
            self.pins.free_from = at + self.geometry().cluster_bytes();
        }
        Ok(None)
    }

    fn make_pin_table(&mut self, at: GuestOffset) -> Planned<()> {
        let table = self.allocate(1).map_err(|stop| stop.context("L2 table of pins"))?;
        self.l2.make_fresh(table);
        let index = self.geometry().l1_index(at) as usize;
        // The flag counts in tables of the disk only; QEMU sets and clears it in all alike.
        self.pins.l1.set(index, L1Entry::new(table));
        let range = HostRange::new(table, self.geometry().cluster_bytes());
        self.structures.add(range, Structure::PinL2);
        Ok(())
    }

    /// Returns the entry that shares a cluster.
    pub(super) fn sharing_entry(&self, host: HostOffset) -> L2Entry {
        sharing_entry(self.geometry(), host)
    }

    /// Pins a cluster at `at`, which is free: the pin takes over one reference that the caller has.
    pub(in crate::qcow2) fn set_pin(&mut self, at: GuestOffset, host: HostOffset) -> Planned<()> {
        self.set_entry_in(View::Pins, at, self.sharing_entry(host))?;
        self.pins.free_from = at + self.geometry().cluster_bytes();
        let cluster = self.geometry().host_cluster(host);
        self.pins.note(cluster);
        Ok(())
    }

    /// Clears the pin at `at` if nothing but it references its cluster. Says whether it did.
    pub(super) fn drop_pin_if_unused(&mut self, at: GuestOffset) -> Planned<bool> {
        let entry = self.entry_in(View::Pins, at)?.unwrap_or_default();
        let Some(host) = entry.host() else { return Ok(false) };
        let cluster = self.geometry().host_cluster(host);
        if self.refcounts.read(cluster)? != 1 || self.quarantine.pending(cluster) > 0 {
            return Ok(false);
        }
        if self.quarantine.is_crowded() || self.l2.is_crowded() {
            return Err(Need::WriteBack.into());
        }
        self.set_entry_in(View::Pins, at, L2Entry::UNALLOCATED)?;
        self.free(cluster, FreedBy::Always)?;
        self.pins.keepers.remove(cluster);
        self.pins.free_from = self.pins.free_from.min(at);
        Ok(true)
    }
}

/// Returns the entry that shares a cluster, and that pins it: no COPIED, all of it data.
pub(in crate::qcow2) fn sharing_entry(geometry: &Geometry, host: HostOffset) -> L2Entry {
    match geometry.has_subclusters() {
        true => shared_entry(host).with_subclusters(SubclusterBitmap::ALL_DATA),
        false => shared_entry(host),
    }
}

/// A set of clusters: a bit each, in words that exist only where there are some.
#[derive(Debug, Default)]
pub(super) struct ClusterSet(HashMap<u64, u64, foldhash::fast::RandomState>);

impl ClusterSet {
    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        self.0.get(&(cluster.0 / 64)).is_some_and(|word| word >> (cluster.0 % 64) & 1 == 1)
    }

    fn count(&self) -> u64 {
        self.0.values().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds a cluster. False where it was there.
    pub(super) fn insert(&mut self, cluster: HostCluster) -> bool {
        let word = self.0.entry(cluster.0 / 64).or_default();
        let before = *word;
        *word |= 1 << (cluster.0 % 64);
        before != *word
    }

    /// Returns all in the order of the file.
    pub(super) fn in_order(&self) -> impl Iterator<Item = HostCluster> + '_ {
        let mut words: Vec<(u64, u64)> = self.0.iter().map(|(at, word)| (*at, *word)).collect();
        words.sort_unstable();
        words.into_iter().flat_map(|(at, word)| {
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| HostCluster(at * 64 + bit))
        })
    }

    fn remove(&mut self, cluster: HostCluster) {
        if let Some(word) = self.0.get_mut(&(cluster.0 / 64)) {
            *word &= !(1 << (cluster.0 % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_clusters_knows_what_was_put_in_and_taken_out() {
        let mut set = ClusterSet::default();
        for cluster in [0, 63, 64, 1 << 40] {
            assert!(set.insert(HostCluster(cluster)));
            assert!(!set.insert(HostCluster(cluster)));
        }
        set.remove(HostCluster(63));
        set.remove(HostCluster(999));
        assert_eq!(set.count(), 3);
        assert!(set.contains(HostCluster(64)) && !set.contains(HostCluster(63)));
        assert!(!set.contains(HostCluster(1)) && set.contains(HostCluster(1 << 40)));
    }
}
