//! The extent map of a file, as its file system tells it.
//!
//! Never: `Unwritten` from an answer without [`Writeback::First`] taken for zeros. Without it ext4
//! calls buffered data in a preallocated range unwritten (trap D.1-67).

use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::transfer::uninterrupted;

/// Extents per call: 32 make a request of under 2 KiB.
const BATCH: usize = 32;
/// Calls per question, so that an answer takes bounded time however cut up the file is.
const CALLS: usize = 64;

const FLAG_SYNC: u32 = 0x1;
const EXTENT_LAST: u32 = 0x1;
const EXTENT_UNWRITTEN: u32 = 0x800;
/// Flags an unwritten extent may carry and still be one: last, merged, shared.
const EXTENT_HARMLESS: u32 = EXTENT_LAST | 0x1000 | 0x2000 | EXTENT_UNWRITTEN;

/// What the file system has at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// An extent with content, or one that is not known well enough to say otherwise.
    Written,
    /// Space reserved, nothing written, as far as this answer goes.
    Unwritten,
    /// No extent.
    Gap,
}

/// Whether dirty pages are written out before the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writeback {
    /// The answer is about the disk alone, whatever the page cache holds.
    Skip,
    /// The answer includes everything written before the call.
    First,
}

/// A run of one mapping from the start of the question on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) mapping: Mapping,
    /// In bytes, at least 1, at most what was asked about.
    pub(crate) len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Question {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; BATCH],
}

const HEADER_BYTES: usize = 32;
const _: () = assert!(size_of::<Extent>() == 56);
const _: () = assert!(size_of::<Question>() == HEADER_BYTES + BATCH * 56);

/// Returns the first run of `[start, start + len)`; `len` must not be 0.
pub(crate) fn first_run(
    file: BorrowedFd<'_>,
    start: u64,
    len: u64,
    writeback: Writeback,
) -> io::Result<Run> {
    let mut runs = Runs { at: start, end: start + len, found: None };
    for _ in 0..CALLS {
        let before = runs.at;
        let (extents, count) = ask(file, before, runs.end - before, writeback)?;
        let complete = count < BATCH;
        if runs.take(&extents[..count], complete) || runs.at == before {
            break;
        }
    }
    let mapping = runs.found.unwrap_or(Mapping::Written);
    // An answer that makes no sense is no answer: everything may be data.
    let len = if runs.at > start { runs.at - start } else { len };
    Ok(Run { mapping, len })
}

/// The run so far: `found` from the start to `at`.
struct Runs {
    at: u64,
    end: u64,
    found: Option<Mapping>,
}

impl Runs {
    /// Walks over a batch; says whether the run has ended.
    fn take(&mut self, extents: &[Extent], complete: bool) -> bool {
        let mut last = complete;
        for extent in extents {
            let end = extent.logical.saturating_add(extent.length);
            if extent.logical > self.at && self.extend(Mapping::Gap, extent.logical) {
                return true;
            }
            if end > self.at && self.extend(mapping(extent.flags), end) {
                return true;
            }
            last |= extent.flags & EXTENT_LAST != 0;
        }
        if last && self.at < self.end {
            self.extend(Mapping::Gap, self.end);
        }
        last
    }

    /// Adds `[at, end)` to the run; says whether the run has ended, for it is of another kind or
    /// reaches the end of the question.
    fn extend(&mut self, mapping: Mapping, end: u64) -> bool {
        if *self.found.get_or_insert(mapping) != mapping {
            return true;
        }
        self.at = end.min(self.end);
        self.at == self.end
    }
}

fn mapping(flags: u32) -> Mapping {
    let unwritten = flags & EXTENT_UNWRITTEN != 0 && flags & !EXTENT_HARMLESS == 0;
    if unwritten { Mapping::Unwritten } else { Mapping::Written }
}

fn ask(
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
    writeback: Writeback,
) -> io::Result<([Extent; BATCH], usize)> {
    let flags = if writeback == Writeback::First { FLAG_SYNC } else { 0 };
    let extent_count = BATCH as u32;
    let mut question = Question {
        start,
        length,
        flags,
        mapped_extents: 0,
        extent_count,
        reserved: 0,
        extents: [Extent::default(); BATCH],
    };
    uninterrupted(|| {
        question.mapped_extents = 0;
        // SAFETY: the opcode is FS_IOC_FIEMAP, whose argument is a `Question`: the kernel writes
        // the header and at most `extent_count` extents, for which there is room.
        unsafe { ioctl(file, Fiemap(&mut question)) }
    })?;
    let count = (question.mapped_extents as usize).min(BATCH);
    Ok((question.extents, count))
}

struct Fiemap<'a>(&'a mut Question);

// SAFETY: opcode and pointer belong together (see `ask`), the kernel writes through the pointer,
// and the output is not read from it.
unsafe impl Ioctl for Fiemap<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::from_components(Direction::ReadWrite, b'f', 11, HEADER_BYTES)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        _: IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(logical: u64, length: u64, flags: u32) -> Extent {
        Extent { logical, length, flags, ..Extent::default() }
    }

    fn run(extents: &[Extent], complete: bool) -> (Option<Mapping>, u64) {
        let mut runs = Runs { at: 100, end: 1000, found: None };
        runs.take(extents, complete);
        (runs.found, runs.at)
    }

    #[test]
    fn neighbours_of_one_kind_are_one_run() {
        let extents = [extent(0, 300, 0), extent(300, 100, 0), extent(500, 10, 0)];
        assert_eq!(run(&extents, true), (Some(Mapping::Written), 400));
    }

    #[test]
    fn what_no_extent_covers_is_a_gap() {
        assert_eq!(run(&[], true), (Some(Mapping::Gap), 1000));
        assert_eq!(run(&[extent(400, 10, 0)], true), (Some(Mapping::Gap), 400));
        assert_eq!(run(&[extent(0, 50, 0)], true), (Some(Mapping::Gap), 1000));
    }

    #[test]
    fn an_unwritten_extent_with_a_doubtful_flag_counts_as_written() {
        const DELALLOC: u32 = 0x4;
        const SHARED: u32 = 0x2000;
        let unwritten = extent(100, 50, EXTENT_UNWRITTEN | SHARED);
        assert_eq!(run(&[unwritten, extent(150, 50, 0)], true), (Some(Mapping::Unwritten), 150));
        let doubtful = extent(100, 50, EXTENT_UNWRITTEN | DELALLOC);
        assert_eq!(run(&[doubtful], true), (Some(Mapping::Written), 150));
    }

    #[test]
    fn a_full_batch_says_nothing_about_what_follows() {
        assert_eq!(run(&[extent(0, 300, 0)], false), (Some(Mapping::Written), 300));
    }
}
