//! Reads and writes.
//!
//! Buffered writes happen inline: they copy into the page cache, and a hop to a thread costs more
//! than the copy (ext4 refuses RWF_NOWAIT for writes, so there is no asking first). They wait for
//! the disk only where the host throttles writers, or has to read the rest of a page first.
//!
//! What is not done inline is boxed: the futures above are made and moved for every request, and the
//! fewer bytes they have, the better.

use std::io;
use std::sync::Arc;

use rustix::io::{Errno, ReadWriteFlags};

use super::range_lock::Mode;
use super::{Inner, Runner, remember, remembered};
use crate::buffer::Buffer;
use crate::storage::Transfer;
use crate::storage::sys::{Attempt, DirectAlignment, Direction, OpenFile, Rider, uninterrupted};

/// From how many bytes on a write goes past the page cache where that was asked for: below, the
/// wait for the disk costs more than the copy in memory.
const LARGE_BYTES: usize = 256 << 10;

/// The way of one step of a transfer.
enum Way {
    /// At once, on this thread.
    Inline,
    /// By the driver, from or to the caller's memory.
    Driver,
    /// Through memory of our own.
    Bounce,
}

impl Inner {
    pub(super) async fn read(&self, offset: u64, mut buffer: Buffer) -> Transfer {
        let len = buffer.len();
        if let Err(error) = self.end_of(offset, len as u64) {
            return (Err(error), buffer);
        }
        let mut done = 0;
        while done < len {
            let result;
            (result, buffer) = self.read_step(offset + done as u64, buffer, done).await;
            match result {
                // The end of the file.
                Ok(0) => {
                    buffer[done..].fill(0);
                    break;
                }
                Ok(read) => done += read,
                Err(error) => {
                    return (Err(self.error(error, "Reading", offset, len as u64)), buffer);
                }
            }
        }
        (Ok(()), buffer)
    }

    async fn read_step(
        &self,
        position: u64,
        mut buffer: Buffer,
        done: usize,
    ) -> (io::Result<usize>, Buffer) {
        if self.direct.is_none()
            && let Some(result) = self.read_cached(position, &mut buffer[done..])
        {
            return (result, buffer);
        }
        match self.way(position, &buffer[done..]) {
            Way::Bounce => Box::pin(self.read_bounced(position, buffer, done)).await,
            Way::Inline | Way::Driver => {
                let (direction, rider) = (Direction::Read, Rider::default());
                Box::pin(self.attempt(direction, position, buffer, done, rider)).await
            }
        }
    }

