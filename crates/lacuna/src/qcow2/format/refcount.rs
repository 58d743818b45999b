//! Refcounts (B.8): a table of blocks, blocks of counts of 1 to 64 bits.
//!
//! | width | place of count `i` in a block |
//! |---|---|
//! | 1, 2, 4 bits | byte `i * width / 8`, lowest bits first |
//! | 8 to 64 bits | bytes from `i * width / 8` on, big-endian |
//!
//! * Always: an index outside of the block is a bug of the caller, never of the image.

use super::geometry::Geometry;
use crate::units::HostOffset;

/// Bits 9 to 63: where a refcount block lies.
const BLOCK_MASK: u64 = !0x1ff;

/// An entry of the refcount table: bits 9 to 63 the block's offset, the others reserved.
///
/// ```
/// use lacuna::qcow2::format::RefcountTableEntry;
/// use lacuna::units::HostOffset;
/// let entry = RefcountTableEntry::new(HostOffset(0x20000));
/// assert_eq!(entry.block(), Some(HostOffset(0x20000)));
/// assert_eq!(RefcountTableEntry(0).block(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// No block: all its refcounts are zero.
    pub const ABSENT: Self = Self(0);

    /// Makes the entry of a block.
    #[must_use]
    pub const fn new(block: HostOffset) -> Self {
        Self(block.0 & BLOCK_MASK)
    }

    /// Returns where the block lies, unless there is none. Not checked against the cluster size.
    #[must_use]
    pub const fn block(self) -> Option<HostOffset> {
        match self.0 & BLOCK_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Says whether a bit is set that the format reserves.
    #[must_use]
    pub const fn has_reserved_bits(self) -> bool {
        self.0 & !BLOCK_MASK != 0
    }
}

/// How wide refcounts are, as a way to read and write them in a block.
///
/// ```
/// use lacuna::qcow2::format::{EntryWidth, Geometry, RefcountWidth, Version};
/// let geometry = Geometry::new(Version::V3, 9, 2, EntryWidth::Standard)?;
/// let width = RefcountWidth::of(&geometry);
/// let mut block = [0; 512];
/// width.write(&mut block, 1, 0xa);
/// assert_eq!((block[0], width.read(&block, 1)), (0xa0, 0xa));
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefcountWidth {
    /// 1 bit.
    Bits1,
    /// 2 bits.
    Bits2,
    /// 4 bits.
    Bits4,
    /// 8 bits.
    Bits8,
    /// 16 bits, the default and all that version 2 knows.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
}

impl RefcountWidth {
    /// Returns the width in an image of this geometry.
    #[must_use]
    pub const fn of(geometry: &Geometry) -> Self {
        match geometry.refcount_order() {
            0 => Self::Bits1,
            1 => Self::Bits2,
            2 => Self::Bits4,
            3 => Self::Bits8,
            4 => Self::Bits16,
            5 => Self::Bits32,
            _ => Self::Bits64,
        }
    }

    /// Returns the width in bits: 1 to 64.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits1 => 1,
            Self::Bits2 => 2,
            Self::Bits4 => 4,
            Self::Bits8 => 8,
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// Returns the greatest refcount that fits.
    #[must_use]
    pub const fn max(self) -> u64 {
        match u64::MAX.checked_shr(64_u32.wrapping_sub(self.bits())) {
            Some(max) => max,
            None => 0,
        }
    }

    /// Returns how many refcounts `block_bytes` bytes hold.
    #[must_use]
    pub fn counts_in(self, block_bytes: usize) -> usize {
        match self.packing() {
            Packing::Several { per_byte, .. } => block_bytes.saturating_mul(per_byte),
            Packing::Bytes(1) => block_bytes,
            Packing::Bytes(2) => block_bytes >> 1,
            Packing::Bytes(4) => block_bytes >> 2,
            Packing::Bytes(_) => block_bytes >> 3,
        }
    }

    /// Returns refcount `index` of the block.
    ///
    /// # Panics
    /// If the block has no such refcount.
    #[must_use]
    pub fn read(self, block: &[u8], index: usize) -> u64 {
        match self.packing() {
            Packing::Several { mask, .. } => {
                let (byte, shift) = self.place(index);
                let Some(byte) = block.get(byte) else { no_such(index, block.len()) };
                u64::from(byte.wrapping_shr(shift) & mask)
            }
            Packing::Bytes(width) => {
                let Some(bytes) =
                    index.checked_mul(width).and_then(|at| block.get(at..)?.get(..width))
                else {
                    no_such(index, block.len())
                };
                bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
            }
        }
    }

    /// Sets refcount `index` of the block.
    ///
    /// # Panics
    /// If the block has no such refcount or the count does not fit.
    pub fn write(self, block: &mut [u8], index: usize, count: u64) {
        assert!(count <= self.max(), "refcount {count} does not fit into {} bits", self.bits());
        let len = block.len();
        match self.packing() {
            Packing::Several { mask, .. } => {
                let (byte, shift) = self.place(index);
                let Some(byte) = block.get_mut(byte) else { no_such(index, len) };
                let [.., low] = count.to_be_bytes();
                *byte = *byte & !mask.wrapping_shl(shift) | low.wrapping_shl(shift);
            }
            Packing::Bytes(width) => {
                let place =
                    index.checked_mul(width).and_then(|at| block.get_mut(at..)?.get_mut(..width));
                let Some(place) = place else { no_such(index, len) };
                for (place, byte) in place.iter_mut().rev().zip(count.to_le_bytes()) {
                    *place = byte;
                }
            }
        }
    }

    const fn packing(self) -> Packing {
        match self {
            Self::Bits1 => Packing::Several { per_byte: 8, mask: 1 },
            Self::Bits2 => Packing::Several { per_byte: 4, mask: 3 },
            Self::Bits4 => Packing::Several { per_byte: 2, mask: 15 },
            Self::Bits8 => Packing::Bytes(1),
            Self::Bits16 => Packing::Bytes(2),
            Self::Bits32 => Packing::Bytes(4),
            Self::Bits64 => Packing::Bytes(8),
        }
    }

    /// Byte and bit shift of a count that shares its byte.
    fn place(self, index: usize) -> (usize, u32) {
        let first_bit = (index as u64).saturating_mul(self.bits().into());
        let byte = usize::try_from(first_bit >> 3).unwrap_or(usize::MAX);
        (byte, u32::try_from(first_bit & 7).unwrap_or(0))
    }
}

/// How counts share bytes.
enum Packing {
    Several { per_byte: usize, mask: u8 },
    Bytes(usize),
}

#[cold]
fn no_such(index: usize, block_bytes: usize) -> ! {
    panic!("no refcount {index} in a block of {block_bytes} bytes")
}
