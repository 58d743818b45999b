//! All metadata of an open image that changes, behind one short lock.
//!
//! * Always: a function here finishes or changes nothing that counts; it never waits. What is
//!   missing is named as a [`Need`], satisfied outside the lock, and the function called again.
//! * Always: memory is ahead of storage; only a write-back brings storage after, in order.

use std::collections::BTreeSet;
use std::sync::Weak;

use smallvec::SmallVec;

use super::bitmaps::Bitmaps;
use super::format::{AutoclearFeatures, CompressedRun, Geometry, L1Entry, L2Entry, Version};
use super::history::Readers;
use super::in_flight::{InFlight, Token};
use super::mapping::{DataPlace, Decoder, Mapping, Run};
use super::moved::Moved;
use super::need::{Need, Planned, Stop};
use super::options::{DiscardUnit, OnDiscard};
use super::overlap::{Structure, Structures};
use super::quarantine::{Freed, FreedBy, Quarantine};
use super::refcounts::{Allocation, Refcounts};
use super::sharing::Pins;
use super::table_cache::TableCache;
use super::view::{SnapshotMap, View};
use super::zero_cluster::SharedZero;
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// The active L1 table, whole in memory.
#[derive(Debug)]
pub(super) struct L1Table {
    pub(super) entries: Vec<L1Entry>,
    pub(super) offset: HostOffset,
    /// Entries that storage does not have yet.
    pub(super) dirty: BTreeSet<usize>,
    /// Whether the table lies at a new place that the header does not name yet.
    pub(super) moved: Moved,
    /// Older tables, to be freed by the write-back that switches.
    pub(super) replaced: Vec<HostRange>,
}

impl L1Table {
    pub(super) fn new(entries: Vec<L1Entry>, offset: HostOffset) -> Self {
        Self { entries, offset, dirty: BTreeSet::new(), moved: Moved::No, replaced: Vec::new() }
    }

    pub(super) fn set(&mut self, index: usize, entry: L1Entry) {
        self.entries[index] = entry;
        self.dirty.insert(index);
    }

    /// Returns what storage does not have, for [`redo`](Self::redo).
    pub(super) fn unwritten(&self) -> (BTreeSet<usize>, Moved) {
        (self.dirty.clone(), self.moved)
    }

    /// What was handed out may not have reached storage: it is dirty again.
    pub(super) fn redo(&mut self, (dirty, moved): (BTreeSet<usize>, Moved)) {
        self.dirty.extend(dirty);
        self.moved = self.moved.max(moved);
    }

    /// Returns where the table lies.
    pub(super) fn range(&self) -> HostRange {
        HostRange::new(self.offset, self.entries.len() as u64 * 8)
    }
}

/// What must be made durable before the first change of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gate {
    /// Enabled bitmaps are not yet marked in use.
    pub(super) bitmaps: bool,
    /// Refcounts are postponed and the dirty bit is not yet set.
    pub(super) dirty_bit: bool,
}

/// A table read whole, for a copy.
#[derive(Debug)]
pub(super) struct LoadedTable {
    pub(super) offset: HostOffset,
    pub(super) bytes: Vec<u8>,
    pub(super) generation: u64,
}

#[derive(Debug)]
pub(super) struct Meta {
    pub(super) decoder: Decoder,
    pub(super) size_bytes: u64,
    pub(super) has_backing: bool,
    pub(super) writable: bool,
    pub(super) l1: L1Table,
    pub(super) l2: TableCache,
    pub(super) refcounts: Refcounts,
    pub(super) quarantine: Quarantine,
    pub(super) in_flight: InFlight,
    pub(super) structures: Structures,
    pub(super) gate: Gate,
    pub(super) bitmaps: Bitmaps,
    /// The size in the header is not yet this one.
    pub(super) size_dirty: bool,
    /// The size that a growth under way is to give the disk; 0 where there is none. What lies beyond the
    /// disk is to lie beyond that, too.
    pub(super) grows_to: u64,
    /// Guest bytes were written that entries in memory point to, and not synced since.
    pub(super) needs_data_sync: bool,
    /// Nothing was ever written at or beyond this offset: it reads as zeros.
    pub(super) zero_from: HostOffset,
    pub(super) loaded_table: Option<LoadedTable>,
    pub(super) loaded_block: Option<LoadedTable>,
    /// The file is being cut: changes wait.
    pub(super) paused: bool,
    /// What is stored is final, for all clones.
    pub(super) closed: bool,
    /// Why nothing more may be changed.
    pub(super) failed: Option<Error>,
    pub(super) on_discard: OnDiscard,
    pub(super) discard_unit: DiscardUnit,
    /// What the image on storage says of the whole disk.
    pub(super) claims: AutoclearFeatures,
    pub(super) shared_zero: SharedZero,
    pub(super) pins: Pins,
    /// Entries of snapshots' tables may be changed, so that storage may be behind for them too.
    pub(super) moves_snapshots: bool,
    /// Maps of snapshots that somebody has.
    pub(super) snapshot_maps: Vec<Weak<SnapshotMap>>,
    pub(super) readers: Readers,
    /// How often tables of snapshots got other places, or all tables were replaced at once.
    pub(super) histories: u64,
}

