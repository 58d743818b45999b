//! Where the clusters of a new image go that is allocated before it is written to.
//!
//! A replay of the order in which QEMU allocates, by kind of preallocation: mapped clusters lie
//! as if they had been written one after the other, with L2 tables between them; reserved ones in
//! one run behind all other metadata, with L2 tables wherever there is room. Or, which is ours, all
//! tables first.
//!
//! * Always: guest order is host order.

use super::super::format::{Geometry, L2Entry};
use super::layout::Layout;
use crate::block::Preallocation;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

/// Bytes of an L2 table that QEMU looks at in one step.
const SLICE_BYTES: u64 = 65536;
/// No request of QEMU has more bytes.
const MAX_REQUEST_BYTES: u64 = i32::MAX as u64;

/// Guest clusters in order, mapped to host clusters in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    guest: u64,
    host: u64,
    clusters: u64,
}

/// What is mapped, and by which tables.
#[derive(Debug, Default)]
pub(super) struct Allocated {
    /// One per L1 entry, or none at all.
    pub(super) l2_tables: Vec<HostCluster>,
    runs: Vec<Run>,
}

impl Allocated {
    /// Takes clusters for a disk of `clusters` clusters in the image file.
    pub(super) fn in_image(
        layout: &mut Layout,
        clusters: u64,
        mode: Preallocation,
    ) -> Result<Self> {
        let mut allocated = Self::default();
        match mode {
            Preallocation::Off => {}
            Preallocation::Metadata => allocated.interleave(layout, clusters)?,
            Preallocation::Falloc | Preallocation::Full => allocated.line_up(layout, clusters)?,
        }
        Ok(allocated)
    }

    /// Takes tables first, and then one run for a disk of `clusters` clusters (002-7).
    pub(super) fn behind_tables(layout: &mut Layout, clusters: u64) -> Result<Self> {
        let mut allocated = Self::default();
        allocated.take_tables(layout, clusters)?;
        if clusters > 0 {
            let host = layout.allocate(clusters)?.0;
            allocated.push(Run { guest: 0, host, clusters });
        }
        Ok(allocated)
    }

    /// Takes tables alone: each cluster is mapped to its own offset of the data file.
    pub(super) fn in_data_file(layout: &mut Layout, clusters: u64) -> Result<Self> {
        let mut allocated = Self::default();
        allocated.take_tables(layout, clusters)?;
        allocated.push(Run { guest: 0, host: 0, clusters });
        Ok(allocated)
    }

    fn take_tables(&mut self, layout: &mut Layout, clusters: u64) -> Result<()> {
        for _ in 0..clusters.div_ceil(layout.geometry().l2_entries()) {
            self.l2_tables.push(layout.allocate(1)?);
        }
        Ok(())
    }

    /// Data and tables in the order of the disk, as if every cluster were written in turn.
    fn interleave(&mut self, layout: &mut Layout, clusters: u64) -> Result<()> {
        let per_request = MAX_REQUEST_BYTES >> layout.geometry().cluster_bits();
        let mut guest = 0;
        while guest < clusters {
            let end = clusters.min(guest + per_request);
            guest = self.request(layout, guest, end)?;
        }
        Ok(())
    }

    /// One request of QEMU: goes on as long as host clusters follow each other. Returns where the
    /// next one begins.
    fn request(&mut self, layout: &mut Layout, start: u64, end: u64) -> Result<u64> {
        let geometry = *layout.geometry();
        let slice = SLICE_BYTES.min(geometry.cluster_bytes()) / geometry.entry_width().bytes();
        let (mut guest, mut behind) = (start, None);
        while guest < end {
            if guest / geometry.l2_entries() == self.l2_tables.len() as u64 {
                self.l2_tables.push(layout.allocate(1)?);
            }
            let wanted = (slice - guest % slice).min(end - guest);
            let (host, clusters) = match behind {
                None => (layout.allocate(wanted)?.0, wanted),
                Some(at) => (at, layout.allocate_at(at, wanted)?),
            };
            if clusters == 0 {
                break;
            }
            self.push(Run { guest, host, clusters });
            guest += clusters;
            behind = Some(host + clusters);
        }
        Ok(guest)
    }

    /// All data in one run behind a refcount table that counts it; then the tables.
    fn line_up(&mut self, layout: &mut Layout, clusters: u64) -> Result<()> {
        let tables = clusters.div_ceil(layout.geometry().l2_entries()) + 1;
        let host = layout.move_table_to_end(clusters + tables)?;
        if layout.allocate_at(host, clusters)? != clusters {
            return Err(Error::invalid("No host cluster is free behind the last one in use"));
        }
        self.push(Run { guest: 0, host, clusters });
        self.take_tables(layout, clusters)
    }

    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.host + last.clusters == run.host => last.clusters += run.clusters,
            _ => self.runs.push(run),
        }
    }

    /// Returns the host bytes from the first data cluster to the end of the last.
    pub(super) fn data_range(&self, geometry: &Geometry) -> HostRange {
        let (Some(first), Some(last)) = (self.runs.first(), self.runs.last()) else {
            return HostRange::new(HostOffset(0), 0);
        };
        let start = geometry.host_offset(HostCluster(first.host));
        let end = geometry.host_offset(HostCluster(last.host + last.clusters));
        HostRange::new(start, end - start)
    }

    /// Returns the words of an L2 table. Extended entries map no subcluster yet.
    pub(super) fn table_words(&self, geometry: &Geometry, index: u64) -> Vec<u64> {
        let width = geometry.entry_width().bytes() as usize / 8;
        let first = index * geometry.l2_entries();
        let end = first + geometry.l2_entries();
        let mut words = vec![0; geometry.l2_entries() as usize * width];
        let from = self.runs.partition_point(|run| run.guest + run.clusters <= first);
        for run in self.runs[from..].iter().take_while(|run| run.guest < end) {
            for guest in run.guest.max(first)..end.min(run.guest + run.clusters) {
                let host = HostCluster(run.host + (guest - run.guest));
                let entry = L2Entry::standard(geometry.host_offset(host));
                words[(guest - first) as usize * width] = entry.word;
            }
        }
        words
    }
}
