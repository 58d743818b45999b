//! O_DIRECT requests that do not keep to the alignment.
//!
//! * Always: read-modify-write and the cut of a padded tail happen under one exclusive lock, in
//!   one job that runs to its end even if the caller is gone. So neighbours in a sector do not
//!   undo each other, and nobody sees the padding.
//! * A crash in between leaves at most a tail of zeros up to the end of the sector.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::Inner;
use super::range_lock::{LENGTH, Mode};
use crate::buffer::{Buffer, Hold};
use crate::storage::sys::{
    Attempt, Direction, Kind, OpenFile, Rider, file_len, read_sector, uninterrupted, write_all,
};

/// The most memory one request takes for itself.
const PIECE_BYTES: u64 = 1 << 20;

impl Inner {
    fn sector(&self) -> u64 {
        self.direct.map_or(1, |alignment| u64::from(alignment.offset))
    }

    /// Reads a part of `buffer[done..]` by way of whole sectors; 0 at the end of the file.
    pub(super) async fn read_bounced(
        &self,
        position: u64,
        buffer: Buffer,
        done: usize,
    ) -> (io::Result<usize>, Buffer) {
        let sectors = Sectors::around(position, buffer.len() - done, self.sector());
        let attempt = Attempt {
            file: Arc::clone(&self.file),
            direction: Direction::Read,
            offset: sectors.start,
            buffer: Buffer::new(sectors.len),
            start: 0,
            rider: Rider { caller: Some(buffer), lock: Hold::none() },
        };
        let (result, attempt) = self.drive(attempt).await;
        let mut buffer = attempt.rider.caller.expect("the rider comes back");
        let taken = result.map(|read| {
            let usable = read.saturating_sub(sectors.head).min(sectors.wanted);
            let source = &attempt.buffer[sectors.head..][..usable];
            buffer[done..done + usable].copy_from_slice(source);
            usable
        });
        (taken, buffer)
    }

    /// Writes all of `buffer[done..]` by way of whole sectors.
    pub(super) async fn write_bounced(
        &self,
        position: u64,
        buffer: Buffer,
        done: usize,
    ) -> (io::Result<usize>, Buffer) {
        let (lock, tail) = match self.lock_sectors(position, buffer.len() - done).await {
            Ok(locked) => locked,
            Err(error) => return (Err(error), buffer),
        };
        let merge = Merge {
            file: Arc::clone(&self.file),
            kind: self.kind,
            sector: self.sector(),
            position,
            tail,
        };
        let job = move || {
            let result = merge.run(&buffer[done..]);
            drop(lock);
            (result.map(|()| buffer.len() - done), buffer)
        };
        self.on_thread(job).await
    }

    /// Locks the sectors of the range, and the length if whole sectors would pass it.
    async fn lock_sectors(&self, position: u64, len: usize) -> io::Result<(Hold, Tail)> {
        let sector = self.sector();
        let start = position - position % sector;
        let end = (position + len as u64).next_multiple_of(sector);
        // A length padded by somebody else for a moment does no harm: either we wait for him, or
        // he is behind our range and leaves a file that reaches there.
        let inside = || Ok::<_, io::Error>(end <= file_len(self.file.as_fd(), self.kind)?);
        loop {
            if !inside()? {
                return Ok((self.locks.lock(start..LENGTH, Mode::Exclusive).await, Tail::Cut));
            }
            let lock = self.locks.lock(start..end, Mode::Exclusive).await;
            // The file may have been cut while we waited.
            if inside()? {
                return Ok((lock, Tail::Keep));
            }
        }
    }
}

/// What becomes of a file that got longer than it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tail {
    /// It cannot have been us.
    Keep,
    /// It is cut back; the lock on the length keeps everybody else from making it longer.
    Cut,
}

/// The whole sectors around a range, as far as one piece reaches.
struct Sectors {
    start: u64,
    len: usize,
    /// Bytes before the range.
    head: usize,
    /// Bytes of the range that the sectors hold.
    wanted: usize,
}

impl Sectors {
    fn around(position: u64, len: usize, sector: u64) -> Self {
        let start = position - position % sector;
        let end = (position + len as u64).next_multiple_of(sector);
        let most = PIECE_BYTES.max(sector);
        let size = (end - start).min(most) as usize;
        let head = (position - start) as usize;
        Self { start, len: size, head, wanted: (size - head).min(len) }
    }
}

/// A read-modify-write, to be run on a thread that holds the lock.
struct Merge {
    file: Arc<OpenFile>,
    kind: Kind,
    sector: u64,
    position: u64,
    tail: Tail,
}

impl Merge {
    fn run(&self, bytes: &[u8]) -> io::Result<()> {
        let before = file_len(self.file.as_fd(), self.kind)?;
        let result = self.write_pieces(bytes);
        let end = self.position + bytes.len() as u64;
        if self.tail == Tail::Cut {
            // Also after a failure: what was padded must not stay.
            self.cut(before.max(end))?;
        }
        result
    }

    fn write_pieces(&self, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let sectors = Sectors::around(self.position + done as u64, rest.len(), self.sector);
            self.write_piece(&sectors, &rest[..sectors.wanted])?;
            done += sectors.wanted;
        }
        Ok(())
    }

    fn write_piece(&self, sectors: &Sectors, bytes: &[u8]) -> io::Result<()> {
        let mut bounce = Buffer::new(sectors.len);
        let (sector, tail) = (self.sector as usize, sectors.head + sectors.wanted);
        let last = sectors.len - sector;
        if sectors.head > 0 || tail < sector {
            self.read_old(sectors.start, &mut bounce[..sector])?;
        }
        if tail < sectors.len && last > 0 {
            self.read_old(sectors.start + last as u64, &mut bounce[last..])?;
        }
        bounce[sectors.head..tail].copy_from_slice(bytes);
        write_all(self.file.as_fd(), sectors.start, &bounce)
    }

    fn read_old(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        read_sector(self.file.as_fd(), offset, bytes)
    }

    fn cut(&self, len: u64) -> io::Result<()> {
        if self.kind == Kind::Regular && file_len(self.file.as_fd(), self.kind)? > len {
            uninterrupted(|| rustix::fs::ftruncate(&self.file, len))?;
        }
        Ok(())
    }
}
