//! Brings storage after memory, in an order that any crash survives (B.12).
//!
//! | phase | what is written | why before the next |
//! |---|---|---|
//! | A | new tables and blocks, raised refcounts | nothing may be pointed to that is not there |
//! | – | sync: also the guest bytes and copies that new entries point to | |
//! | B | refcount table entries, or the header's pointer to a moved table | a crash must find every refcount before a pointer uses the cluster |
//! | – | sync, if B wrote | |
//! | C | L2 slices, then L1 entries, header fields | |
//! | – | sync | now the old mapping can never come back |
//! | D | quarantine: host ranges punched, refcounts lowered, clusters reusable | |
//!
//! A crash between any two leaves leaks at worst. The plan is data: [`plan`] makes it, [`Step`]s
//! can be printed and crashed between.

use std::collections::BTreeSet;

use super::format::{Header, L1Entry, L1Location};
use super::meta::{L1Table, Meta};
use super::moved::Moved;
use super::overlap::Structure;
use super::quarantine::{Freed, FreedBy};
use super::refcounts::TableUpdate;
use super::sharing::NewSnapshotTable;
use super::table_cache::Unwritten;
use crate::Result;
use crate::units::{HostCluster, HostOffset, HostRange};

/// One thing to do; each waits for the one before.
#[derive(Debug)]
pub(super) enum Step {
    Sync,
    /// The external data file, before entries that point into it.
    SyncData,
    Write(Vec<Piece>),
    /// All before it is durable. From here on storage may name what is new: it is not written again as
    /// something that nothing names, should the rest be dropped.
    MayBeNamed,
}

/// Bytes for one place.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) offset: HostOffset,
    pub(super) bytes: Vec<u8>,
}

/// A whole write-back.
#[derive(Debug)]
pub(super) struct WriteBack {
    pub(super) steps: Vec<Step>,
    pub(super) undo: Undo,
}

/// What is dirty again where the steps do not all succeed.
#[derive(Debug)]
pub(super) struct Undo {
    l2: Unwritten,
    blocks: Unwritten,
    l1: (BTreeSet<usize>, Moved),
    pin_l1: (BTreeSet<usize>, Moved),
    /// The snapshot table that the steps switch to.
    pub(super) snapshot_table: Option<NewSnapshotTable>,
    size: bool,
    data_sync: bool,
    /// References whose mapping change the steps make durable.
    pub(super) batch: Vec<Freed>,
}

impl Undo {
    fn capture(meta: &Meta) -> Self {
        Self {
            l2: meta.l2.unwritten(),
            blocks: meta.refcounts.blocks.unwritten(),
            l1: meta.l1.unwritten(),
            pin_l1: meta.pins.l1.unwritten(),
            snapshot_table: None,
            size: meta.size_dirty,
            data_sync: meta.needs_data_sync,
            batch: Vec::new(),
        }
    }

    /// What phase A wrote is durable, and may be named from now on.
    pub(super) fn may_be_named(&mut self, meta: &mut Meta) {
        self.l2.fresh_is_durable();
        self.blocks.fresh_is_durable();
        self.l1.1.written();
        self.pin_l1.1.written();
        meta.refcounts.may_be_named();
    }

    /// Makes everything dirty again that the steps were to write.
    pub(super) fn apply(self, meta: &mut Meta) {
        meta.l2.redo(self.l2);
        meta.refcounts.blocks.redo(self.blocks);
        meta.refcounts.redo();
        meta.l1.redo(self.l1);
        meta.pins.l1.redo(self.pin_l1);
        meta.pins.redo_table(self.snapshot_table);
        meta.bitmaps.redo_moves();
        meta.size_dirty |= self.size;
        meta.needs_data_sync |= self.data_sync;
        meta.quarantine.undo(self.batch);
    }
}

/// Whether refcounts are written, or left for later under the dirty bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refcounting {
    Postponed,
    Written,
}

