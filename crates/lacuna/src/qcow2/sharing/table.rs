//! The snapshot that holds the pins, and the snapshot table that names it.
//!
//! * Always: a new table goes to fresh clusters, and 12 bytes of the header switch to it.
//! * Always: nobody applies this snapshot by accident. Its name says so, and the disk that it claims has
//!   one byte, which QEMU refuses before it changes anything: sizes are whole sectors.

use crate::qcow2::format::{L1Entry, L1Location, Snapshot, SnapshotTableLocation};
use crate::qcow2::image::Image;
use crate::qcow2::meta::{L1Table, Meta};
use crate::qcow2::moved::Moved;
use crate::qcow2::need::{Planned, Stop};
use crate::qcow2::overlap::Structure;
use crate::qcow2::resize::MAX_L1_BYTES;
use crate::qcow2::write_back::Piece;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// What the snapshot is called.
pub(super) const PIN_NAME: &str = "lacuna-pin: do not apply or delete";
/// Its identifier: no number, which QEMU would count on from.
const PIN_ID: &str = "lacuna-pin";
/// The size that its disk has.
const PIN_DISK_BYTES: u64 = 1;
/// The format keeps no more snapshots (B.9).
const MAX_SNAPSHOTS: usize = 65536;

impl Snapshot {
    /// Says whether this is no snapshot of the disk, but holds on to clusters that parts of the disk
    /// share.
    ///
    /// ```
    /// use lacuna::qcow2::format::{L1Location, Snapshot};
    /// use lacuna::units::HostOffset;
    /// let l1 = L1Location { offset: HostOffset(0x50000), entries: 1 };
    /// let name = "lacuna-pin: do not apply or delete";
    /// assert!(Snapshot::new("lacuna-pin", name, l1, 1).is_pin());
    /// assert!(!Snapshot::new("1", name, l1, 1 << 20).is_pin());
    /// ```
    #[must_use]
    pub fn is_pin(&self) -> bool {
        self.name.as_bytes() == PIN_NAME.as_bytes() && self.disk_size_bytes == Some(PIN_DISK_BYTES)
    }
}

/// A snapshot table on its way to storage.
#[derive(Debug)]
pub(in crate::qcow2) struct NewSnapshotTable {
    pub(in crate::qcow2) location: SnapshotTableLocation,
    bytes: Vec<u8>,
    /// What the switch to it makes unused: the table before, and an L1 table that moved.
    pub(in crate::qcow2) replaced: Vec<HostRange>,
}

impl NewSnapshotTable {
    /// Returns the table itself, which is there before the header names it.
    pub(in crate::qcow2) fn piece(&self) -> Option<Piece> {
        let is_there = !self.bytes.is_empty();
        is_there.then(|| Piece { offset: self.location.offset, bytes: self.bytes.clone() })
    }
}

impl super::Pins {
    /// Hands out the snapshot table that storage is to have.
    pub(in crate::qcow2) fn take_table(&mut self) -> Option<NewSnapshotTable> {
        self.new_table.take()
    }

    /// What was handed out may not have reached storage, unless a newer one is there by now.
    pub(in crate::qcow2) fn redo_table(&mut self, table: Option<NewSnapshotTable>) {
        if let Some(table) = table {
            self.new_table.get_or_insert(table);
        }
    }
}

impl Meta {
    /// Makes the L1 table of the pins longer, at a new place, or makes the first; and a snapshot table
    /// that names it.
    pub(super) fn grow_pin_l1(&mut self) -> Planned<()> {
        let per_cluster = self.geometry().cluster_bytes() / 8;
        let entries = (self.pins.l1.entries.len() as u64 * 2).max(per_cluster);
        if entries * 8 > MAX_L1_BYTES || self.pins.snapshots.len() >= MAX_SNAPSHOTS {
            return Err(Stop::Fail(Error::new(
                ErrorKind::NoSpace,
                "There is no room for more pins of shared clusters",
            )));
        }
        let l1_clusters = self.geometry().clusters_for(entries * 8);
        let mut snapshots = self.pins.snapshots.clone();
        let pin = pin_among(&mut snapshots);
        let old = pin_l1_range(pin);
        pin.l1.entries = entries as u32;
        let clusters = self.snapshot_table_clusters(&snapshots)?;
        let offset = self.allocate(l1_clusters + clusters)?;
        pin_among(&mut snapshots).l1.offset = offset;
        let table = offset + l1_clusters * self.geometry().cluster_bytes();
        self.pins.l1 = L1Table {
            moved: Moved::Unwritten,
            ..L1Table::new(longer(&self.pins.l1.entries, entries as usize), offset)
        };
        self.structures.add(self.pins.l1.range(), Structure::InactiveL1);
        self.put_snapshot_table(snapshots, table, old)
    }

    pub(in crate::qcow2) fn snapshot_table_clusters(&self, snapshots: &[Snapshot]) -> Result<u64> {
        let len = Snapshot::encode_table(snapshots, self.size_bytes)?.len() as u64;
        Ok(self.geometry().clusters_for(len))
    }

    /// Has the next write-back switch to a table at `at`, which was allocated, and free `unused` with
    /// the table before.
    pub(super) fn put_snapshot_table(
        &mut self,
        snapshots: Vec<Snapshot>,
        at: HostOffset,
        unused: Option<HostRange>,
    ) -> Planned<()> {
        let bytes = Snapshot::encode_table(&snapshots, self.size_bytes)?;
        let mut replaced = self.pins.new_table.take().map(|it| it.replaced).unwrap_or_default();
        replaced.extend(unused);
        replaced.extend(Some(self.pins.table_range).filter(|range| !range.is_empty()));
        self.pins.table_range = HostRange::new(at, bytes.len() as u64);
        self.structures.add(self.pins.table_range, Structure::SnapshotTable);
        let location = SnapshotTableLocation { offset: at, count: snapshots.len() as u32 };
        self.pins.snapshots = snapshots;
        self.pins.new_table = Some(NewSnapshotTable { location, bytes, replaced });
        Ok(())
    }
}

fn longer(entries: &[L1Entry], len: usize) -> Vec<L1Entry> {
    let mut entries = entries.to_vec();
    entries.resize(len, L1Entry::UNALLOCATED);
    entries
}

/// Returns where the L1 table of the snapshot lies, if it has one.
pub(super) fn pin_l1_range(pin: &Snapshot) -> Option<HostRange> {
    (pin.l1.offset.0 != 0).then(|| pin.l1.range())
}

/// Returns the snapshot with the pins; where there is none, one is added, whose L1 table is nowhere.
fn pin_among(snapshots: &mut Vec<Snapshot>) -> &mut Snapshot {
    let at = snapshots.iter().position(Snapshot::is_pin).unwrap_or_else(|| {
        let mut id = PIN_ID.to_owned();
        while snapshots.iter().any(|other| other.id.as_bytes() == id.as_bytes()) {
            id.push('+');
        }
        let nowhere = L1Location { offset: HostOffset(0), entries: 0 };
        snapshots.push(Snapshot::new(&id, PIN_NAME, nowhere, PIN_DISK_BYTES));
        snapshots.len() - 1
    });
    &mut snapshots[at]
}

impl<S: Storage> Image<S> {
    /// Says whether the image has snapshots other than the one with the pins.
    pub(crate) async fn has_real_snapshots(&self) -> Result<bool> {
        Ok(self.snapshots().await?.iter().any(|snapshot| !snapshot.is_pin()))
    }
}
