//! Numbers that must not be mistaken for each other.

/// What a client calls a request; replies carry it back unchanged.
///
/// ```
/// assert!(lacuna_nbd::Cookie(1) < lacuna_nbd::Cookie(2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// What a server calls a meta context on one connection.
///
/// ```
/// assert_ne!(lacuna_nbd::ContextId(0), lacuna_nbd::ContextId(1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContextId(pub u32);

/// A range of an export in bytes: from `start` up to, but not including, [`end`](Self::end).
///
/// ```
/// use lacuna_nbd::ByteRange;
/// let range = ByteRange { start: 512, len: 1024 };
/// assert_eq!(range.end(), Some(1536));
/// assert!(range.is_within(1536) && !range.is_within(1535));
/// assert_eq!(ByteRange { start: u64::MAX, len: 2 }.end(), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// The number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// Returns the first byte behind the range, unless there is no such number.
    #[must_use]
    pub const fn end(self) -> Option<u64> {
        self.start.checked_add(self.len)
    }

    /// Says whether the range lies in an export of `size_bytes`.
    #[must_use]
    pub fn is_within(self, size_bytes: u64) -> bool {
        self.end().is_some_and(|end| end <= size_bytes)
    }

    /// Says whether all of `other` lies in this range.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        let ends = self.end().zip(other.end());
        self.start <= other.start && ends.is_some_and(|(own, other)| other <= own)
    }
}
