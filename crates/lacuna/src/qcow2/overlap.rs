//! Where the metadata lies, so that no write hits it by mistake (B.12, QEMU's `cached` set).
//!
//! Known: header, active L1 table, refcount table and blocks, snapshot table, bitmap directory,
//! active L2 tables, L1 tables of snapshots. L2 tables of snapshots are not (they would have to
//! be read).

use std::collections::BTreeMap;

use crate::units::{HostCluster, HostRange};
use crate::{Error, Result};

type Map<V> = std::collections::HashMap<u64, V, foldhash::fast::RandomState>;

/// A kind of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Structure {
    ActiveL1,
    ActiveL2,
    BitmapDirectory,
    Header,
    InactiveL1,
    PinL2,
    RefcountBlock,
    RefcountTable,
    SnapshotTable,
}

impl Structure {
    const fn name(self) -> &'static str {
        match self {
            Self::ActiveL1 => "the active L1 table",
            Self::ActiveL2 => "an active L2 table",
            Self::BitmapDirectory => "the bitmap directory",
            Self::Header => "the header",
            Self::InactiveL1 => "a snapshot's L1 table",
            Self::PinL2 => "an L2 table of pins",
            Self::RefcountBlock => "a refcount block",
            Self::RefcountTable => "the refcount table",
            Self::SnapshotTable => "the snapshot table",
        }
    }

    /// Says whether one who writes tables of this kind may write the other.
    const fn covers(self, other: Self) -> bool {
        self as u8 == other as u8 || matches!((self, other), (Self::ActiveL2, Self::PinL2))
    }
}

/// Which cluster holds which metadata.
#[derive(Debug)]
pub(super) struct Structures {
    cluster_bits: u32,
    by_cluster: Map<Structure>,
    /// Clusters of snapshots' L1 tables as disjoint ranges, start to end: a hostile image may
    /// claim 65536 large tables over each other.
    inactive_l1: BTreeMap<u64, u64>,
}

impl Structures {
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, by_cluster: Map::default(), inactive_l1: BTreeMap::new() }
    }

    fn clusters(&self, range: HostRange) -> std::ops::Range<u64> {
        let end = range.start.0.saturating_add(range.len);
        range.start.0 >> self.cluster_bits..end.div_ceil(1 << self.cluster_bits)
    }

    pub(super) fn add(&mut self, range: HostRange, structure: Structure) {
        for cluster in self.clusters(range) {
            self.by_cluster.entry(cluster).or_insert(structure);
        }
    }

    pub(super) fn add_inactive_l1(&mut self, range: HostRange) {
        let mut new = self.clusters(range);
        // Swallow the neighbours that touch it; each is swallowed once.
        while let Some((start, end)) = self.inactive_l1.range(..=new.end).next_back() {
            let (start, end) = (*start, *end);
            if end < new.start {
                break;
            }
            self.inactive_l1.remove(&start);
            new = new.start.min(start)..new.end.max(end);
        }
        self.inactive_l1.insert(new.start, new.end);
    }

    /// Forgets an L1 table of a snapshot that is somewhere else now.
    pub(super) fn remove_inactive_l1(&mut self, range: HostRange) {
        let gone = self.clusters(range);
        let touched = self.inactive_l1.range(..gone.end).rev();
        let touched: Vec<_> = touched.take_while(|(_, end)| **end > gone.start).collect();
        let touched: Vec<(u64, u64)> =
            touched.into_iter().map(|(start, end)| (*start, *end)).collect();
        for (start, end) in touched {
            self.inactive_l1.remove(&start);
            let rest = [(start, end.min(gone.start)), (start.max(gone.end), end)];
            self.inactive_l1.extend(rest.into_iter().filter(|(start, end)| start < end));
        }
    }

    fn touches_inactive_l1(&self, clusters: &std::ops::Range<u64>) -> bool {
        let before = self.inactive_l1.range(..clusters.end).next_back();
        before.is_some_and(|(_, end)| *end > clusters.start)
    }

    pub(super) fn remove(&mut self, range: HostRange) {
        for cluster in self.clusters(range) {
            self.by_cluster.remove(&cluster);
        }
    }

    /// Forgets a cluster. Says whether it was metadata.
    pub(super) fn remove_cluster(&mut self, cluster: HostCluster) -> bool {
        self.by_cluster.remove(&cluster.0).is_some()
    }

    /// Refuses a write that touches metadata other than `own` (`None`: guest data).
    pub(super) fn check(&self, range: HostRange, own: Option<Structure>) -> Result<()> {
        for cluster in self.clusters(range) {
            match self.by_cluster.get(&cluster) {
                Some(found) if !own.is_some_and(|own| own.covers(*found)) => {
                    return Err(overlap(range, *found));
                }
                _ => {}
            }
        }
        match self.touches_inactive_l1(&self.clusters(range)) {
            true => Err(overlap(range, Structure::InactiveL1)),
            false => Ok(()),
        }
    }
}

fn overlap(range: HostRange, found: Structure) -> Error {
    Error::corrupt(format!(
        "A write of {} bytes at host offset {} would overwrite {}; the image is damaged, run check",
        range.len,
        range.start,
        found.name()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostOffset;

    #[test]
    fn a_write_may_touch_its_own_kind_of_metadata_only() {
        let mut structures = Structures::new(16);
        structures.add(HostRange::new(HostOffset(0x30000), 8), Structure::ActiveL1);
        let inside = HostRange::new(HostOffset(0x2ffff), 2);
        assert!(structures.check(inside, None).is_err());
        assert!(structures.check(inside, Some(Structure::ActiveL1)).is_ok());
        assert!(structures.check(HostRange::new(HostOffset(0x20000), 0x10000), None).is_ok());
        structures.add_inactive_l1(HostRange::new(HostOffset(0x50000), 0x20000));
        structures.add_inactive_l1(HostRange::new(HostOffset(0x60000), 0x30000));
        structures.add_inactive_l1(HostRange::new(HostOffset(0x100000), 8));
        for (start, is_free) in
            [(0x40000, true), (0x50000, false), (0x8ffff, false), (0x90000, true)]
        {
            let range = HostRange::new(HostOffset(start), 1);
            assert_eq!(structures.check(range, None).is_ok(), is_free, "{start:#x}");
        }
        structures.remove_inactive_l1(HostRange::new(HostOffset(0x60000), 0x10000));
        for (start, is_free) in [(0x50000, false), (0x60000, true), (0x70000, false)] {
            let range = HostRange::new(HostOffset(start), 1);
            assert_eq!(structures.check(range, None).is_ok(), is_free, "{start:#x}");
        }
        structures.remove(HostRange::new(HostOffset(0x30000), 8));
        assert!(structures.check(inside, None).is_ok());
    }
}
