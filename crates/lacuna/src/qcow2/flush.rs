//! Flushing: write-backs are planned, executed and followed by the release of freed clusters.
//!
//! * Always: one write-back at a time; none overtakes metadata writes that an earlier, dropped one
//!   left with the driver.
//! * Always: a write-back that is dropped or fails leaves everything dirty again.
//! * Always: after a failed flush nothing is acknowledged any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::{StreamExt, stream};

use super::image::{Image, METADATA};
use super::in_flight::InFlight;
use super::meta::Meta;
use super::need::Planned;
use super::options::GuestDiscard;
use super::quarantine::{Freed, FreedBy};
use super::write_back::{self, Piece, Refcounting, Step, Undo};
use crate::buffer::{Buffer, Hold, Release};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{ErrorKind, Result};

/// How many references are taken off under one lock.
const REFERENCES_AT_ONCE: usize = 1024;
/// How many metadata writes are in flight at once.
const WRITES_AT_ONCE: usize = 16;

impl<S: Storage> Image<S> {
    pub(super) fn usual_refcounting(&self) -> Refcounting {
        let crowded = self.0.meta.lock().refcounts.blocks.is_crowded();
        if self.0.lazy && !crowded { Refcounting::Postponed } else { Refcounting::Written }
    }

    /// Makes everything durable that was acknowledged before. Flushes that arrive while one runs
    /// share the next one.
    pub(super) async fn flush_all(&self) -> Result<()> {
        let mine = self.0.flushes_asked.fetch_add(1, Ordering::SeqCst) + 1;
        let turn = self.0.turn.take().await;
        if self.0.flushes_done.load(Ordering::SeqCst) >= mine {
            return Ok(());
        }
        let covered = self.0.flushes_asked.load(Ordering::SeqCst);
        self.write_back_in_turn(self.usual_refcounting()).await?;
        self.0.flushes_done.fetch_max(covered, Ordering::SeqCst);
        drop(turn);
        self.store_bitmaps_if_due().await
    }

    pub(super) async fn write_back(&self, refcounting: Refcounting) -> Result<()> {
        let _turn = self.0.turn.take().await;
        self.write_back_in_turn(refcounting).await
    }

    pub(super) async fn write_back_in_turn(&self, refcounting: Refcounting) -> Result<()> {
        self.wait_for_metadata_writes().await;
        if let Some(error) = &self.0.meta.lock().failed {
            return Err(error.clone().context("The image was closed to changes"));
        }
        self.0.write_backs.fetch_add(1, Ordering::Relaxed);
        let planned = write_back::plan(&mut self.0.meta.lock(), refcounting);
        let work = match planned {
            Ok(work) => work,
            Err(error) => return Err(self.mark_corrupt(error).await),
        };
        let mut undo = UndoOnDrop { image: self, undo: Some(work.undo) };
        self.execute(work.steps, &mut undo).await?;
        let batch = undo.done();
        self.release(batch).await
    }

    /// A dropped write-back leaves writes with the driver; nothing may overtake them.
    pub(super) async fn wait_for_metadata_writes(&self) {
        self.wait_until(|in_flight| !in_flight.has_metadata_writes()).await;
    }

    /// Waits until that is so of the requests under way; they are looked at after each that ends.
    pub(super) async fn wait_until(&self, is_so: impl Fn(&InFlight) -> bool + Send) {
        loop {
            let over = {
                let meta = self.0.meta.lock();
                match is_so(&meta.in_flight) {
                    true => return,
                    false => meta.in_flight.wait(),
                }
            };
            over.await;
        }
    }

