//! One read or write call with everything that must stay alive until the kernel has answered.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::lock::OpenFile;
use crate::buffer::{Buffer, Hold};

/// The most that one call moves; what the kernel cuts longer ones to.
pub(super) const CALL_BYTES: usize = 0x7fff_f000;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// What stays with a request for as long as the kernel may touch the file for it.
#[derive(Debug, Default)]
pub(crate) struct Rider {
    /// The caller's buffer where another one does the work.
    pub(crate) caller: Option<Buffer>,
    /// The range lock of this storage.
    #[expect(dead_code, reason = "it works by being dropped")]
    pub(crate) lock: Hold,
}

/// A single call: it may move fewer bytes than asked.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) file: Arc<OpenFile>,
    pub(crate) direction: Direction,
    /// Where in the file the first byte of `buffer[start..]` belongs.
    pub(crate) offset: u64,
    pub(crate) buffer: Buffer,
    pub(crate) start: usize,
    pub(crate) rider: Rider,
}

impl Attempt {
    /// Makes the call on this thread.
    pub(crate) fn block(mut self) -> (io::Result<usize>, Self) {
        let result = match self.direction {
            Direction::Read => uninterrupted(|| {
                rustix::io::pread(&self.file, &mut self.buffer[self.start..], self.offset)
            }),
            Direction::Write => uninterrupted(|| {
                rustix::io::pwrite(&self.file, &self.buffer[self.start..], self.offset)
            }),
        };
        (result, self)
    }
}

/// Repeats a call until no signal interrupts it.
pub(crate) fn uninterrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => (),
            result => return Ok(result?),
        }
    }
}

/// Fills `bytes`, one sector, from `offset` on, with zeros past the end of the file.
///
/// One call only: a second one, after the part that the file has, would not be aligned.
pub(crate) fn read_sector(file: BorrowedFd<'_>, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let read = uninterrupted(|| rustix::io::pread(file, &mut *bytes, offset))?;
    bytes[read..].fill(0);
    Ok(())
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all(file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let at = offset + done as u64;
        match uninterrupted(|| rustix::io::pwrite(file, &bytes[done..], at))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => done += written,
        }
    }
    Ok(())
}
