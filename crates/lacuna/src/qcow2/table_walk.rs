//! A walk through all tables with entries: of the disk, of snapshots, of pins.
//!
//! * Always: a table is read piece by piece, what is cached of it being newer.
//! * A table that changes behind the walk is not seen again.

use std::collections::{BTreeMap, HashSet};

use foldhash::fast::RandomState;

use super::format::{Geometry, L1Entry, L2Entry};
use super::image::Image;
use super::meta::Meta;
use super::pointers::{Owner, Pointer, Table};
use super::snapshots;
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;

/// Bytes of a table that are read at once.
const PIECE_BYTES: u64 = 64 << 10;

/// Tables that snapshots or pins have: by place, how often, and the entry of the pins that names it.
pub(super) type Others = BTreeMap<u64, (u32, Option<u32>)>;

/// A walk under way.
#[derive(Debug)]
pub(super) struct TableWalk {
    others: Others,
    /// Those of them that the disk has too.
    seen: HashSet<u64, RandomState>,
    at: At,
}

/// The next piece.
#[derive(Clone, Copy, Debug)]
enum At {
    /// Of the table that this entry of the active L1 table names.
    Active { index: usize, done: u64 },
    /// Of the first other table from this one on.
    Others { table: u64, done: u64 },
}

/// A part of a table.
pub(super) struct Piece {
    table: Table,
    /// Where in the table it begins.
    from: u64,
    bytes: Buffer,
}

impl Piece {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns the entries, and where each is.
    pub(super) fn entries(
        &self,
        geometry: &Geometry,
    ) -> impl Iterator<Item = (Pointer, L2Entry)> + '_ {
        let (table, width) = (self.table, geometry.entry_width());
        let first = (self.from / width.bytes()) as u32;
        let entries = (first..).zip(self.bytes.chunks(width.bytes() as usize));
        entries
            .map(move |(index, entry)| (Pointer { table, index }, L2Entry::at_start(entry, width)))
    }
}

impl TableWalk {
    pub(super) fn new(others: Others) -> Self {
        let at = At::Active { index: 0, done: 0 };
        Self { others, seen: HashSet::default(), at }
    }

    /// Returns the next table, and from which of its bytes on.
    fn next_piece(&mut self, meta: &Meta) -> Option<(Table, u64)> {
        while let At::Active { index, done } = self.at {
            let Some(entry) = meta.l1.entries.get(index) else {
                self.at = At::Others { table: 0, done: 0 };
                break;
            };
            self.at = match done + PIECE_BYTES < meta.geometry().cluster_bytes() {
                true => At::Active { index, done: done + PIECE_BYTES },
                false => At::Active { index: index + 1, done: 0 },
            };
            if let Some(at) = placed(meta, *entry) {
                return Some((self.active_table(at, index), done));
            }
        }
        self.next_other(meta)
    }

    fn active_table(&mut self, at: HostOffset, index: usize) -> Table {
        let others = self.others.get(&at.0).map_or(0, |(times, _)| *times);
        if others > 0 {
            self.seen.insert(at.0);
        }
        Table { at, owner: Owner::Active(index as u32), times: others + 1 }
    }

    fn next_other(&mut self, meta: &Meta) -> Option<(Table, u64)> {
        loop {
            let At::Others { table, done } = self.at else { return None };
            let (place, (times, pins)) = self.others.range(table..).next()?;
            let done = if *place == table { done } else { 0 };
            self.at = match done + PIECE_BYTES < meta.geometry().cluster_bytes() {
                true => At::Others { table: *place, done: done + PIECE_BYTES },
                false => At::Others { table: place + 1, done: 0 },
            };
            if !self.seen.contains(place) {
                let owner = pins.map_or(Owner::Snapshots, Owner::Pins);
                return Some((Table { at: HostOffset(*place), owner, times: *times }, done));
            }
        }
    }
}

/// Returns the table of an entry, where it can be one.
fn placed(meta: &Meta, entry: L1Entry) -> Option<HostOffset> {
    entry.table().filter(|table| meta.geometry().is_aligned(table.0) && *table < meta.zero_from)
}

impl<S: Storage> Image<S> {
    /// Finds the tables of snapshots and pins. Nobody may change pins meanwhile.
    pub(super) async fn other_tables(&self) -> Result<Others> {
        let mut others = Others::new();
        let header = self.header();
        if header.snapshots.count == 0 {
            return Ok(others);
        }
        for snapshot in snapshots::read_table(self.storage(), &header).await?.0 {
            if snapshot.is_pin() {
                continue;
            }
            snapshot.check_l1(&header.geometry)?;
            let range = snapshot.l1.range();
            let len = range.len.min(self.storage().len().await?.saturating_sub(range.start.0));
            let bytes = self.load(range.start, len, "L1 table of a snapshot").await?;
            let meta = self.0.meta.lock();
            for word in bytes.as_chunks::<8>().0 {
                if let Some(table) = placed(&meta, L1Entry(u64::from_be_bytes(*word))) {
                    others.entry(table.0).or_default().0 += 1;
                }
            }
        }
        let mut meta = self.0.meta.lock();
        for (index, entry) in (0..).zip(&meta.pins.l1.entries) {
            if let Some(table) = placed(&meta, *entry) {
                others.insert(table.0, (1, Some(index)));
            }
        }
        meta.moves_snapshots = true;
        Ok(others)
    }

    /// Reads the next piece of a table; nothing at the end.
    pub(super) async fn read_entries(&self, walk: &mut TableWalk) -> Result<Option<Piece>> {
        let next = walk.next_piece(&self.0.meta.lock());
        let Some((table, from)) = next else { return Ok(None) };
        let len = PIECE_BYTES.min(self.geometry().cluster_bytes() - from);
        let mut bytes = self.load(table.at + from, len, "L2 table").await?;
        self.take_newer(table.at + from, &mut bytes);
        Ok(Some(Piece { table, from, bytes }))
    }

    /// Puts what memory has of a table over what storage had.
    fn take_newer(&self, start: HostOffset, bytes: &mut [u8]) {
        let mut meta = self.0.meta.lock();
        let slice_bytes = meta.l2.slice_bytes() as usize;
        for (nth, slice) in (0..).zip(bytes.chunks_mut(slice_bytes)) {
            if let Some(newer) = meta.l2.read(start + nth * slice_bytes as u64) {
                slice.copy_from_slice(newer);
            }
        }
    }
}