    /// Reads what the page cache has; nothing where that is nothing.
    fn read_cached(&self, position: u64, bytes: &mut [u8]) -> Option<io::Result<usize>> {
        if remembered(&self.refusals.nowait) {
            return None;
        }
        loop {
            let mut parts = [io::IoSliceMut::new(bytes)];
            let now = ReadWriteFlags::NOWAIT;
            match rustix::io::preadv2(&self.file, &mut parts, position, now) {
                Ok(read) => return Some(Ok(read)),
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) => return None,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    remember(&self.refusals.nowait);
                    return None;
                }
                // The driver will meet it as well, or not.
                Err(_) => return None,
            }
        }
    }

    pub(super) async fn write(&self, offset: u64, mut buffer: Buffer) -> Transfer {
        let len = buffer.len();
        let checked = self.require_write_access().and_then(|()| self.end_of(offset, len as u64));
        if let Err(error) = checked {
            return (Err(error), buffer);
        }
        let mut done = 0;
        while done < len {
            let result;
            (result, buffer) = self.write_step(offset + done as u64, buffer, done).await;
            let error = match result {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(written) => {
                    done += written;
                    continue;
                }
                Err(error) => error,
            };
            return (Err(self.error(error, "Writing", offset, len as u64)), buffer);
        }
        (Ok(()), buffer)
    }

    async fn write_step(
        &self,
        position: u64,
        mut buffer: Buffer,
        done: usize,
    ) -> (io::Result<usize>, Buffer) {
        if let Some(file) = self.past_cache(position, &buffer[done..]) {
            let result;
            (result, buffer) = Box::pin(self.write_past_cache(file, position, buffer, done)).await;
            match result {
                // The host promised more than it holds: from now on as before.
                Err(error) if is_any(&error, &[Errno::INVAL, Errno::OPNOTSUPP]) => {
                    remember(&self.refusals.past_cache);
                }
                result => return (result, buffer),
            }
        }
        let way = self.way(position, &buffer[done..]);
        if matches!(way, Way::Bounce) {
            return Box::pin(self.write_bounced(position, buffer, done)).await;
        }
        let end = position + (buffer.len() - done) as u64;
        let lock = self.locks.lock(position..end, Mode::Shared).await;
        if matches!(way, Way::Inline) {
            let write = || rustix::io::pwrite(&self.file, &buffer[done..], position);
            return (uninterrupted(write), buffer);
        }
        let rider = Rider { caller: None, lock };
        Box::pin(self.attempt(Direction::Write, position, buffer, done, rider)).await
    }

    fn way(&self, position: u64, bytes: &[u8]) -> Way {
        let Some(alignment) = self.direct else { return Way::Inline };
        if is_aligned(alignment, position, bytes) { Way::Driver } else { Way::Bounce }
    }

    /// Returns the file to write through where that goes past the page cache.
    fn past_cache(&self, position: u64, bytes: &[u8]) -> Option<&Arc<OpenFile>> {
        let past = self.past_cache.as_ref()?;
        let fits = bytes.len() >= LARGE_BYTES
            && is_aligned(past.alignment, position, bytes)
            && !remembered(&self.refusals.past_cache);
        fits.then_some(&past.file)
    }

    async fn write_past_cache(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        buffer: Buffer,
        start: usize,
    ) -> (io::Result<usize>, Buffer) {
        let end = offset + (buffer.len() - start) as u64;
        let rider = Rider { caller: None, lock: self.locks.lock(offset..end, Mode::Shared).await };
        let (file, direction) = (Arc::clone(file), Direction::Write);
        let attempt = Attempt { file, direction, offset, buffer, start, rider };
        let (result, attempt) = self.drive(attempt).await;
        (result, attempt.buffer)
    }

    /// Has the driver make one call.
    pub(super) async fn attempt(
        &self,
        direction: Direction,
        offset: u64,
        buffer: Buffer,
        start: usize,
        rider: Rider,
    ) -> (io::Result<usize>, Buffer) {
        let file = Arc::clone(&self.file);
        let attempt = Attempt { file, direction, offset, buffer, start, rider };
        let (result, attempt) = self.drive(attempt).await;
        (result, attempt.buffer)
    }

    /// Makes the call until it is neither interrupted nor cancelled.
    pub(super) async fn drive(&self, mut attempt: Attempt) -> (io::Result<usize>, Attempt) {
        if let Runner::Ring(ring) = self.conductor.runner() {
            loop {
                let result;
                (result, attempt) = ring.submit(attempt).await;
                match &result {
                    // The kernel cancels what a thread that ends had submitted.
                    Err(error) if is_any(error, &[Errno::INTR, Errno::CANCELED]) => (),
                    // It would have to wait, and the ring does not: a thread can.
                    Err(error) if is_any(error, &[Errno::AGAIN]) => break,
                    _ => return (result, attempt),
                }
            }
        }
        self.on_thread(move || attempt.block()).await
    }
}

fn is_aligned(alignment: DirectAlignment, position: u64, bytes: &[u8]) -> bool {
    let offset = u64::from(alignment.offset);
    position.is_multiple_of(offset)
        && (bytes.len() as u64).is_multiple_of(offset)
        && bytes.as_ptr().addr().is_multiple_of(alignment.memory as usize)
}

fn is_any(error: &io::Error, codes: &[Errno]) -> bool {
    codes.iter().any(|code| error.raw_os_error() == Some(code.raw_os_error()))
}
