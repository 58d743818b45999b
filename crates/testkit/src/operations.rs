//! Random guest operations, from a byte to many clusters.

use lacuna::block::{DiscardMode, WriteFlags, ZeroFlags};
use lacuna::units::{GuestOffset, GuestRange};

use crate::Random;

/// Something a guest (or the one who runs it) asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Read(GuestRange),
    /// Writes [`content`] of `seed`.
    Write {
        /// Where.
        range: GuestRange,
        /// What.
        seed: u64,
        /// How.
        flags: WriteFlags,
    },
    /// Writes zeroes.
    WriteZeroes {
        /// Where.
        range: GuestRange,
        /// How.
        flags: ZeroFlags,
    },
    /// Discards.
    Discard {
        /// Where.
        range: GuestRange,
        /// How thoroughly.
        mode: DiscardMode,
    },
    /// Writes [`content`] of `seed` compressed: one cluster, or the disk's last part.
    WriteCompressed {
        /// Where.
        range: GuestRange,
        /// What.
        seed: u64,
    },
    /// Flushes.
    Flush,
    /// Changes the size of the disk.
    Resize {
        /// To this many bytes.
        size_bytes: u64,
    },
    /// Closes the image and opens it again.
    Reopen,
}

impl Operation {
    /// Returns the guest bytes that it reads or changes.
    #[must_use]
    pub const fn range(&self) -> Option<GuestRange> {
        match self {
            Self::Read(range)
            | Self::Write { range, .. }
            | Self::WriteZeroes { range, .. }
            | Self::Discard { range, .. }
            | Self::WriteCompressed { range, .. } => Some(*range),
            Self::Flush | Self::Resize { .. } | Self::Reopen => None,
        }
    }

    /// Says whether guest bytes may be others afterwards.
    #[must_use]
    pub const fn changes_bytes(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Flush | Self::Reopen)
    }
}

/// Returns the bytes that a write of `seed` puts into `range`: they differ by place, compress
/// well, and are the same however the range is cut.
#[must_use]
pub fn content(seed: u64, range: GuestRange) -> Vec<u8> {
    lacuna_conform::content(seed, range.start.0..range.end().0)
}

/// Which operations may come, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Menu {
    /// Size of a cluster: boundaries of clusters are where it hurts.
    pub cluster_bytes: u64,
    /// The largest disk that a resize makes; nothing forbids resizing.
    pub resize_up_to: Option<u64>,
    /// Whether compressed writes may come.
    pub compressed: bool,
    /// Whether the image may be closed and opened again.
    pub reopen: bool,
    /// Whether discards that remove the mapping may come.
    pub full_discard: bool,
}

/// An endless stream of operations.
///
/// ```
/// use testkit::{Menu, Operations};
/// let menu = Menu { cluster_bytes: 65536, resize_up_to: None, compressed: true, reopen: false,
///     full_discard: false };
/// let mut operations = Operations::new(7, menu);
/// let range = operations.next(1 << 20).range();
/// assert!(range.is_none_or(|range| range.end().0 <= 1 << 20));
/// ```
#[derive(Clone, Debug)]
pub struct Operations {
    random: Random,
    menu: Menu,
}

impl Operations {
    /// Makes the stream of `seed`.
    #[must_use]
    pub const fn new(seed: u64, menu: Menu) -> Self {
        Self { random: Random::new(seed), menu }
    }

    /// Returns the next operation for a disk of `size_bytes` (not 0).
    pub fn next(&mut self, size_bytes: u64) -> Operation {
        let range = self.range(size_bytes);
        match self.random.below(100) {
            0..20 => Operation::Read(range),
            20..52 => self.write(range),
            52..66 => Operation::WriteZeroes { range, flags: self.zero_flags() },
            66..78 => Operation::Discard { range, mode: self.discard_mode() },
            78..86 if self.menu.compressed => self.compressed(size_bytes),
            86..91 => Operation::Flush,
            91..96 => self.resize().unwrap_or_else(|| self.write(range)),
            96..100 if self.menu.reopen => Operation::Reopen,
            _ => self.write(range),
        }
    }

    const fn write(&mut self, range: GuestRange) -> Operation {
        let flags = if self.random.one_in(16) { WriteFlags::FUA } else { WriteFlags::empty() };
        Operation::Write { range, seed: self.random.next() >> 32, flags }
    }

    fn zero_flags(&mut self) -> ZeroFlags {
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, self.random.one_in(2));
        flags.set(ZeroFlags::FUA, self.random.one_in(16));
        flags.set(ZeroFlags::THOROUGH, self.random.one_in(4));
        flags
    }

    const fn discard_mode(&mut self) -> DiscardMode {
        match self.menu.full_discard && self.random.one_in(4) {
            true => DiscardMode::Full,
            false => DiscardMode::Guest,
        }
    }

    fn compressed(&mut self, size_bytes: u64) -> Operation {
        let cluster = self.random.below(size_bytes.div_ceil(self.menu.cluster_bytes));
        let start = cluster * self.menu.cluster_bytes;
        let len = self.menu.cluster_bytes.min(size_bytes - start);
        let range = GuestRange::new(GuestOffset(start), len);
        Operation::WriteCompressed { range, seed: self.random.next() >> 32 }
    }

    fn resize(&mut self) -> Option<Operation> {
        let sectors = self.menu.resize_up_to? / 512;
        let clusters = self.menu.resize_up_to? / self.menu.cluster_bytes;
        let size_bytes = match self.random.one_in(2) || clusters == 0 {
            true => (1 + self.random.below(sectors)) * 512,
            false => (1 + self.random.below(clusters)) * self.menu.cluster_bytes,
        };
        Some(Operation::Resize { size_bytes })
    }

    /// Chooses a range: often near a boundary of clusters, often near the start of the disk.
    fn range(&mut self, size_bytes: u64) -> GuestRange {
        let unit = *self.random.pick(&[1, 1, 16, 512, 4096, self.menu.cluster_bytes]);
        let limit = match self.random.one_in(2) {
            true => size_bytes,
            false => size_bytes.min(4 * self.menu.cluster_bytes),
        };
        let mut start = self.random.below(limit) / unit * unit;
        if self.random.one_in(4) {
            let boundary = start / self.menu.cluster_bytes * self.menu.cluster_bytes;
            start = boundary.saturating_sub(self.random.below(unit.min(boundary) + 1));
        }
        let most = match self.random.below(8) {
            0 => 16,
            1 => 512,
            2..6 => self.menu.cluster_bytes,
            6 => 2 * self.menu.cluster_bytes,
            _ => 5 * self.menu.cluster_bytes,
        };
        let len = (1 + self.random.below(most)).next_multiple_of(unit);
        GuestRange::new(GuestOffset(start), len.min(size_bytes - start))
    }
}
