//! Where the tables lie that the header names, and the 12 bytes that name them.
//!
//! * Always: the 12 bytes lie within one sector, so that a crash leaves the old or the new ones.

use crate::units::{HostOffset, HostRange};

/// Where the active L1 table lies.
///
/// ```
/// use lacuna::qcow2::format::L1Location;
/// use lacuna::units::HostOffset;
/// let (at, bytes) = L1Location { offset: HostOffset(0x30000), entries: 2 }.header_update();
/// assert_eq!((at.0, bytes), (36, [0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0]));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct L1Location {
    /// Cluster-aligned; zero only where there are no entries.
    pub offset: HostOffset,
    /// Entries, not bytes; at most 4 Mi.
    pub entries: u32,
}

/// Where the refcount table lies.
///
/// ```
/// use lacuna::qcow2::format::RefcountTableLocation;
/// use lacuna::units::HostOffset;
/// let table = RefcountTableLocation { offset: HostOffset(0x10000), clusters: 1 };
/// assert_eq!(table.header_update().0, HostOffset(48));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RefcountTableLocation {
    /// Cluster-aligned.
    pub offset: HostOffset,
    /// Clusters, at most 8 MiB of them.
    pub clusters: u32,
}

/// Where the snapshot table lies.
///
/// ```
/// use lacuna::qcow2::format::SnapshotTableLocation;
/// use lacuna::units::HostOffset;
/// let table = SnapshotTableLocation { offset: HostOffset(0x50000), count: 1 };
/// assert_eq!(table.header_update().0, HostOffset(60));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SnapshotTableLocation {
    /// Cluster-aligned; means nothing where there are no snapshots.
    pub offset: HostOffset,
    /// How many snapshots: at most 65536.
    pub count: u32,
}

/// Puts a 32-bit and a 64-bit field behind each other, in either order.
fn joined<const A: usize, const B: usize>(first: [u8; A], second: [u8; B]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (place, byte) in bytes.iter_mut().zip(first.into_iter().chain(second)) {
        *place = byte;
    }
    bytes
}

impl L1Location {
    /// Returns where the entries lie.
    #[must_use]
    pub(crate) fn range(&self) -> HostRange {
        HostRange::new(self.offset, u64::from(self.entries).saturating_mul(8))
    }

    /// Returns the 12 header bytes that name the table and where they go.
    #[must_use]
    pub fn header_update(&self) -> (HostOffset, [u8; 12]) {
        (HostOffset(36), joined(self.entries.to_be_bytes(), self.offset.0.to_be_bytes()))
    }
}

impl RefcountTableLocation {
    /// Returns the 12 header bytes that name the table and where they go.
    #[must_use]
    pub fn header_update(&self) -> (HostOffset, [u8; 12]) {
        (HostOffset(48), joined(self.offset.0.to_be_bytes(), self.clusters.to_be_bytes()))
    }
}

impl SnapshotTableLocation {
    /// Returns the 12 header bytes that name the table and where they go.
    #[must_use]
    pub fn header_update(&self) -> (HostOffset, [u8; 12]) {
        (HostOffset(60), joined(self.count.to_be_bytes(), self.offset.0.to_be_bytes()))
    }
}
