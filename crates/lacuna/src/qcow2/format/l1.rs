//! L1 entries (B.4): bits 9 to 55 the L2 table's offset, bit 63 COPIED, all others reserved.

use crate::units::HostOffset;

/// Bits 9 to 55: where an L2 table or a cluster lies.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what the entry points to is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;

/// An entry of an L1 table.
///
/// ```
/// use lacuna::qcow2::format::L1Entry;
/// use lacuna::units::HostOffset;
/// let entry = L1Entry::new(HostOffset(0x40000));
/// assert!(entry.is_copied());
/// assert_eq!(entry.table(), Some(HostOffset(0x40000)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// No L2 table: the whole range is unallocated.
    pub const UNALLOCATED: Self = Self(0);

    /// Makes the entry of a table that nothing else references.
    #[must_use]
    pub const fn new(table: HostOffset) -> Self {
        Self((table.0 & OFFSET_MASK) | COPIED)
    }

    /// Encodes a table.
    pub(crate) fn encode(table: &[Self]) -> Vec<u8> {
        table.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
    }

    /// Decodes a table; bytes behind the last whole entry are left out.
    pub(crate) fn decode(bytes: &[u8]) -> Vec<Self> {
        let (words, _) = bytes.as_chunks::<8>();
        words.iter().map(|word| Self(u64::from_be_bytes(*word))).collect()
    }

    /// Returns where the L2 table lies, unless there is none.
    #[must_use]
    pub const fn table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Says whether the table may be changed in place.
    #[must_use]
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Returns the entry with the copied flag set or cleared.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        if copied { Self(self.0 | COPIED) } else { Self(self.0 & !COPIED) }
    }

    /// Says whether a bit is set that the format reserves.
    #[must_use]
    pub const fn has_reserved_bits(self) -> bool {
        self.0 & !(OFFSET_MASK | COPIED) != 0
    }
}
