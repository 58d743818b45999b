//! L2 entries, standard and extended (B.4, B.7).
//!
//! | bits of word 0 | meaning |
//! |---|---|
//! | 0 | reads as zeros (standard entries of version 3) |
//! | 9–55 | host offset of the cluster |
//! | 62 | compressed: the rest is a descriptor (B.5) |
//! | 63 | COPIED |

#![expect(
    clippy::arithmetic_side_effects,
    reason = "subcluster indices are 0 to 32 and come from a Geometry, never from an image"
)]

use super::compressed::CompressedRun;
use super::geometry::{EntryWidth, Geometry};
use super::l1::{COPIED, OFFSET_MASK};
use crate::units::HostOffset;

const ZERO: u64 = 1;
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bits that no standard cluster descriptor may carry; bit 0 is judged apart.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// An entry of an L2 table: both words; the second stays zero with standard entries.
///
/// ```
/// use lacuna::qcow2::format::L2Entry;
/// use lacuna::units::HostOffset;
/// let entry = L2Entry::standard(HostOffset(0x50000)).with_zero_flag();
/// assert_eq!(entry.word, 0x8000_0000_0005_0001);
/// assert_eq!(entry.host(), Some(HostOffset(0x50000)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct L2Entry {
    /// Word 0.
    pub word: u64,
    /// Word 1: the states of the subclusters, with extended entries.
    pub subclusters: SubclusterBitmap,
}

impl L2Entry {
    /// This image says nothing of the cluster.
    pub const UNALLOCATED: Self = Self { word: 0, subclusters: SubclusterBitmap(0) };
    /// Reads as zeros, no host cluster (standard entries).
    pub const ZERO_PLAIN: Self = Self { word: ZERO, subclusters: SubclusterBitmap(0) };

    /// Reads the entry that `table` starts with.
    ///
    /// What is missing of it counts as zero bytes.
    #[must_use]
    pub(crate) fn at_start(table: &[u8], width: EntryWidth) -> Self {
        let word = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let (words, _) = table.as_chunks::<8>();
        let subclusters = match width {
            EntryWidth::Standard => 0,
            EntryWidth::Extended => word(words.get(1)),
        };
        Self { word: word(words.first()), subclusters: SubclusterBitmap(subclusters) }
    }

    /// Makes the entry of a cluster with refcount one (subclusters still unallocated).
    #[must_use]
    pub const fn standard(host: HostOffset) -> Self {
        Self { word: (host.0 & OFFSET_MASK) | COPIED, subclusters: SubclusterBitmap(0) }
    }

    /// Makes the entry of a compressed cluster.
    #[must_use]
    pub const fn compressed(run: CompressedRun, geometry: &Geometry) -> Self {
        Self { word: run.encode(geometry) | COMPRESSED, subclusters: SubclusterBitmap(0) }
    }

    /// Says whether the cluster is stored compressed. To be asked before anything else (D.1-16).
    #[must_use]
    pub const fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// Returns where the compressed bytes lie, if this is a compressed cluster.
    #[must_use]
    pub const fn compressed_run(self, geometry: &Geometry) -> Option<CompressedRun> {
        if self.is_compressed() { Some(CompressedRun::decode(self.word, geometry)) } else { None }
    }

    /// Returns the host cluster, data or reserved; nothing for compressed clusters.
    #[must_use]
    pub const fn host(self) -> Option<HostOffset> {
        match self.word & OFFSET_MASK {
            _ if self.is_compressed() => None,
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Says whether bit 0 is set: with standard entries of version 3, reads as zeros.
    #[must_use]
    pub const fn has_zero_flag(self) -> bool {
        !self.is_compressed() && self.word & ZERO != 0
    }

    /// Says whether the host cluster may be written in place.
    #[must_use]
    pub const fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// Returns the entry with the zero flag.
    #[must_use]
    pub const fn with_zero_flag(self) -> Self {
        Self { word: self.word | ZERO, ..self }
    }

    /// Returns the entry without the zero flag.
    #[must_use]
    pub const fn without_zero_flag(self) -> Self {
        Self { word: self.word & !ZERO, ..self }
    }

    /// Returns the entry with the copied flag set or cleared.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        let word = if copied { self.word | COPIED } else { self.word & !COPIED };
        Self { word, ..self }
    }

    /// Returns the entry with other subcluster states.
    #[must_use]
    pub const fn with_subclusters(self, subclusters: SubclusterBitmap) -> Self {
        Self { subclusters, ..self }
    }

    /// Says whether a bit is set that the format reserves for this kind of entry.
    #[must_use]
    pub const fn has_reserved_bits(self, geometry: &Geometry) -> bool {
        if self.is_compressed() {
            return CompressedRun::has_reserved_bits(self.word, geometry);
        }
        let zero_is_reserved = match geometry.entry_width() {
            EntryWidth::Standard => matches!(geometry.version(), super::geometry::Version::V2),
            EntryWidth::Extended => true,
        };
        self.word & RESERVED != 0 || (zero_is_reserved && self.word & ZERO != 0)
    }
}

/// What a subcluster is.
///
/// ```
/// use lacuna::qcow2::format::{SubclusterBitmap, SubclusterState};
/// assert_eq!(SubclusterBitmap(1).state(0), SubclusterState::Data);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SubclusterState {
    /// Its bytes lie in the host cluster.
    Data,
    /// Both bits are set: corrupt.
    Invalid,
    /// The backing layer decides.
    Unallocated,
    /// Reads as zeros.
    Zero,
}