/// Takes everything dirty out of `meta` and puts it into order.
///
/// # Errors
/// `Corrupt` where a table would be written over other metadata.
pub(super) fn plan(meta: &mut Meta, refcounting: Refcounting) -> Result<WriteBack> {
    let mut undo = Undo::capture(meta);
    let mut batch = meta.quarantine.begin_release();
    let mut first = Vec::new();
    let mut second = Vec::new();
    if refcounting == Refcounting::Written {
        first.extend(table_pieces(meta, Structure::RefcountBlock)?);
        second = refcount_table(meta, &mut first);
    }
    let fresh_tables = meta.l2.take_fresh();
    first.extend(
        fresh_tables.into_iter().map(|it| Piece { offset: it.offset, bytes: it.bytes.to_vec() }),
    );
    let l1_pointer = moved_l1(meta, &mut first, &mut batch);
    moved_pins(meta, &mut first);
    undo.snapshot_table = new_snapshot_table(meta, &mut first, &mut batch);
    let mut third = table_pieces(meta, Structure::ActiveL2)?;
    third.extend(l1_sectors(&mut meta.l1));
    third.extend(l1_sectors(&mut meta.pins.l1));
    if refcounting == Refcounting::Written {
        third.extend(meta.bitmaps.take_moves());
    }
    third.extend(header_fields(size_field(meta), l1_pointer));
    third.extend(undo.snapshot_table.as_ref().map(|new| piece(new.location.header_update())));
    undo.batch = batch;
    Ok(WriteBack { steps: order(meta, first, second, third), undo })
}

fn order(meta: &mut Meta, first: Vec<Piece>, second: Vec<Piece>, third: Vec<Piece>) -> Vec<Step> {
    let mut steps = Vec::new();
    let syncs_data = std::mem::take(&mut meta.needs_data_sync);
    if meta.decoder.place == super::mapping::DataPlace::External {
        steps.push(Step::SyncData);
    }
    let pointers_follow = !(second.is_empty() && third.is_empty());
    let syncs_first = !first.is_empty() || syncs_data;
    if !first.is_empty() {
        steps.push(Step::Write(first));
    }
    if syncs_first && pointers_follow {
        steps.push(Step::Sync);
        steps.push(Step::MayBeNamed);
    }
    if !second.is_empty() {
        steps.push(Step::Write(second));
        if !third.is_empty() {
            steps.push(Step::Sync);
        }
    }
    if !third.is_empty() {
        steps.push(Step::Write(third));
    }
    steps.push(Step::Sync);
    steps
}

/// Dirty slices of one kind of table, neighbours joined, checked against all other metadata.
fn table_pieces(meta: &mut Meta, structure: Structure) -> Result<Vec<Piece>> {
    let (fresh, slices) = match structure {
        Structure::RefcountBlock => {
            (meta.refcounts.blocks.take_fresh(), meta.refcounts.blocks.take_dirty())
        }
        _ => (Vec::new(), meta.l2.take_dirty()),
    };
    let mut pieces: Vec<Piece> = Vec::new();
    for slice in fresh.into_iter().chain(slices) {
        let range = HostRange::new(slice.offset, slice.bytes.len() as u64);
        meta.structures.check(range, Some(structure))?;
        match pieces.last_mut() {
            Some(last) if last.offset + last.bytes.len() as u64 == slice.offset => {
                last.bytes.extend_from_slice(&slice.bytes);
            }
            _ => pieces.push(Piece { offset: slice.offset, bytes: slice.bytes.to_vec() }),
        }
    }
    Ok(pieces)
}

/// Adds a moved table to the first phase. Returns what makes readers see it, or the entries.
fn refcount_table(meta: &mut Meta, first: &mut Vec<Piece>) -> Vec<Piece> {
    let TableUpdate { whole, location, sectors } = meta.refcounts.take_unstored();
    let at_new_place = whole.zip(location);
    first.extend(at_new_place.map(|(bytes, to)| Piece { offset: to.offset, bytes }));
    let sectors = sectors.into_iter().map(|(offset, bytes)| Piece { offset, bytes });
    sectors.chain(location.map(|to| piece(to.header_update()))).collect()
}

