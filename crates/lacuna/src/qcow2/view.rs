//! Which of the maps in an image a request reads by: that of the disk, or that of a snapshot.
//!
//! * Always: what a snapshot's map shows stays as it is while the image is open. Its tables and
//!   clusters are shared copy-on-write, and not reused while the snapshot references them.
//! * Never: a map of a snapshot is written by, or is a reason to close the disk to changes.

use parking_lot::Mutex;

use super::format::{AutoclearFeatures, L1Entry};
use super::meta::Meta;
use super::need::Stop;
use super::resize::MAX_SIZE_BYTES;
use crate::{Error, Result};

/// A map of the image.
#[derive(Clone, Copy, Debug)]
pub(super) enum View<'a> {
    /// The disk as it is now.
    Active,
    /// What keeps shared clusters referenced, at offsets of no disk.
    Pins,
    /// The disk as it was.
    Snapshot(&'a SnapshotMap),
    /// What lies behind the disk.
    VmState,
}

/// The map of a snapshot, as far as its disk reaches: VM state behind that is left out.
#[derive(Debug)]
pub(super) struct SnapshotMap {
    /// Entries change where a table is given another place, under the lock of the metadata.
    pub(super) l1: Mutex<Vec<L1Entry>>,
    pub(super) size_bytes: u64,
}

impl View<'_> {
    pub(super) const fn size_bytes(self, meta: &Meta) -> u64 {
        match self {
            Self::Active => meta.size_bytes,
            Self::Pins => 0,
            Self::Snapshot(map) => map.size_bytes,
            Self::VmState => MAX_SIZE_BYTES,
        }
    }

    /// Returns an entry of the L1 table; unallocated past its end.
    pub(super) fn l1_entry(self, meta: &Meta, index: u64) -> L1Entry {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let entry = match self {
            Self::Active | Self::VmState => meta.l1.entries.get(index).copied(),
            Self::Pins => meta.pins.l1.entries.get(index).copied(),
            Self::Snapshot(map) => map.l1.lock().get(index).copied(),
        };
        entry.unwrap_or_default()
    }

    /// Returns what the image claims of the whole disk; of a snapshot it claims nothing.
    pub(super) const fn claims(self, meta: &Meta) -> AutoclearFeatures {
        match self {
            Self::Active => meta.claims,
            Self::Pins | Self::Snapshot(_) | Self::VmState => AutoclearFeatures::empty(),
        }
    }

    /// Says whether tables in storage are what tables in memory are.
    pub(super) const fn is_settled(self, meta: &Meta) -> bool {
        !meta.writable || matches!(self, Self::Snapshot(_)) && !meta.moves_snapshots
    }

    /// Turns a contradiction in a snapshot's map into a plain failure of the request: the disk is
    /// none the worse for it.
    pub(super) fn judge(self, stop: Stop) -> Stop {
        match (self, stop) {
            (Self::Snapshot(_), Stop::Corrupt(error)) => Stop::Fail(error),
            (_, stop) => stop,
        }
    }
}

impl<S: crate::storage::Storage> super::image::Image<S> {
    /// Returns the error of a request that found a contradiction in a map, after what follows from
    /// it.
    pub(super) async fn contradiction<T>(&self, view: View<'_>, error: Error) -> Result<T> {
        match view {
            View::Active | View::Pins | View::VmState => Err(self.mark_corrupt(error).await),
            View::Snapshot(_) => Err(error),
        }
    }
}
