//! Block status in which allocated, zero and hole are independent facts.

use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Which layer of a chain supplies the bytes: 0 none, 1 the top, 2 its backing layer, and so on.
///
/// ```
/// assert_eq!(lacuna::block::AllocationDepth::TOP.0, 1);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllocationDepth(pub u32);

impl AllocationDepth {
    /// Unallocated in every layer.
    pub const NOWHERE: Self = Self(0);
    /// Allocated in the layer that was asked.
    pub const TOP: Self = Self(1);

    /// Returns the depth as seen from one layer further up.
    #[must_use]
    pub const fn below(self) -> Self {
        match self.0 {
            0 => self,
            depth => Self(depth + 1),
        }
    }
}

/// What is known of a range, each fact for itself.
///
/// ```
/// use lacuna::block::ExtentStatus;
/// assert!(ExtentStatus::UNALLOCATED.reads_zero && ExtentStatus::UNALLOCATED.is_hole);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExtentStatus {
    /// Which layer decides the content (003; `qemu:allocation-depth`). A zero flag counts.
    pub depth: AllocationDepth,
    /// The bytes are known to be zeros. False says nothing.
    pub reads_zero: bool,
    /// No host space is reserved for the range. Says nothing about the content.
    pub is_hole: bool,
    /// The bytes are stored compressed.
    pub is_compressed: bool,
    /// Where the range lies in the storage of the deciding layer, where it lies in one piece.
    pub host: Option<HostOffset>,
}

impl ExtentStatus {
    /// Nothing anywhere: reads as zeros, takes no space.
    pub const UNALLOCATED: Self = Self {
        depth: AllocationDepth::NOWHERE,
        reads_zero: true,
        is_hole: true,
        is_compressed: false,
        host: None,
    };

    /// Returns the same facts `distance` bytes further on.
    #[must_use]
    pub fn advanced(self, distance: u64) -> Self {
        Self { host: self.host.map(|host| host + distance), ..self }
    }
}

/// A maximal run of one status.
///
/// ```
/// use lacuna::block::{Extent, ExtentStatus};
/// use lacuna::units::{GuestOffset, GuestRange};
/// let range = GuestRange::new(GuestOffset(0), 512);
/// assert!(Extent { range, status: ExtentStatus::UNALLOCATED }.status.is_hole);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where.
    pub range: GuestRange,
    /// What is known.
    pub status: ExtentStatus,
}

impl Extent {
    /// Says whether `next` starts where this ends with the same facts, host position included.
    #[must_use]
    pub fn is_continued_by(&self, next: &Self) -> bool {
        self.range.end() == next.range.start && self.status.advanced(self.range.len) == next.status
    }

    /// Says whether the top layer itself holds bytes there that are not known to be zeros.
    ///
    /// ```
    /// use lacuna::block::{Extent, ExtentStatus};
    /// use lacuna::units::{GuestOffset, GuestRange};
    /// let range = GuestRange::new(GuestOffset(0), 512);
    /// assert!(!Extent { range, status: ExtentStatus::UNALLOCATED }.is_own_data());
    /// ```
    #[must_use]
    pub fn is_own_data(&self) -> bool {
        self.status.depth == AllocationDepth::TOP && !self.status.reads_zero
    }
}

/// Collects runs in guest order and joins neighbours of one status.
///
/// ```
/// use lacuna::block::{Extent, ExtentBuilder, ExtentStatus};
/// use lacuna::units::{GuestOffset, GuestRange};
///
/// let mut builder = ExtentBuilder::default();
/// for start in [0, 512] {
///     let range = GuestRange::new(GuestOffset(start), 512);
///     builder.push(Extent { range, status: ExtentStatus::UNALLOCATED });
/// }
/// assert_eq!(builder.finish()[0].range.len, 1024);
/// ```
#[derive(Debug, Default)]
pub struct ExtentBuilder(Vec<Extent>);

impl ExtentBuilder {
    /// Adds a run behind all others; an empty one changes nothing.
    pub fn push(&mut self, next: Extent) {
        match self.0.last_mut() {
            _ if next.range.is_empty() => {}
            Some(last) if last.is_continued_by(&next) => last.range.len += next.range.len,
            _ => self.0.push(next),
        }
    }

    /// Returns the end of what was collected.
    #[must_use]
    pub fn end(&self) -> Option<GuestOffset> {
        self.0.last().map(|last| last.range.end())
    }

    /// Returns how many extents there are so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Says whether nothing was collected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the extents in guest order.
    #[must_use]
    pub fn finish(self) -> Vec<Extent> {
        self.0
    }
}
