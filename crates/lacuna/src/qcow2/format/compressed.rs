//! Compressed cluster descriptors (B.5).
//!
//! With `x = 62 - (cluster_bits - 8)`: bits `0..x` are the byte offset in the file, bits `x..62`
//! the number of 512-byte sectors beyond the one that the offset lies in.

#![expect(
    clippy::arithmetic_side_effects,
    reason = "cluster_bits is checked when a Geometry is made, and bounds every shift and field"
)]

use super::geometry::Geometry;
use super::l1::COPIED;
use crate::units::{HostOffset, HostRange};

const SECTOR: u64 = 512;
/// Host offsets have 56 bits, whatever room the field has.
const MAX_OFFSET_BITS: u32 = 56;

/// Where the bytes of a compressed cluster lie; the stream may end before the run does.
///
/// ```
/// use lacuna::qcow2::format::{CompressedRun, EntryWidth, Geometry, L2Entry, Version};
/// let geometry = Geometry::new(Version::V3, 21, 4, EntryWidth::Standard).unwrap();
/// let entry = L2Entry { word: 0x4008_0000_00a0_0000, ..L2Entry::UNALLOCATED };
/// let run = entry.compressed_run(&geometry).unwrap();
/// assert_eq!((run.range().start.0, run.range().len), (0xa0_0000, 5 * 512));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedRun {
    start: HostOffset,
    more_sectors: u64,
}

const fn offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits() - 8)
}

impl CompressedRun {
    /// Makes the run of `len_bytes` bytes (at least 1) from `start` on.
    #[must_use]
    pub const fn new(start: HostOffset, len_bytes: u64) -> Self {
        let last = start.0 + len_bytes - 1;
        Self { start, more_sectors: last / SECTOR - start.0 / SECTOR }
    }

    /// Returns the greatest offset, exclusive, at which a run can start.
    #[must_use]
    pub const fn offset_limit(geometry: &Geometry) -> u64 {
        let bits = offset_bits(geometry);
        1 << if bits < MAX_OFFSET_BITS { bits } else { MAX_OFFSET_BITS }
    }

    pub(crate) const fn decode(word: u64, geometry: &Geometry) -> Self {
        let bits = offset_bits(geometry);
        Self {
            start: HostOffset(word & (Self::offset_limit(geometry) - 1)),
            more_sectors: (word & !(3 << 62)) >> bits,
        }
    }

    pub(crate) const fn encode(self, geometry: &Geometry) -> u64 {
        assert!(self.start.0 < Self::offset_limit(geometry), "allocated below the limit");
        self.more_sectors << offset_bits(geometry) | self.start.0
    }

    pub(crate) const fn has_reserved_bits(word: u64, geometry: &Geometry) -> bool {
        let field = (1 << offset_bits(geometry)) - 1;
        word & COPIED != 0 || word & field & !(Self::offset_limit(geometry) - 1) != 0
    }

    /// Returns the bytes from the start of the stream to the end of its last sector.
    #[must_use]
    pub const fn range(self) -> HostRange {
        let len = (self.more_sectors + 1) * SECTOR - self.start.0 % SECTOR;
        HostRange { start: self.start, len }
    }
}
