//! What calls do to the bytes of a file.

use std::sync::Arc;

use lacuna::storage::ZeroMode;

use crate::SparseBytes;

/// What a call does to the bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Bytes at an offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// Zeros from start to end (exclusive).
    Zero {
        /// The first byte.
        start: u64,
        /// The first byte that stays.
        end: u64,
        /// Whether the space may become a hole.
        mode: ZeroMode,
    },
    /// A hole from start to end (exclusive).
    Punch {
        /// The first byte.
        start: u64,
        /// The first byte that stays.
        end: u64,
    },
    /// Space from start to end (exclusive).
    Allocate {
        /// The first byte.
        start: u64,
        /// The end.
        end: u64,
    },
    /// A new length.
    SetLen {
        /// In bytes.
        len: u64,
    },
}

/// Sectors that reach the medium whole or not at all.
pub(super) const SECTOR: u64 = 512;

impl Effect {
    /// Returns the bytes it touches, start and end; both 0 for a new length.
    #[must_use]
    pub fn span(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, bytes } => (*offset, offset + bytes.len() as u64),
            Self::Zero { start, end, .. }
            | Self::Punch { start, end }
            | Self::Allocate { start, end } => (*start, *end),
            Self::SetLen { .. } => (0, 0),
        }
    }

    /// Returns how many sectors it can be torn into.
    pub(super) fn sectors(&self) -> u64 {
        let (start, end) = self.span();
        match self {
            Self::SetLen { .. } | Self::Allocate { .. } => 1,
            _ => (end.div_ceil(SECTOR) - start / SECTOR).max(1),
        }
    }

    /// Does it to `file`.
    pub fn apply(&self, file: &mut SparseBytes) {
        match self {
            Self::Write { offset, bytes } => file.write(*offset, bytes),
            Self::Zero { start, end, mode: ZeroMode::Allocate } => file.zero(*start, *end),
            Self::Zero { start, end, mode: ZeroMode::MayUnmap } => {
                file.punch(*start, *end);
                file.set_len(file.len().max(*end));
            }
            Self::Punch { start, end } => file.punch(*start, *end),
            Self::Allocate { start, end } => file.allocate(*start, *end),
            Self::SetLen { len } => file.set_len(*len),
        }
    }

    /// Returns the part that lies in its sectors `from..to`, counted from its own first one.
    pub(super) fn part(&self, from: u64, to: u64) -> Self {
        let (start, end) = self.span();
        let base = start / SECTOR * SECTOR;
        let (from, to) = ((base + from * SECTOR).max(start), (base + to * SECTOR).min(end));
        match self {
            Self::Write { offset, bytes } => Self::Write {
                offset: from,
                bytes: bytes[(from - offset) as usize..(to - offset) as usize].into(),
            },
            Self::Zero { mode, .. } => Self::Zero { start: from, end: to, mode: *mode },
            Self::Punch { .. } => Self::Punch { start: from, end: to },
            whole => whole.clone(),
        }
    }
}
