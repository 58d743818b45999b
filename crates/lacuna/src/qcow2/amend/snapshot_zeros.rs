//! Before a downgrade: zero flags in the tables of snapshots.
//!
//! * A cluster whose place nothing but the table references gets its zeros there, any other a new
//!   one; where no place is reserved and nothing lies below, it becomes unallocated.
//! * Zeros and refcounts are durable before a table shows them. Tables are changed in place: each entry
//!   reads the same before and after, so that a crash leaves leaks at worst, and flags that another
//!   run finds.

use std::collections::BTreeSet;

use crate::buffer::Hold;
use crate::qcow2::check::read::{read_vec, read_words};
use crate::qcow2::format::{Header, L1Entry, L2Entry};
use crate::qcow2::image::Image;
use crate::qcow2::overlap::Structure;
use crate::qcow2::snapshots;
use crate::qcow2::write_back::Refcounting;
use crate::storage::{Storage, ZeroMode};
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

impl<S: Storage> Image<S> {
    /// Replaces all zero flags of snapshots, after those of the active map.
    pub(super) async fn expand_zeros_of_snapshots(&self, header: &Header) -> Result<()> {
        let (all, _) = snapshots::read_table(self.storage(), header).await?;
        if all.is_empty() {
            return Ok(());
        }
        // What the active map gave up must not count any more.
        self.write_back(Refcounting::Written).await?;
        self.write_back(Refcounting::Written).await?;
        let mut seen = BTreeSet::new();
        for snapshot in &all {
            let entries = u64::from(snapshot.l1.entries);
            for entry in read_words(self.storage(), snapshot.l1.offset, entries).await? {
                if let Some(table) = L1Entry(entry).table().filter(|table| seen.insert(*table)) {
                    self.expand_table(table, header.backing_name.is_some()).await?;
                }
            }
        }
        Ok(())
    }

    async fn expand_table(&self, table: HostOffset, has_backing: bool) -> Result<()> {
        let geometry = self.geometry();
        let mut bytes = read_vec(self.storage(), table, geometry.cluster_bytes()).await?;
        let (mut freed, mut is_changed) = (Vec::new(), false);
        let references = self.refcount(table).await?;
        for word in bytes.as_chunks_mut::<8>().0 {
            let old = L2Entry::at_start(word, geometry.entry_width());
            if old.is_compressed() || !old.has_zero_flag() {
                continue;
            }
            self.check_table(table)?;
            let place = match old.host() {
                None if !has_backing => None,
                Some(host) if self.refcount(host).await? == references => Some(host),
                shared => {
                    freed.extend(shared);
                    Some(self.new_place(references).await?)
                }
            };
            if let Some(place) = place {
                self.write_zero_cluster(place).await?;
            }
            *word = place.map_or(0, |place| place.0).to_be_bytes();
            is_changed = true;
        }
        if is_changed {
            self.put_table(table, &bytes).await?;
        }
        for cluster in freed.into_iter().map(|host| geometry.host_cluster(host)) {
            // The table that gave it up is durable.
            self.plan(|meta| meta.refcounts.decrease(cluster, references)).await?;
        }
        Ok(())
    }

    async fn refcount(&self, at: HostOffset) -> Result<u64> {
        let geometry = self.geometry();
        if !geometry.is_aligned(at.0) {
            return Err(Error::corrupt(format!("{at}, which a snapshot names, is no cluster")));
        }
        let cluster: HostCluster = geometry.host_cluster(at);
        self.plan(|meta| meta.refcounts.read(cluster)).await
    }

    /// Refuses what is no table of snapshots alone: a damaged one may name anything. One that the active
    /// map had until it got its own is still taken for one of its tables.
    fn check_table(&self, table: HostOffset) -> Result<()> {
        let range = HostRange::new(table, self.geometry().cluster_bytes());
        let meta = self.0.meta.lock();
        if meta.l1.entries.iter().any(|entry| entry.table() == Some(table)) {
            let text =
                format!("The L2 table at {table} has zero flags that the disk's map has not");
            return Err(Error::corrupt(text));
        }
        meta.structures.check(range, Some(Structure::ActiveL2))
    }

    /// A damaged table may name anything.
    fn check_no_metadata(&self, at: HostOffset) -> Result<()> {
        let range = HostRange::new(at, self.geometry().cluster_bytes());
        self.0.meta.lock().structures.check(range, None)
    }

    /// Takes a cluster with as many references as the table has that is to show it.
    async fn new_place(&self, references: u64) -> Result<HostOffset> {
        let place = self.plan(|meta| meta.allocate(1)).await?;
        let cluster = self.geometry().host_cluster(place);
        let more = references.saturating_sub(1);
        self.plan(|meta| meta.refcounts.increase(cluster, more)).await?;
        Ok(place)
    }

    async fn write_zero_cluster(&self, at: HostOffset) -> Result<()> {
        self.check_no_metadata(at)?;
        let range = HostRange::new(at, self.geometry().cluster_bytes());
        self.storage().write_zeroes_at(range, ZeroMode::Allocate, Hold::none()).await
    }

    async fn put_table(&self, table: HostOffset, bytes: &[u8]) -> Result<()> {
        self.write_back(Refcounting::Written).await?;
        self.sync().await?;
        self.write_bytes(table, bytes).await?;
        self.sync().await
    }
}