fn piece<const N: usize>((offset, bytes): (HostOffset, [u8; N])) -> Piece {
    Piece { offset, bytes: bytes.to_vec() }
}

/// Returns the references of a table that nothing names any more.
pub(super) fn freed_table(meta: &mut Meta, range: HostRange) -> Vec<Freed> {
    meta.structures.remove(range);
    let first = meta.geometry().host_cluster(range.start).0;
    let at = meta.in_flight.moment();
    (first..first + meta.geometry().clusters_for(range.len))
        .map(|cluster| Freed { cluster: HostCluster(cluster), by: FreedBy::Other, at })
        .collect()
}

/// Adds a moved L1 table to the first phase. Returns the header fields that switch to it.
fn moved_l1(meta: &mut Meta, first: &mut Vec<Piece>, batch: &mut Vec<Freed>) -> Option<Piece> {
    match std::mem::take(&mut meta.l1.moved) {
        Moved::No => return None,
        Moved::MayBeNamed => {}
        Moved::Unwritten => {
            first.push(whole_l1(&mut meta.l1));
            for old in std::mem::take(&mut meta.l1.replaced) {
                batch.extend(freed_table(meta, old));
            }
            meta.structures.add(meta.l1.range(), Structure::ActiveL1);
        }
    }
    let entries = meta.l1.entries.len() as u32;
    Some(piece(L1Location { offset: meta.l1.offset, entries }.header_update()))
}

/// Adds a moved L1 table of pins to the first phase; the snapshot table that names it comes along.
fn moved_pins(meta: &mut Meta, first: &mut Vec<Piece>) {
    if std::mem::take(&mut meta.pins.l1.moved) == Moved::Unwritten {
        first.push(whole_l1(&mut meta.pins.l1));
    }
}

/// Adds a new snapshot table to the first phase, and what it replaces to what is freed.
fn new_snapshot_table(
    meta: &mut Meta,
    first: &mut Vec<Piece>,
    batch: &mut Vec<Freed>,
) -> Option<NewSnapshotTable> {
    let mut new = meta.pins.take_table()?;
    first.extend(new.piece());
    for old in std::mem::take(&mut new.replaced) {
        meta.structures.remove_inactive_l1(old);
        batch.extend(freed_table(meta, old));
    }
    Some(new)
}

fn whole_l1(l1: &mut L1Table) -> Piece {
    l1.dirty.clear();
    Piece { offset: l1.offset, bytes: L1Entry::encode(&l1.entries) }
}

/// Changed L1 entries, whole sectors.
fn l1_sectors(l1: &mut L1Table) -> Vec<Piece> {
    let dirty = std::mem::take(&mut l1.dirty);
    let sectors: BTreeSet<usize> = dirty.into_iter().map(|at| at / 64).collect();
    let entries = &l1.entries;
    let bytes = |at: usize| L1Entry::encode(&entries[at * 64..entries.len().min(at * 64 + 64)]);
    sectors
        .into_iter()
        .map(|at| Piece { offset: l1.offset + at as u64 * 512, bytes: bytes(at) })
        .collect()
}

/// Joins size and L1 pointer in one write within one sector: a crash must not leave a disk that is
/// larger than its table maps. Between the two lies crypt_method, which is 0 in what we open.
fn header_fields(size: Option<Piece>, l1_pointer: Option<Piece>) -> Option<Piece> {
    match (size, l1_pointer) {
        (Some(mut size), Some(l1_pointer)) => {
            let gap = l1_pointer.offset - size.offset;
            size.bytes.resize(gap as usize, 0);
            size.bytes.extend(l1_pointer.bytes);
            Some(size)
        }
        (size, l1_pointer) => size.or(l1_pointer),
    }
}

fn size_field(meta: &mut Meta) -> Option<Piece> {
    std::mem::take(&mut meta.size_dirty).then(|| piece(Header::size_update(meta.size_bytes)))
}