/// The second word of an extended L2 entry: bit k allocated, bit 32 + k reads as zeros.
///
/// ```
/// use lacuna::qcow2::format::SubclusterBitmap;
/// let bitmap = SubclusterBitmap::default().with_data(0, 2).with_zero(2, 32);
/// assert_eq!(bitmap.0, 0xffff_fffc_0000_0003);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SubclusterBitmap(pub u64);

/// Bits `from..to` of 32, `to` exclusive.
const fn bits(from: u32, to: u32) -> u64 {
    ((1 << to) - 1) & !((1_u64 << from) - 1)
}

impl SubclusterBitmap {
    /// Every subcluster holds data.
    pub const ALL_DATA: Self = Self(0x0000_0000_ffff_ffff);
    /// Every subcluster reads as zeros.
    pub const ALL_ZERO: Self = Self(0xffff_ffff_0000_0000);

    /// Returns the state of subcluster `index` (0 to 31).
    #[must_use]
    pub const fn state(self, index: u32) -> SubclusterState {
        match (self.0 >> index & 1, self.0 >> (32 + index) & 1) {
            (0, 0) => SubclusterState::Unallocated,
            (1, 0) => SubclusterState::Data,
            (0, _) => SubclusterState::Zero,
            _ => SubclusterState::Invalid,
        }
    }

    /// Returns the bitmap with subclusters `from..to` as data.
    #[must_use]
    pub const fn with_data(self, from: u32, to: u32) -> Self {
        Self(self.with_unallocated(from, to).0 | bits(from, to))
    }

    /// Returns the bitmap with subclusters `from..to` as zeros.
    #[must_use]
    pub const fn with_zero(self, from: u32, to: u32) -> Self {
        Self(self.with_unallocated(from, to).0 | bits(from, to) << 32)
    }

    /// Returns the bitmap with those of the subclusters `from..to` as zeros that hold data.
    #[must_use]
    pub const fn with_zero_for_data(self, from: u32, to: u32) -> Self {
        let data = self.0 & bits(from, to);
        Self(self.0 & !data | data << 32)
    }

    /// Returns the bitmap with subclusters `from..to` as unallocated.
    #[must_use]
    pub const fn with_unallocated(self, from: u32, to: u32) -> Self {
        Self(self.0 & !(bits(from, to) | bits(from, to) << 32))
    }

    /// Says whether any subcluster holds data.
    #[must_use]
    pub const fn has_data(self) -> bool {
        self.0 & Self::ALL_DATA.0 != 0
    }

    /// Says whether a subcluster is both data and zeros, which the format forbids.
    #[must_use]
    pub const fn is_invalid(self) -> bool {
        self.0 >> 32 & self.0 & Self::ALL_DATA.0 != 0
    }

    /// Returns the state of subcluster `index` and the end of the run of that state.
    #[must_use]
    pub const fn run(self, index: u32) -> (SubclusterState, u32) {
        let data = ((self.0 & Self::ALL_DATA.0) >> index) as u32;
        let zero = (self.0 >> 32 >> index) as u32;
        let same_data = if data & 1 == 1 { data.trailing_ones() } else { data.trailing_zeros() };
        let same_zero = if zero & 1 == 1 { zero.trailing_ones() } else { zero.trailing_zeros() };
        let len = if same_data < same_zero { same_data } else { same_zero };
        let end = if index + len > 32 { 32 } else { index + len };
        (self.state(index), end)
    }
}
