//! Moving what bitmaps have: clusters of bits, tables, the directory.
//!
//! * Always: nobody marks, stores or edits bitmaps while a place is copied and until storage names the copy.
//!   Guests wait only if they need that: for the first change after the bitmaps were stored, or an intent.
//! * The directory is replaced as by an edit, which waits for a moment without changes.
//! * Never: something moves that others reference too, or that belongs to a bitmap that contradicts itself.

use super::super::bitmaps::{Moves, directory};
use super::super::format::{BitmapCluster, BitmapEntry};
use super::super::image::Image;
use super::super::in_flight::{Token, Touch};
use super::super::meta::Meta;
use super::super::need::{Need, Planned};
use super::super::write_back::Refcounting;
use super::moves::Holes;
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};

/// About so many bytes move at once, while the bitmaps stand still.
const BYTES_AT_ONCE: u64 = 1 << 20;

const NOTHING: GuestRange = GuestRange::new(GuestOffset(0), 0);

/// What moves at once.
struct Batch {
    token: Token,
    words: Moves,
    /// A table that moves: where its entry lies, and what that says then.
    table: Option<(HostOffset, BitmapEntry)>,
    clusters: u64,
}

impl<S: Storage> Image<S> {
    /// Moves some of what bitmaps have behind the goal, durably. Returns how many clusters; none where
    /// nothing is left to move, or has no room.
    pub(super) async fn move_bitmaps(&self, holes: &mut Holes) -> Result<u64> {
        if self.header().valid_bitmaps().is_none() {
            return Ok(0);
        }
        match self.move_bits_and_tables(holes).await? {
            0 => self.move_directory(holes.goal).await,
            clusters => Ok(clusters),
        }
    }

    async fn move_bits_and_tables(&self, holes: &mut Holes) -> Result<u64> {
        let _edits = self.0.bitmap_edits.take().await;
        let _turn = self.take_bitmap_turn().await?;
        if self.0.meta.lock().bitmaps.outdated {
            self.reload_bitmaps().await?;
        }
        let begin = |meta: &mut Meta| {
            meta.before_any_change()?;
            Ok(meta.in_flight.begin(Touch::Map, NOTHING).map_err(Need::Turn)?)
        };
        let token = self.plan(begin).await?;
        let hold = self.hold(token);
        let mut batch = Batch { token, words: Moves::default(), table: None, clusters: 0 };
        self.copy_some(&mut batch, holes).await?;
        let clusters = batch.clusters;
        if clusters > 0 {
            self.plan(|meta| meta.link_bitmaps(&mut batch)).await?;
            self.write_back(Refcounting::Written).await?;
        }
        drop(hold);
        Ok(clusters)
    }

