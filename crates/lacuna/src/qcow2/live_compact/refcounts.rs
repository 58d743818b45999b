//! Moving refcount blocks and the refcount table.
//!
//! * Always: a copy with the newest counts is written before the table names it, and the table names it
//!   before a pointer relies on a count that only the copy has: phases A, B and C of a write-back.
//! * Always: the old place is free once storage names it no more, which takes a write-back with refcounts.
//! * Never: a block moves that will count nothing once the file is cut; the cut drops it.

use super::super::image::Image;
use super::super::meta::Meta;
use super::super::need::{Need, Planned};
use super::super::overlap::Structure;
use super::super::write_back::Refcounting;
use super::moves::{Holes, Outcome};
use crate::Result;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

impl<S: Storage> Image<S> {
    /// Moves refcount blocks that lie behind the goal, and then the table, about so many bytes; durably.
    /// Returns how many clusters; none where nothing is left to move, or has no room.
    pub(super) async fn move_refcounts(&self, holes: &mut Holes, slice_bytes: u64) -> Result<u64> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let blocks = self.0.meta.lock().refcounts.blocks_to_move(holes.goal);
        let mut clusters = 0;
        for index in blocks {
            if clusters * cluster_bytes >= slice_bytes {
                break;
            }
            match self.plan(|meta| meta.move_refcount_block(index, holes)).await? {
                Outcome::Moved => clusters += 1,
                Outcome::NoRoom => break,
                Outcome::Gone | Outcome::Shared => {}
            }
        }
        if clusters == 0 {
            clusters = self.plan(|meta| meta.move_refcount_table(holes)).await?;
        }
        if clusters > 0 {
            self.write_back(Refcounting::Written).await?;
        }
        Ok(clusters)
    }

    /// Moves the active L1 table and the refcount table, where their ends lie behind the goal; durably. Later,
    /// what has one cluster has filled the holes. Returns how many clusters.
    pub(super) async fn move_runs(&self, goal: u64) -> Result<u64> {
        let holes = &mut Holes::below(goal);
        let l1 = self.0.meta.lock().l1.range();
        let mut clusters = match self.plan(|meta| meta.move_active_l1(holes)).await? {
            Outcome::Moved => self.geometry().clusters_for(l1.len),
            _ => 0,
        };
        clusters += self.plan(|meta| meta.move_refcount_table(holes)).await?;
        if clusters > 0 {
            self.write_back(Refcounting::Written).await?;
        }
        Ok(clusters)
    }
}

impl Meta {
    fn move_refcount_block(&mut self, index: u64, holes: &mut Holes) -> Planned<Outcome> {
        self.before_metadata_change()?;
        let Some(old) = self.refcounts.block_place(index)? else { return Ok(Outcome::Gone) };
        let cluster = self.geometry().host_cluster(old);
        let is_known = self.structures.check(self.cluster_at(old), Some(Structure::RefcountBlock));
        if cluster.0 < holes.goal || is_known.is_err() {
            return Ok(Outcome::Gone);
        }
        if self.settled_refcount(cluster)? != Some(1) {
            return Ok(Outcome::Shared);
        }
        let generation = self.refcounts.blocks.generation();
        let loaded = self.loaded_block.take_if(|it| it.offset == old);
        let Some(loaded) = loaded.filter(|it| it.generation == generation) else {
            return Err(Need::RefcountBlock(old).into());
        };
        let place = (holes.goal, &mut holes.cursor);
        let new = match self.refcounts.move_block(index, &loaded.bytes, place) {
            Ok(Some(new)) => new,
            Ok(None) => return Ok(Outcome::NoRoom),
            Err(stop) => {
                // It need not be read again for what is missing.
                self.loaded_block = Some(loaded);
                return Err(stop);
            }
        };
        let range = self.cluster_at(new);
        self.note_allocated(range)?;
        self.structures.add(range, Structure::RefcountBlock);
        Ok(Outcome::Moved)
    }

    /// Moves the table, if its end lies behind the goal. Returns how many clusters.
    fn move_refcount_table(&mut self, holes: &mut Holes) -> Planned<u64> {
        self.before_metadata_change()?;
        let old = self.refcounts.table_range();
        let clusters = self.refcounts.table_clusters();
        if self.geometry().host_cluster(old.start).0 + clusters <= holes.goal {
            return Ok(0);
        }
        let Some(new) = self.allocate_below(clusters, holes.goal, &mut 0)? else { return Ok(0) };
        self.refcounts.move_table(new);
        for (range, structure) in self.refcounts.take_new_metadata() {
            self.structures.add(range, structure);
        }
        Ok(clusters)
    }

    const fn cluster_at(&self, at: HostOffset) -> HostRange {
        HostRange::new(at, self.decoder.geometry.cluster_bytes())
    }
}