    async fn execute(&self, steps: Vec<Step>, undo: &mut UndoOnDrop<'_, S>) -> Result<()> {
        for step in steps {
            match step {
                Step::Sync => self.sync().await?,
                Step::SyncData => self.sync_storage(self.data_storage()).await?,
                Step::MayBeNamed => undo.may_be_named(),
                Step::Write(pieces) => {
                    let mut writes = stream::iter(pieces)
                        .map(|piece| self.write_piece(piece))
                        .buffer_unordered(WRITES_AT_ONCE);
                    while let Some(result) = writes.next().await {
                        result?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Flushes the file of the image: an open image has no other way to do so.
    ///
    /// After a failed flush nobody knows what is durable: nothing more may be acknowledged. A
    /// failed write, in contrast, leaves everything dirty and may be tried again.
    pub(super) async fn sync(&self) -> Result<()> {
        self.sync_storage(&self.0.storage).await
    }

    async fn sync_storage(&self, storage: &S) -> Result<()> {
        let result = storage.flush().await;
        if let Err(error) = &result {
            self.0.meta.lock().failed = Some(error.clone());
        }
        result
    }

    pub(super) async fn write_piece(&self, piece: Piece) -> Result<()> {
        let mut buffer = Buffer::from(&piece.bytes[..]);
        self.0.meta.lock().in_flight.metadata_write_begins();
        buffer.set_hold(Hold::new(Arc::clone(&self.0) as Arc<dyn Release>, METADATA));
        let (result, _buffer) = self.0.storage.write_at(piece.offset, buffer).await;
        result.map_err(|error| error.context(format!("Writing metadata at {}", piece.offset)))
    }

    /// Takes references off the refcounts whose mapping change is durable, as far as no older
    /// request is in the way, and gives host space back.
    async fn release(&self, batch: Vec<Freed>) -> Result<()> {
        let ready = {
            let mut meta = self.0.meta.lock();
            let meta = &mut *meta;
            meta.quarantine.ready(batch, &meta.in_flight)
        };
        if ready.is_empty() {
            return Ok(());
        }
        let mut rest = KeepOnDrop { image: self, ready, done: 0 };
        self.punch_last_references(&rest.ready).await?;
        while rest.done < rest.ready.len() {
            let (ready, done) = (&rest.ready, &mut rest.done);
            self.plan(|meta| meta.drop_references(ready, done)).await?;
        }
        Ok(())
    }

    async fn punch_last_references(&self, ready: &[Freed]) -> Result<()> {
        if !ready.iter().any(|freed| self.gives_back(freed.by)) {
            return Ok(());
        }
        let mut runs: Vec<HostRange> = Vec::new();
        let cluster_bytes = self.geometry().cluster_bytes();
        for group in ready.chunk_by(|a, b| a.cluster == b.cluster) {
            let cluster = group[0].cluster;
            let refcount = self.plan(|meta| meta.refcounts.read(cluster)).await?;
            if refcount != group.len() as u64 || !group.iter().all(|it| self.gives_back(it.by)) {
                continue;
            }
            let start = HostOffset(cluster.0 * cluster_bytes);
            match runs.last_mut() {
                Some(last) if last.end() == start => last.len += cluster_bytes,
                _ => runs.push(HostRange::new(start, cluster_bytes)),
            }
        }
        for run in runs {
            // A dropped punch stays with the driver: nothing is handed out before it is over (D.1-4).
            self.0.meta.lock().in_flight.metadata_write_begins();
            let hold = Hold::new(Arc::clone(&self.0) as Arc<dyn Release>, METADATA);
            match self.0.storage.punch_hole_at(run, hold).await {
                // The map says what the guest reads; the space is only a wish (D.1-6).
                Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn gives_back(&self, by: FreedBy) -> bool {
        match by {
            FreedBy::Always => true,
            FreedBy::CopyOnWrite => false,
            FreedBy::Guest => self.0.discard.guest == GuestDiscard::Unmap && self.0.discard.request,
            FreedBy::Other => self.0.discard.other,
        }
    }
}

/// Puts everything back as dirty when a write-back is dropped or fails half-way.
struct UndoOnDrop<'a, S: Storage> {
    image: &'a Image<S>,
    undo: Option<Undo>,
}

impl<S: Storage> UndoOnDrop<'_, S> {
    fn may_be_named(&mut self) {
        if let Some(undo) = &mut self.undo {
            undo.may_be_named(&mut self.image.0.meta.lock());
        }
    }

    /// Everything is in storage. Returns the references that can go now.
    fn done(&mut self) -> Vec<Freed> {
        let mut meta = self.image.0.meta.lock();
        meta.l2.written();
        meta.refcounts.blocks.written();
        let stored = meta.refcounts.stored();
        let Some(mut undo) = self.undo.take() else { return Vec::new() };
        let mut header = self.image.0.header.lock();
        if let Some(new) = &undo.snapshot_table {
            header.snapshots = new.location;
        }
        if let Some(location) = stored.location {
            header.refcount_table = location;
        }
        for range in stored.replaced.into_iter().chain(meta.bitmaps.moves_stored()) {
            undo.batch.extend(write_back::freed_table(&mut meta, range));
        }
        undo.batch
    }
}

impl<S: Storage> Drop for UndoOnDrop<'_, S> {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo.apply(&mut self.image.0.meta.lock());
        }
    }
}

/// Keeps the references that were not yet taken off when a release is dropped half-way.
struct KeepOnDrop<'a, S: Storage> {
    image: &'a Image<S>,
    ready: Vec<Freed>,
    done: usize,
}

impl<S: Storage> Drop for KeepOnDrop<'_, S> {
    fn drop(&mut self) {
        let rest = self.ready.split_off(self.done);
        self.image.0.meta.lock().quarantine.keep(rest);
    }
}

impl Meta {
    /// Takes references off that no durable mapping shows any more, some at a time: `done` counts.
    fn drop_references(&mut self, ready: &[Freed], done: &mut usize) -> Planned<()> {
        for freed in ready.iter().skip(*done).take(REFERENCES_AT_ONCE) {
            self.drop_reference(freed.cluster)?;
            *done += 1;
        }
        Ok(())
    }

    fn drop_reference(&mut self, cluster: HostCluster) -> Planned<()> {
        let left = self.refcounts.decrease(cluster, 1)?;
        self.quarantine.released(cluster);
        if left == 0 {
            self.forget_zero_cluster(cluster);
        }
        if left == 0 && self.structures.remove_cluster(cluster) {
            let offset = self.geometry().host_offset(cluster);
            self.l2.forget(offset);
            self.refcounts.blocks.forget(offset);
        }
        Ok(())
    }
}