    /// Copies clusters of bits of one bitmap, or its table.
    async fn copy_some(&self, batch: &mut Batch, holes: &mut Holes) -> Result<()> {
        let header = self.header();
        for (at, entry) in directory(self.storage(), &header).await? {
            // One that is broken is left as it is.
            if entry.check(&header.geometry, self.size()).is_err() {
                continue;
            }
            // The table first: it may need a run of holes.
            self.copy_table(batch, at, &entry, holes).await?;
            if batch.clusters == 0 {
                self.copy_bits(batch, &entry, holes).await?;
            }
            if batch.clusters > 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn copy_bits(
        &self,
        batch: &mut Batch,
        entry: &BitmapEntry,
        holes: &mut Holes,
    ) -> Result<()> {
        let Ok(table) = self.checked_table(entry).await else { return Ok(()) };
        let cluster_bytes = self.geometry().cluster_bytes();
        for (index, word) in (0..).zip(table) {
            let BitmapCluster::Data(from) = word.cluster() else { continue };
            let from = HostRange::new(from, cluster_bytes);
            if !self.plan(|meta| meta.is_bitmap_behind(from, holes.goal)).await? {
                continue;
            }
            let Some(to) = self.copy_out(batch, from, holes).await? else { break };
            batch.words.add(entry.table_offset + index * 8, to, from);
            if batch.clusters * cluster_bytes >= BYTES_AT_ONCE {
                break;
            }
        }
        Ok(())
    }

    async fn copy_table(
        &self,
        batch: &mut Batch,
        at: HostOffset,
        entry: &BitmapEntry,
        holes: &mut Holes,
    ) -> Result<()> {
        let from = HostRange::new(entry.table_offset, u64::from(entry.table_entries) * 8);
        if !self.plan(|meta| meta.is_bitmap_behind(from, holes.goal)).await? {
            return Ok(());
        }
        if let Some(to) = self.copy_out(batch, from, holes).await? {
            batch.words.add(at, to, from);
            batch.table = Some((at, BitmapEntry { table_offset: to, ..entry.clone() }));
        }
        Ok(())
    }

    /// Copies what lies in a range to the lowest hole; nothing where there is none.
    async fn copy_out(
        &self,
        batch: &mut Batch,
        from: HostRange,
        holes: &mut Holes,
    ) -> Result<Option<HostOffset>> {
        let clusters = self.geometry().clusters_for(from.len);
        let token = batch.token;
        let place = self.plan(|meta| meta.reserve_for_bitmap(clusters, token, holes)).await?;
        let Some(to) = place else { return Ok(None) };
        // While a copy that was dropped is on its way, its place is not reused.
        let hold = self.enter(Touch::Read, NOTHING).await?;
        drop(self.copy_bytes(from, to, hold).await?);
        batch.clusters += clusters;
        Ok(Some(to))
    }

    /// Moves the directory.
    async fn move_directory(&self, goal: u64) -> Result<u64> {
        let is_behind = |image: &Self| {
            let header = image.header();
            let end = header.valid_bitmaps().map(|it| it.directory_offset + it.directory_bytes);
            end.is_some_and(|end| image.geometry().clusters_for(end.0) > goal)
        };
        if !is_behind(self) {
            return Ok(0);
        }
        let rest = self.bitmaps_at_rest().await?;
        match is_behind(self) {
            true => rest.move_below(goal).await,
            false => Ok(0),
        }
    }
}

impl Meta {
    /// Says whether something of a bitmap lies behind the goal, and may be moved: it is where data may
    /// be, and nothing else references it.
    fn is_bitmap_behind(&mut self, range: HostRange, goal: u64) -> Planned<bool> {
        let clusters = self.geometry().host_clusters(range);
        let is_apart = self.structures.check(range, None).is_ok();
        let is_there = self.geometry().is_aligned(range.start.0) && range.end() <= self.zero_from;
        if clusters.end <= goal || !is_apart || !is_there {
            return Ok(false);
        }
        for cluster in clusters {
            if self.settled_refcount(HostCluster(cluster))? != Some(1) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands out the lowest hole that is so large, which goes back with the request.
    fn reserve_for_bitmap(
        &mut self,
        clusters: u64,
        token: Token,
        holes: &mut Holes,
    ) -> Planned<Option<HostOffset>> {
        self.before_any_change()?;
        let found = match clusters {
            1 => self.allocate_below(1, holes.goal, &mut holes.cursor)?,
            _ => self.allocate_below(clusters, holes.goal, &mut 0)?,
        };
        if let Some(at) = found {
            let len = clusters * self.geometry().cluster_bytes();
            self.in_flight.reserve(token, HostRange::new(at, len));
        }
        Ok(found)
    }

    /// Has the next write-back name the copies.
    fn link_bitmaps(&mut self, batch: &mut Batch) -> Planned<()> {
        self.before_any_change()?;
        self.bitmaps.add_moves(std::mem::take(&mut batch.words));
        if let Some((at, entry)) = &batch.table {
            self.bitmaps.move_table(*at, entry);
        }
        self.in_flight.all_linked(batch.token);
        self.needs_data_sync = true;
        Ok(())
    }
}