/// Where the entry of a guest byte lies.
#[derive(Clone, Copy, Debug)]
struct EntryPlace {
    slice: HostOffset,
    at: usize,
}

impl Meta {
    pub(super) const fn geometry(&self) -> &Geometry {
        &self.decoder.geometry
    }

    /// Refuses what reaches past the end of the disk.
    pub(super) fn check_bounds(&self, range: GuestRange) -> Result<()> {
        self.check_bounds_in(View::Active, range)
    }

    pub(super) fn check_bounds_in(&self, view: View<'_>, range: GuestRange) -> Result<()> {
        let size_bytes = view.size_bytes(self);
        match range.start.checked_add(range.len) {
            Some(end) if end.0 <= size_bytes => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{} bytes at {} pass the end of the disk at {size_bytes:#x}",
                    range.len, range.start
                ),
            )),
        }
    }

    /// As [`before_change`](Self::before_change), for what no guest reads otherwise afterwards.
    pub(super) fn before_metadata_change(&mut self) -> Planned<()> {
        self.before_change(GuestRange::new(GuestOffset(0), 0))
    }

    /// Refuses changes where there may be none, asks for what must come before the first, and
    /// notes that `range` changes.
    pub(super) fn before_change(&mut self, range: GuestRange) -> Planned<()> {
        self.before_any_change()?;
        if self.gate.bitmaps {
            return Err(Need::FirstChange.into());
        }
        let crowded = self.l2.is_crowded()
            || self.refcounts.blocks.is_crowded()
            || self.quarantine.is_crowded();
        if crowded {
            return Err(Need::WriteBack.into());
        }
        if !self.bitmaps.may_change(range) {
            return Err(Need::BitmapIntent.into());
        }
        self.bitmaps.mark(range);
        Ok(())
    }

    /// Refuses changes where there may be none, or waits until there may be some.
    pub(super) fn before_any_change(&self) -> Planned<()> {
        if let Some(error) = &self.failed {
            return Err(Stop::Fail(error.clone().context("The image was closed to changes")));
        }
        if !self.writable {
            return Err(Stop::Fail(Error::new(
                ErrorKind::ReadOnly,
                "The image was opened read-only",
            )));
        }
        if self.closed {
            return Err(Stop::Fail(Error::invalid("The image was closed")));
        }
        match self.paused {
            true => Err(Need::Turn(self.in_flight.wait()).into()),
            false => Ok(()),
        }
    }

    // ---- reading the map -------------------------------------------------------------------

    /// Returns the L2 table for a guest byte, unless there is none.
    pub(super) fn table(&self, guest: GuestOffset) -> Planned<Option<HostOffset>> {
        self.table_in(View::Active, guest)
    }

    pub(super) fn table_in(
        &self,
        view: View<'_>,
        guest: GuestOffset,
    ) -> Planned<Option<HostOffset>> {
        let index = self.geometry().l1_index(guest);
        match view.l1_entry(self, index).table() {
            Some(table) if !self.geometry().is_aligned(table.0) => {
                Err(Stop::Corrupt(Error::corrupt(format!(
                    "L2 table offset {table} (L1 index {index}) is not a multiple of the cluster size"
                ))))
            }
            Some(table) if self.writable && table >= self.zero_from => {
                Err(Stop::Corrupt(Error::corrupt(format!(
                    "L2 table offset {table} (L1 index {index}) lies beyond the end of the file at {}",
                    self.zero_from
                ))))
            }
            table => Ok(table),
        }
    }

    fn place(&self, table: HostOffset, guest: GuestOffset) -> EntryPlace {
        let width = self.geometry().entry_width().bytes();
        let offset = table + self.geometry().l2_index(guest) * width;
        let slice = self.l2.slice_of(offset);
        EntryPlace { slice, at: (offset - slice) as usize }
    }

    /// Returns the entry of a guest byte; nothing where there is no table.
    pub(super) fn entry(&mut self, guest: GuestOffset) -> Planned<Option<L2Entry>> {
        self.entry_in(View::Active, guest)
    }

    pub(super) fn entry_in(
        &mut self,
        view: View<'_>,
        guest: GuestOffset,
    ) -> Planned<Option<L2Entry>> {
        let width = self.geometry().entry_width();
        let entries = self.entries(view, guest)?;
        Ok(entries.map(|entries| L2Entry::at_start(entries, width)))
    }

    /// Returns the entries from that of a guest byte to the end of its slice.
    fn entries(&mut self, view: View<'_>, guest: GuestOffset) -> Planned<Option<&[u8]>> {
        let Some(table) = self.table_in(view, guest)? else { return Ok(None) };
        let place = self.place(table, guest);
        match self.l2.read(place.slice) {
            Some(bytes) => Ok(Some(&bytes[place.at..])),
            None => Err(Need::L2Slice(place.slice).into()),
        }
    }

    /// Returns what is known at the start of `range` and how far that reaches within the slice (to
    /// the end of the L2 table's coverage, where there is no table).
    fn mapping(&mut self, view: View<'_>, range: GuestRange) -> Planned<Run> {
        let decoder = self.decoder;
        let run = match self.entries(view, range.start)? {
            Some(entries) => decoder.run(entries, range).map_err(Stop::Corrupt)?,
            None => {
                let coverage = self.geometry().l2_coverage_bytes();
                let len = coverage - range.start.0 % coverage;
                Run { mapping: Mapping::Unallocated { reserved: None }, len }
            }
        };
        self.check_end(run, range.start)
    }

    /// A cluster beyond everything ever written was lost with the file's end. A reader gets zeros
    /// there as from QEMU; a writer must not go on (D.1-46).
    fn check_end(&self, run: Run, guest: GuestOffset) -> Planned<Run> {
        let host = match run.mapping {
            Mapping::Data { host, .. }
                if self.writable && self.decoder.place == DataPlace::ImageFile =>
            {
                host
            }
            _ => return Ok(run),
        };
        if host >= self.zero_from {
            return Err(Stop::Corrupt(Error::corrupt(format!(
                "Guest offset {guest} is mapped to host offset {host}, beyond the end of the file at {}",
                self.zero_from
            ))));
        }
        // Up to the first cluster that starts beyond: what it holds is the next question.
        let there = self.zero_from.0.next_multiple_of(self.geometry().cluster_bytes()) - host.0;
        Ok(Run { len: run.len.min(there), ..run })
    }

    /// Returns the longest run of one mapping at the start of `range` that needs no further load.
    pub(super) fn run(&mut self, range: GuestRange) -> Planned<Run> {
        self.run_in(View::Active, range)
    }

    /// As [`run`](Self::run), by any map.
    pub(super) fn run_in(&mut self, view: View<'_>, range: GuestRange) -> Planned<Run> {
        let mut run = self.mapping(view, range).map_err(|stop| view.judge(stop))?;
        while run.len < range.len {
            let behind = GuestRange::new(range.start + run.len, range.len - run.len);
            match self.mapping(view, behind) {
                Ok(next) if run.mapping.is_continued_by(next.mapping, run.len) => {
                    run.len += next.len;
                }
                _ => break,
            }
        }
        run.len = run.len.min(range.len);
        Ok(run)
    }

    /// Returns where the coverage of the slice that holds the entry ends.
    pub(super) fn slice_end(&self, guest: GuestOffset) -> GuestOffset {
        let entries = self.l2.slice_bytes() / self.geometry().entry_width().bytes();
        let coverage = entries << self.geometry().cluster_bits();
        GuestOffset((guest.0 / coverage + 1) * coverage)
    }

    // ---- changing the map ------------------------------------------------------------------

    /// Says whether the L2 table for a guest byte may be changed where it lies.
    pub(super) fn owns_table(&self, guest: GuestOffset) -> bool {
        let index = self.geometry().l1_index(guest) as usize;
        self.l1.entries.get(index).is_some_and(|entry| entry.is_copied())
    }

    /// Sees to it that there is an L2 table for the guest byte that nothing else references.
    pub(super) fn own_table(&mut self, guest: GuestOffset) -> Planned<()> {
        match self.table(guest)? {
            None => self.make_table(guest),
            Some(_) if self.owns_table(guest) => Ok(()),
            Some(table) => self.copy_table(guest, table),
        }
    }

    fn make_table(&mut self, guest: GuestOffset) -> Planned<()> {
        let new = self.allocate(1).map_err(|stop| stop.context("L2 table"))?;
        self.l2.make_fresh(new);
        self.install_table(guest, new);
        Ok(())
    }

    /// Copies a table that a snapshot shares. The data clusters keep their refcounts: each path
    /// from an L1 table was counted when the snapshot was made.
    fn copy_table(&mut self, guest: GuestOffset, old: HostOffset) -> Planned<()> {
        self.ready_to_copy(old)?;
        self.refcounts.read(self.geometry().host_cluster(old))?;
        let new = self.allocate(1).map_err(|stop| stop.context("L2 table"))?;
        self.fill_copy(old, new)?;
        self.install_table(guest, new);
        self.free(self.geometry().host_cluster(old), FreedBy::Other)?;
        Ok(())
    }

    /// Has all of a table at hand.
    pub(super) fn ready_to_copy(&self, table: HostOffset) -> Planned<()> {
        let generation = self.l2.generation();
        let loaded = self.loaded_table.as_ref();
        match loaded.is_some_and(|it| it.offset == table && it.generation == generation) {
            true => Ok(()),
            false => Err(Need::L2Table(table).into()),
        }
    }

    /// Fills a new table with what one says that is ready to be copied.
    pub(super) fn fill_copy(&mut self, old: HostOffset, new: HostOffset) -> Planned<()> {
        let Some(loaded) = self.loaded_table.take() else { return Err(Need::L2Table(old).into()) };
        self.l2.copy_fresh(old, new, &loaded.bytes);
        Ok(())
    }

    pub(super) fn install_table(&mut self, guest: GuestOffset, table: HostOffset) {
        let index = self.geometry().l1_index(guest) as usize;
        self.l1.set(index, L1Entry::new(table));
        let range = HostRange::new(table, self.geometry().cluster_bytes());
        self.structures.add(range, Structure::ActiveL2);
    }

    /// Returns the entry of a cluster that is about to change; unallocated where there is no table.
    ///
    /// # Errors
    /// [`Stop::Corrupt`] where what it references could not be freed without harm.
    pub(super) fn entry_to_change(&mut self, guest: GuestOffset) -> Planned<L2Entry> {
        let entry = self.entry(guest)?.unwrap_or_default();
        self.decoder.check_alignment(entry, guest).map_err(Stop::Corrupt)?;
        Ok(entry)
    }

    /// Replaces the entry of a guest byte whose table is owned and whose slice was just read.
    pub(super) fn set_entry(&mut self, guest: GuestOffset, entry: L2Entry) -> Planned<()> {
        self.set_entry_in(View::Active, guest, entry)
    }

    pub(super) fn set_entry_in(
        &mut self,
        view: View<'_>,
        guest: GuestOffset,
        entry: L2Entry,
    ) -> Planned<()> {
        let Some(table) = self.table_in(view, guest)? else {
            return Err(Stop::Fail(Error::corrupt(format!(
                "No L2 table for guest offset {guest}"
            ))));
        };
        let place = self.place(table, guest);
        let extended = self.geometry().has_subclusters();
        let Some(bytes) = self.l2.change(place.slice) else {
            return Err(Need::L2Slice(place.slice).into());
        };
        bytes[place.at..place.at + 8].copy_from_slice(&entry.word.to_be_bytes());
        if extended {
            let word = entry.subclusters.0.to_be_bytes();
            bytes[place.at + 8..place.at + 16].copy_from_slice(&word);
        }
        Ok(())
    }

    // ---- host clusters ---------------------------------------------------------------------

    /// Hands out one run of clusters; whoever links it or not, it counts as used from here on.
    pub(super) fn allocate(&mut self, count: u64) -> Planned<HostOffset> {
        if self.gate.dirty_bit {
            return Err(Need::DirtyBit.into());
        }
        let start = self.refcounts.allocate(count, &self.quarantine)?.start;
        self.note_allocated(HostRange::new(start, count * self.geometry().cluster_bytes()))?;
        Ok(start)
    }

    /// Hands out up to `count` clusters, at least one: from `at` on as far as they are free, else
    /// as [`allocate`](Self::allocate) does.
    pub(super) fn allocate_at(&mut self, at: HostOffset, count: u64) -> Planned<Allocation> {
        if self.gate.dirty_bit {
            return Err(Need::DirtyBit.into());
        }
        let found = self.refcounts.allocate_at(at, count)?;
        if found.clusters == 0 {
            return Ok(Allocation { start: self.allocate(count)?, clusters: count });
        }
        let len = found.clusters * self.geometry().cluster_bytes();
        self.note_allocated(HostRange::new(found.start, len))?;
        Ok(found)
    }

    /// Hands out up to `count` clusters, at least one: right behind `behind` as far as that is
    /// free and the placement goes that way, else as [`allocate`](Self::allocate) does.
    pub(super) fn allocate_behind(
        &mut self,
        count: u64,
        behind: Option<HostOffset>,
    ) -> Planned<Allocation> {
        let follows = behind.filter(|behind| {
            self.refcounts.follows_the_last() && self.geometry().is_aligned(behind.0)
        });
        match follows {
            Some(behind) => self.allocate_at(behind, count),
            None => Ok(Allocation { start: self.allocate(count)?, clusters: count }),
        }
    }

    /// Hands out one run of clusters that ends at cluster `limit` at the latest, from `cursor` on; nothing
    /// where there is none.
    pub(super) fn allocate_below(
        &mut self,
        count: u64,
        limit: u64,
        cursor: &mut u64,
    ) -> Planned<Option<HostOffset>> {
        if self.gate.dirty_bit {
            return Err(Need::DirtyBit.into());
        }
        let found = self.refcounts.allocate_below(count, limit, cursor)?;
        if let Some(start) = found {
            self.note_allocated(HostRange::new(start, count * self.geometry().cluster_bytes()))?;
        }
        Ok(found)
    }

    /// Hands out bytes for a compressed cluster.
    pub(super) fn allocate_bytes(&mut self, len: u64) -> Planned<HostOffset> {
        if self.gate.dirty_bit {
            return Err(Need::DirtyBit.into());
        }
        let limit = CompressedRun::offset_limit(self.geometry());
        let start = self.refcounts.allocate_bytes(len, limit, &self.quarantine)?;
        self.note_allocated(HostRange::new(start, len))?;
        Ok(start)
    }

    /// Checks a run that was handed out and takes note of the metadata made for it.
    pub(super) fn note_allocated(&mut self, range: HostRange) -> Planned<()> {
        for (range, structure) in self.refcounts.take_new_metadata() {
            self.structures.add(range, structure);
            self.zero_from = self.zero_from.max(range.end());
        }
        if range.start.0 == 0 {
            return Err(Stop::Corrupt(Error::corrupt(
                "The header's cluster has refcount 0: refcounts cannot be trusted, run check",
            )));
        }
        self.structures.check(range, None).map_err(Stop::Corrupt)?;
        let end = range.end().0.next_multiple_of(self.geometry().cluster_bytes());
        self.zero_from = self.zero_from.max(HostOffset(end));
        Ok(())
    }

    /// Returns the host clusters that an entry references.
    pub(super) fn references(&self, entry: L2Entry) -> SmallVec<[HostCluster; 2]> {
        if self.decoder.place == DataPlace::External {
            return SmallVec::new();
        }
        if let Some(run) = entry.compressed_run(self.geometry()) {
            return self.geometry().host_clusters(run.range()).map(HostCluster).collect();
        }
        entry.host().map(|host| self.geometry().host_cluster(host)).into_iter().collect()
    }

    /// Has the refcounts at hand of all that an entry references, so that freeing cannot stop.
    pub(super) fn prepare_free(&mut self, entry: L2Entry) -> Planned<()> {
        for cluster in self.references(entry) {
            self.refcounts.read(cluster)?;
        }
        Ok(())
    }

    /// Drops the references of an entry that was just replaced. Returns how many clusters nothing
    /// references any more.
    pub(super) fn free_entry(&mut self, entry: L2Entry, by: FreedBy) -> Planned<u64> {
        let mut unused = 0;
        for cluster in self.references(entry) {
            unused += u64::from(self.free(cluster, by)?);
        }
        Ok(unused)
    }

    /// Drops one reference of a cluster, once the mapping change that goes with it is durable. Says
    /// whether it was the last.
    pub(super) fn free(&mut self, cluster: HostCluster, by: FreedBy) -> Planned<bool> {
        let refcount = self.refcounts.read(cluster)?;
        let at = self.in_flight.moment();
        let is_last = self.quarantine.push(Freed { cluster, by, at }, refcount);
        if is_last {
            self.refcounts.lower_cursors(cluster);
        }
        Ok(is_last)
    }

    /// Ends a request; what it had reserved and never linked is freed again.
    pub(super) fn end(&mut self, token: Token) {
        for range in self.in_flight.end(token) {
            for cluster in self.geometry().host_clusters(range) {
                let at = self.in_flight.moment();
                let freed = Freed { cluster: HostCluster(cluster), by: FreedBy::CopyOnWrite, at };
                self.quarantine.push(freed, 1);
            }
        }
    }

    /// Says whether zero flags exist (version 3; 001-5).
    pub(super) const fn has_zero_flag(&self) -> bool {
        matches!(self.geometry().version(), Version::V3)
    }
}
