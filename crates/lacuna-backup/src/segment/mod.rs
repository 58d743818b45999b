//! A segment: a file of zstd frames in guest order, and the index that finds and checks them.
//!
//! ```text
//! header   magic, version, the checksum of what the point was begun as
//! frames   each at most 1 MiB of the disk, compressed where that makes it shorter
//! index    64 bytes for each frame or range of zeros: where, what, checksum of the stored bytes
//! footer   how many entries, which part of the disk is covered, checksum of header and index
//! ```
//!
//! * Always: a frame can be read by itself, in memory that its length bounds.
//! * Always: every byte of the file is under a checksum, and that of the footer, which the manifest
//!   has, is over all others.
//! * Never: a length is believed before it is held against what the file and the disk allow.

mod format;
mod read;
mod write;

pub(crate) use format::{Entry, Footer, HEADER_BYTES, Kind, TAIL_BYTES};
pub(crate) use read::Segment;
pub(crate) use write::{Frame, SegmentWriter};

/// Bytes of the disk in a frame, at most: what is decompressed and checked as one.
pub(crate) const MAX_FRAME_BYTES: u64 = 1 << 20;
/// Entries of an index, at most: 1 MiB of it.
pub(crate) const MAX_ENTRIES: usize = 1 << 14;
