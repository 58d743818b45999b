//! Finds host clusters by the entries that show them, in all tables there are: of the disk, of snapshots,
//! of pins.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::pins::ClusterSet;
use crate::Result;
use crate::qcow2::format::L2Entry;
use crate::qcow2::image::Image;
use crate::qcow2::pointers::{Owner, Pointer};
use crate::qcow2::table_walk::{Piece, TableWalk};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset};

/// Memory for a cluster, and for each entry that shows it.
const SHOWN_BYTES: u64 = 100;
const POINTER_BYTES: u64 = size_of::<Pointer>() as u64;

/// A walk under way.
pub(crate) struct HostWalk {
    tables: TableWalk,
    /// What [`Meta::histories`](crate::qcow2::meta::Meta) was when it began.
    moment: u64,
}

/// How a part of a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostStep {
    /// All tables were seen.
    Over,
    /// So many bytes of tables were read.
    Read(u64),
    /// Tables of snapshots are others than they were: what was found may be wrong.
    Changed,
}

/// Clusters of data that entries show.
#[derive(Debug, Default)]
pub(crate) struct Hosts {
    shown: ClusterSet,
    /// Those that guests may write to in place.
    written: ClusterSet,
}

impl Hosts {
    fn note(&mut self, owner: Owner, entry: L2Entry, host: HostCluster) {
        self.shown.insert(host);
        if matches!(owner, Owner::Active(_)) && entry.is_copied() {
            self.written.insert(host);
        }
    }

    /// Says whether nobody writes to a cluster where it lies.
    pub(crate) fn is_frozen(&self, host: HostCluster) -> bool {
        self.shown.contains(host) && !self.written.contains(host)
    }

    /// Returns all in the order of the file; the others, too, that guests write to, if asked for.
    pub(crate) fn in_order(&self, with_written: bool) -> Vec<HostCluster> {
        let all = self.shown.in_order();
        all.filter(|host| with_written || self.is_frozen(*host)).collect()
    }
}

/// A cluster and the entries that show it.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(super) host: HostOffset,
    pub(super) pointers: Vec<Pointer>,
}

/// Clusters whose entries are wanted, and those that were found.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pointers: HashMap<u64, Vec<Pointer>, RandomState>,
    memory_bytes: u64,
}

impl Wanted {
    /// Begins with clusters, for whose entries there is so much memory. What does not fit is missed, so
    /// that the cluster is left alone.
    pub(crate) fn new(hosts: impl Iterator<Item = HostCluster>, memory_bytes: u64) -> Self {
        let pointers: HashMap<_, _, _> = hosts.map(|host| (host.0, Vec::new())).collect();
        let taken = SHOWN_BYTES * pointers.len() as u64;
        Self { pointers, memory_bytes: memory_bytes.saturating_sub(taken) }
    }

    fn note(&mut self, pointer: Pointer, host: HostCluster) {
        if let Some(found) = self.pointers.get_mut(&host.0)
            && self.memory_bytes >= POINTER_BYTES
        {
            self.memory_bytes -= POINTER_BYTES;
            found.push(pointer);
        }
    }

    /// Returns a cluster with what was found.
    pub(crate) fn take(&mut self, host: HostCluster, cluster_bits: u32) -> Option<Shown> {
        let pointers = self.pointers.remove(&host.0)?;
        Some(Shown { host: HostOffset(host.0 << cluster_bits), pointers })
    }
}

impl<S: Storage> Image<S> {
    /// Begins a walk over all entries.
    ///
    /// # Errors
    /// `Corrupt` where snapshots or pins are damaged; else what reading gives.
    pub(crate) async fn walk_hosts(&self) -> Result<HostWalk> {
        let _pins_stay = self.begin_pinning().await?;
        let moment = self.0.meta.lock().histories;
        Ok(HostWalk { tables: TableWalk::new(self.other_tables().await?), moment })
    }

    /// Goes on for about so many bytes, and notes clusters of data.
    pub(crate) async fn find_hosts(
        &self,
        walk: &mut HostWalk,
        hosts: &mut Hosts,
        slice_bytes: u64,
    ) -> Result<HostStep> {
        let has_subclusters = self.geometry().has_subclusters();
        self.note_entries(walk, slice_bytes, |pointer, entry, host| {
            // What only keeps a place has no bytes.
            if has_subclusters || !entry.has_zero_flag() {
                hosts.note(pointer.table.owner, entry, host);
            }
        })
        .await
    }

    /// Goes on for about so many bytes, and notes the entries of clusters that are wanted.
    pub(crate) async fn find_entries(
        &self,
        walk: &mut HostWalk,
        wanted: &mut Wanted,
        slice_bytes: u64,
    ) -> Result<HostStep> {
        self.note_entries(walk, slice_bytes, |pointer, _, host| wanted.note(pointer, host)).await
    }

    async fn note_entries(
        &self,
        walk: &mut HostWalk,
        slice_bytes: u64,
        mut note: impl FnMut(Pointer, L2Entry, HostCluster),
    ) -> Result<HostStep> {
        let _pins_stay = self.begin_pinning().await?;
        if self.0.meta.lock().histories != walk.moment {
            return Ok(HostStep::Changed);
        }
        let (geometry, mut read_bytes) = (self.geometry(), 0);
        while read_bytes < slice_bytes {
            let Some(piece) = self.read_entries(&mut walk.tables).await? else {
                return Ok(HostStep::Over);
            };
            read_bytes += piece.bytes();
            for (pointer, entry) in Piece::entries(&piece, &geometry) {
                if let Some(host) = entry.host().filter(|host| geometry.is_aligned(host.0)) {
                    note(pointer, entry, geometry.host_cluster(host));
                }
            }
        }
        Ok(HostStep::Read(read_bytes))
    }
}

impl HostWalk {
    pub(super) const fn moment(&self) -> u64 {
        self.moment
    }
}
