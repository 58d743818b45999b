//! Moving tables of snapshots: L2 tables that only they have or share with the disk, and their L1 tables.
//!
//! * Always: copies are written to fresh clusters first; L1 tables that name them are too; then one
//!   snapshot table switches to all of these at once, by 12 bytes of the header.
//! * Always: maps of snapshots that somebody reads by are changed under the same lock.
//! * Nobody opens a snapshot meanwhile, until storage has it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use foldhash::fast::RandomState;

use super::super::format::{L1Entry, Snapshot};
use super::super::image::Image;
use super::super::in_flight::{Token, Touch};
use super::super::meta::Meta;
use super::super::need::{Need, Planned};
use super::super::overlap::Structure;
use super::super::pointers::redirected;
use super::super::view::SnapshotMap;
use super::moves::Holes;
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};

/// L2 tables that move at once.
const TABLES_AT_ONCE: usize = 16;

/// The file may become so much longer than it needs to be, so that tables find room.
const MOST_ROOM_CLUSTERS: u64 = 64;

const NOTHING: GuestRange = GuestRange::new(GuestOffset(0), 0);

/// What moves at once.
#[derive(Default)]
struct Batch {
    /// L2 tables: from, to and how many snapshots' L1 tables name it.
    tables: HashMap<u64, (HostOffset, u64), RandomState>,
    /// L1 tables: whose, from and to.
    l1: Vec<(usize, HostRange, HostOffset)>,
    /// Clusters that they take.
    clusters: u64,
}

impl Batch {
    /// Returns what an entry of an L1 table becomes, if its table moves.
    fn moved(&self, entry: L1Entry) -> Option<L1Entry> {
        let (to, _) = self.tables.get(&entry.table()?.0)?;
        Some(L1Entry(redirected(entry.0, *to)))
    }
}

impl<S: Storage> Image<S> {
    /// Moves some tables of snapshots that lie behind the goal. Returns how many clusters; none where
    /// nothing is left to move, or has no room. Nobody may change pins meanwhile.
    pub(super) async fn move_snapshots(&self, holes: &Holes) -> Result<u64> {
        if self.header().snapshots.count == 0 {
            return Ok(0);
        }
        let holes = &mut Holes { goal: holes.goal + self.room_to_switch()?, ..*holes };
        let begin = |meta: &mut Meta| {
            meta.before_metadata_change()?;
            Ok(meta.in_flight.begin(Touch::Map, NOTHING).map_err(Need::Turn)?)
        };
        let token = self.plan(begin).await?;
        let hold = self.hold(token);
        let mut batch = Batch::default();
        self.copy_tables(&mut batch, token, holes).await?;
        if !self.copy_l1_tables(&mut batch, token, holes).await? || batch.l1.is_empty() {
            return Ok(0);
        }
        let is_done = self.plan(|meta| meta.switch_snapshots(&batch, token, holes)).await?;
        drop(hold);
        Ok(if is_done { batch.clusters } else { 0 })
    }

    /// Returns how many clusters tables take beside those that they replace: so much more room there has
    /// to be.
    fn room_to_switch(&self) -> Result<u64> {
        let meta = self.0.meta.lock();
        let snapshots = meta.pins.snapshots();
        let l1 = snapshots.iter().map(|it| meta.geometry().clusters_for(it.l1.range().len));
        Ok((l1.sum::<u64>() + meta.snapshot_table_clusters(snapshots)?).min(MOST_ROOM_CLUSTERS))
    }

    /// Returns what keeps freed clusters from being reused while a write that was dropped is on its way.
    async fn hold_of_read(&self) -> Result<Hold> {
        self.enter(Touch::Read, NOTHING).await
    }

    async fn copy_tables(&self, batch: &mut Batch, token: Token, holes: &mut Holes) -> Result<()> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let goal = holes.goal * cluster_bytes;
        for (from, (times, pins)) in self.other_tables().await?.range(goal..) {
            if pins.is_some() {
                continue;
            }
            if batch.tables.len() == TABLES_AT_ONCE {
                break;
            }
            let Some(to) = self.plan(|meta| meta.reserve_below(1, token, holes)).await? else {
                break;
            };
            let from = HostRange::new(HostOffset(*from), cluster_bytes);
            let hold = self.hold_of_read().await?;
            drop(self.copy_bytes(from, to, hold).await?);
            batch.tables.insert(from.start.0, (to, u64::from(*times)));
            batch.clusters += 1;
        }
        Ok(())
    }

    /// Writes L1 tables that lie behind the goal, or name a table that moves. False where one has no
    /// room.
    async fn copy_l1_tables(
        &self,
        batch: &mut Batch,
        token: Token,
        holes: &mut Holes,
    ) -> Result<bool> {
        let snapshots = self.0.meta.lock().pins.snapshots().to_vec();
        let geometry = self.geometry();
        for (index, snapshot) in snapshots.iter().enumerate() {
            let from = snapshot.l1.range();
            if snapshot.is_pin() || from.is_empty() {
                continue;
            }
            let mut bytes = self.load(from.start, from.len, "L1 table of a snapshot").await?;
            let is_behind = geometry.host_cluster(from.start).0 >= holes.goal;
            if !redirect(&mut bytes, batch) && !is_behind {
                continue;
            }
            let clusters = geometry.clusters_for(from.len);
            let place = self.plan(|meta| meta.reserve_below(clusters, token, holes)).await?;
            let Some(to) = place else { return Ok(false) };
            bytes.set_hold(self.hold_of_read().await?);
            let (result, bytes): (_, Buffer) = self.0.storage.write_at(to, bytes).await;
            drop(bytes);
            result?;
            batch.l1.push((index, from, to));
            batch.clusters += clusters;
        }
        Ok(true)
    }
}

