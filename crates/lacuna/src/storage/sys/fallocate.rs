//! Space of a file: taken, zeroed, given back.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, fallocate};

use super::transfer::uninterrupted;

/// Turns `[offset, offset + len)` into a hole; the length stays.
pub(crate) fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    uninterrupted(|| fallocate(file, mode, offset, len))
}

/// Makes the range read as zeros with its space reserved; extends a shorter file.
pub(crate) fn zero_range(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    uninterrupted(|| fallocate(file, FallocateFlags::ZERO_RANGE, offset, len))
}

/// Reserves space for the range, content unchanged; extends a shorter file.
pub(crate) fn allocate(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    uninterrupted(|| fallocate(file, FallocateFlags::empty(), offset, len))
}
