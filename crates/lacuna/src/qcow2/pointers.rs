//! Who points to a place, and whether that is still so.
//!
//! * Always: what was found on a walk is believed only after a second look, under the lock under which
//!   it is changed: the entry, the table that it lies in, and how often somebody has that table.
//! * Always: a cluster moves only if the entries that show it are as many as its refcount says: so none
//!   was missed.

use super::format::{L2Entry, OFFSET_MASK};
use super::meta::Meta;
use super::need::{Need, Planned};
use super::overlap::Structure;
use crate::units::{HostCluster, HostOffset, HostRange};

/// No cluster or stream moves that more entries show: they all change under one lock.
pub(super) const MOST_POINTERS: usize = 4096;

/// Whose a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// That entry of the active L1 table names it, and maybe snapshots do too.
    Active(u32),
    /// That entry of the L1 table of the pins names it.
    Pins(u32),
    /// Only snapshots have it, and they stay as they are.
    Snapshots,
}

/// A table that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) at: HostOffset,
    pub(super) owner: Owner,
    /// How many L1 tables name it.
    pub(super) times: u32,
}

/// An entry that points to something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer {
    pub(super) table: Table,
    pub(super) index: u32,
}

/// Says how many references the entries are.
pub(super) fn weight(pointers: &[Pointer]) -> u64 {
    pointers.iter().map(|pointer| u64::from(pointer.table.times)).sum()
}

impl Meta {
    /// Says whether a table is still what it was found to be.
    fn is_still(&mut self, table: Table) -> Planned<bool> {
        let names = match table.owner {
            Owner::Active(index) => self.l1.entries.get(index as usize),
            Owner::Pins(index) => self.pins.l1.entries.get(index as usize),
            Owner::Snapshots => None,
        };
        let is_named = match table.owner {
            Owner::Snapshots => true,
            _ => names.is_some_and(|entry| entry.table() == Some(table.at)),
        };
        let range = HostRange::new(table.at, self.geometry().cluster_bytes());
        let is_apart = self.structures.check(range, Some(Structure::ActiveL2)).is_ok();
        if !is_named || !is_apart {
            return Ok(false);
        }
        let count = self.settled_refcount(self.geometry().host_cluster(table.at))?;
        Ok(count == Some(u64::from(table.times)))
    }

    /// Returns the refcount of a cluster, unless a reference of it is about to go.
    pub(super) fn settled_refcount(&mut self, cluster: HostCluster) -> Planned<Option<u64>> {
        let count = self.refcounts.read(cluster)?;
        Ok((self.quarantine.pending(cluster) == 0).then_some(count))
    }

    /// Returns the slice with an entry, and where in it that lies.
    fn place_of(&self, pointer: &Pointer) -> (HostOffset, usize) {
        let width = self.geometry().entry_width().bytes();
        let offset = pointer.table.at + u64::from(pointer.index) * width;
        let slice = self.l2.slice_of(offset);
        (slice, (offset - slice) as usize)
    }

    fn pointing_entry(&mut self, pointer: &Pointer) -> Planned<L2Entry> {
        let (slice, at) = self.place_of(pointer);
        let width = self.geometry().entry_width();
        match self.l2.read(slice) {
            Some(bytes) => Ok(L2Entry::at_start(&bytes[at..], width)),
            None => Err(Need::L2Slice(slice).into()),
        }
    }

    /// Says whether all of the entries still show what `shows` says, with all slices at hand.
    pub(super) fn all_show(
        &mut self,
        pointers: &[Pointer],
        shows: impl Fn(Owner, L2Entry) -> bool,
    ) -> Planned<bool> {
        self.l2.make_room_for(pointers.len() as u64);
        // Twice: a slice that came to hand may have put out another one.
        for pointer in pointers.iter().chain(pointers) {
            let owner = pointer.table.owner;
            if !self.is_still(pointer.table)? || !shows(owner, self.pointing_entry(pointer)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Says whether a cluster is shown by just these entries, and may not be written in place.
    pub(super) fn is_shown_by(&mut self, host: HostOffset, pointers: &[Pointer]) -> Planned<bool> {
        let cluster = self.geometry().host_cluster(host);
        if !self.may_move(host) || self.settled_refcount(cluster)? != Some(weight(pointers)) {
            return Ok(false);
        }
        let is_written = |owner, entry: L2Entry| match owner {
            Owner::Active(_) => entry.is_copied(),
            Owner::Pins(_) | Owner::Snapshots => false,
        };
        self.all_show(pointers, |owner, entry| {
            entry.host() == Some(host) && !is_written(owner, entry)
        })
    }

    /// Says whether a cluster is one of guest data that lies in the file, and not the shared zeros, whose
    /// place is remembered elsewhere too.
    pub(super) fn may_move(&self, host: HostOffset) -> bool {
        let range = HostRange::new(host, self.geometry().cluster_bytes());
        self.geometry().is_aligned(host.0)
            && host < self.zero_from
            && self.decoder.zero_cluster != Some(host)
            && self.structures.check(range, None).is_ok()
    }

    /// Has entries point elsewhere; [`all_show`](Self::all_show) has just had them at hand.
    pub(super) fn point(
        &mut self,
        pointers: &[Pointer],
        change: impl Fn(u64) -> u64,
    ) -> Planned<()> {
        for pointer in pointers {
            let (slice, at) = self.place_of(pointer);
            let Some(bytes) = self.l2.change(slice) else {
                return Err(Need::L2Slice(slice).into());
            };
            let word = bytes[at..at + 8].try_into().map_or(0, u64::from_be_bytes);
            bytes[at..at + 8].copy_from_slice(&change(word).to_be_bytes());
        }
        Ok(())
    }
}

/// Returns the word of an entry that points elsewhere and says the same otherwise.
pub(super) const fn redirected(word: u64, to: HostOffset) -> u64 {
    word & !OFFSET_MASK | to.0
}