/// Has the entries of an L1 table name tables where they will be. Says whether one does.
fn redirect(l1: &mut [u8], batch: &Batch) -> bool {
    let mut is_changed = false;
    for word in l1.as_chunks_mut::<8>().0 {
        if let Some(moved) = batch.moved(L1Entry(u64::from_be_bytes(*word))) {
            *word = moved.0.to_be_bytes();
            is_changed = true;
        }
    }
    is_changed
}

impl Meta {
    /// Takes note that somebody reads by the map of a snapshot.
    pub(in super::super) fn note_snapshot_map(&mut self, map: &Arc<SnapshotMap>) {
        self.snapshot_maps.retain(|map| map.strong_count() > 0);
        self.snapshot_maps.push(Arc::downgrade(map));
    }

    /// Hands out the lowest hole that is so large, which goes back with the request.
    fn reserve_below(
        &mut self,
        clusters: u64,
        token: Token,
        holes: &mut Holes,
    ) -> Planned<Option<HostOffset>> {
        self.before_metadata_change()?;
        let found = match clusters {
            1 => self.allocate_below(1, holes.goal, &mut holes.cursor)?,
            _ => self.allocate_below(clusters, holes.goal, &mut 0)?,
        };
        let Some(at) = found else { return Ok(None) };
        let range = HostRange::new(at, clusters * self.geometry().cluster_bytes());
        // What was cached of a table that once was there is not what will be.
        for cluster in 0..clusters {
            self.l2.forget(at + cluster * self.geometry().cluster_bytes());
        }
        self.in_flight.reserve(token, range);
        Ok(Some(at))
    }

    /// Has everything name the new places, if all is still as it was found.
    fn switch_snapshots(
        &mut self,
        batch: &Batch,
        token: Token,
        holes: &mut Holes,
    ) -> Planned<bool> {
        self.before_metadata_change()?;
        let active = self.active_among(batch);
        if !self.is_as_found(batch, &active)? {
            return Ok(false);
        }
        let (snapshots, replaced) = self.snapshots_after(batch);
        let clusters = self.snapshot_table_clusters(&snapshots)?;
        let Some(at) = self.reserve_below(clusters, token, holes)? else { return Ok(false) };
        // All is at hand: from here on nothing stops half-way.
        self.switch_snapshot_table(snapshots, at, replaced)?;
        for (_, from, to) in &batch.l1 {
            self.structures.add_inactive_l1(HostRange::new(*to, from.len));
        }
        self.in_flight.all_linked(token);
        // Who found tables of snapshots before looks for them anew.
        self.histories += 1;
        self.redirect_active(batch, &active);
        self.redirect_maps(batch);
        for (from, (to, times)) in &batch.tables {
            let count = times + times_active(&active, *from);
            self.refcounts.increase(self.geometry().host_cluster(*to), count - 1)?;
            self.free_times(self.geometry().host_cluster(HostOffset(*from)), count)?;
        }
        self.needs_data_sync = true;
        Ok(true)
    }

    /// Returns the entries of the active L1 table that name tables which move: index and table.
    fn active_among(&self, batch: &Batch) -> Vec<(usize, u64)> {
        let named = self.l1.entries.iter().enumerate();
        let tables = named.filter_map(|(index, entry)| Some((index, entry.table()?.0)));
        tables.filter(|(_, table)| batch.tables.contains_key(table)).collect()
    }

    fn is_as_found(&mut self, batch: &Batch, active: &[(usize, u64)]) -> Planned<bool> {
        self.refcounts.blocks.make_room_for(2 * batch.clusters);
        // Twice: a slice that came to hand may have put out another one.
        for (from, (to, times)) in batch.tables.iter().chain(&batch.tables) {
            let count = Some(times + times_active(active, *from));
            self.refcounts.read(self.geometry().host_cluster(*to))?;
            if self.settled_refcount(self.geometry().host_cluster(HostOffset(*from)))? != count {
                return Ok(false);
            }
        }
        for (_, from, _) in &batch.l1 {
            for cluster in self.geometry().host_clusters(*from) {
                if self.settled_refcount(HostCluster(cluster))? != Some(1) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Returns the snapshots as they are to be, and where their L1 tables were.
    fn snapshots_after(&self, batch: &Batch) -> (Vec<Snapshot>, Vec<HostRange>) {
        let mut snapshots = self.pins.snapshots().to_vec();
        for (index, _, to) in &batch.l1 {
            snapshots[*index].l1.offset = *to;
        }
        (snapshots, batch.l1.iter().map(|(_, from, _)| *from).collect())
    }

    fn redirect_active(&mut self, batch: &Batch, active: &[(usize, u64)]) {
        for (index, _) in active {
            if let Some(moved) = batch.moved(self.l1.entries[*index]) {
                self.l1.set(*index, moved);
                if let Some(table) = moved.table() {
                    let range = HostRange::new(table, self.geometry().cluster_bytes());
                    self.structures.add(range, Structure::ActiveL2);
                }
            }
        }
    }

    fn redirect_maps(&self, batch: &Batch) {
        for map in self.snapshot_maps.iter().filter_map(Weak::upgrade) {
            for entry in map.l1.lock().iter_mut() {
                if let Some(moved) = batch.moved(*entry) {
                    *entry = moved;
                }
            }
        }
    }
}

fn times_active(active: &[(usize, u64)], table: u64) -> u64 {
    active.iter().filter(|(_, it)| *it == table).count() as u64
}
