//! Zeroing, holes, reserving, and the length.
//!
//! A block device zeroes whole sectors only; the edges are written.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::range_lock::{LENGTH, Mode};
use super::{Inner, is_refusal, remember, remembered};
use crate::buffer::{Buffer, Hold};
use crate::storage::ZeroMode;
use crate::storage::sys::{self, Kind, uninterrupted};
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Zeros written at once where the host cannot zero.
const PIECE_BYTES: u64 = 1 << 20;

/// A way to have the host zero a range.
#[derive(Clone, Copy)]
enum Means {
    /// The length stays.
    PunchHole,
    /// A shorter file is extended.
    PunchAndExtend,
    /// Space stays or becomes reserved; a shorter file is extended.
    ZeroRange,
}

impl Inner {
    pub(super) async fn write_zeroes(
        self: &Arc<Self>,
        range: HostRange,
        mode: ZeroMode,
        mut hold: Hold,
    ) -> Result<()> {
        self.require_write_access()?;
        self.require_room(self.end_of(range.start.0, range.len)?)?;
        let (middle, edges) = self.native_part(range);
        let means: &[Means] = match mode {
            ZeroMode::MayUnmap => &[Means::PunchAndExtend, Means::ZeroRange],
            ZeroMode::Allocate => &[Means::ZeroRange],
        };
        let done;
        (done, hold) = self.zero_natively(middle, means, hold).await?;
        if !done {
            hold = self.write_zero_bytes(middle, hold).await?;
        }
        for edge in edges {
            hold = self.write_zero_bytes(edge, hold).await?;
        }
        drop(hold);
        Ok(())
    }

    pub(super) async fn punch_hole(self: &Arc<Self>, range: HostRange, hold: Hold) -> Result<()> {
        self.require_write_access()?;
        self.end_of(range.start.0, range.len)?;
        let (middle, edges) = self.native_part(self.within_device(range)?);
        let (done, mut hold) = self.zero_natively(middle, &[Means::PunchHole], hold).await?;
        if !done {
            return Err(Error::unsupported(format!(
                "The host cannot punch holes into {}",
                self.path.display()
            )));
        }
        for edge in edges {
            hold = self.write_zero_bytes(edge, hold).await?;
        }
        drop(hold);
        Ok(())
    }

    /// Cuts a range off at the end of a block device, whose length no request may pass.
    fn within_device(&self, range: HostRange) -> Result<HostRange> {
        if self.kind == Kind::Regular {
            return Ok(range);
        }
        let len = self.current_len()?.saturating_sub(range.start.0).min(range.len);
        Ok(HostRange::new(range.start, len))
    }

    /// Splits off what the host cannot zero by itself.
    fn native_part(&self, range: HostRange) -> (HostRange, [HostRange; 2]) {
        let sector = match self.kind {
            Kind::Regular => 1,
            _ => rustix::fs::ioctl_blksszget(&self.file).map_or(4096, u64::from),
        };
        split(range, sector)
    }

    /// Has the host zero the range by the first means it does not refuse; says whether one did.
    async fn zero_natively(
        self: &Arc<Self>,
        range: HostRange,
        means: &[Means],
        mut hold: Hold,
    ) -> Result<(bool, Hold)> {
        if range.is_empty() {
            return Ok((true, hold));
        }
        for &means in means {
            if remembered(self.refusal(means)) {
                continue;
            }
            let result;
            (result, hold) = self.zero_by(means, range, hold).await?;
            match result {
                Ok(()) => return Ok((true, hold)),
                Err(error) if is_refusal(&error) => remember(self.refusal(means)),
                Err(error) => {
                    return Err(self.error(error, "Zeroing", range.start.0, range.len));
                }
            }
        }
        Ok((false, hold))
    }

    const fn refusal(&self, means: Means) -> &AtomicBool {
        match means {
            Means::PunchHole | Means::PunchAndExtend => &self.refusals.punch_hole,
            Means::ZeroRange => &self.refusals.zero_range,
        }
    }

    async fn zero_by(
        self: &Arc<Self>,
        means: Means,
        range: HostRange,
        hold: Hold,
    ) -> Result<(io::Result<()>, Hold)> {
        let lock = match means {
            Means::PunchAndExtend => self.lock_to_extend(range).await?,
            _ => self.lock_shared(range).await,
        };
        let inner = Arc::clone(self);
        let call = move || {
            let result = inner.zero_now(means, range.start.0, range.end().0);
            drop(lock);
            (result, hold)
        };
        Ok(self.on_thread(call).await)
    }

    fn zero_now(&self, means: Means, start: u64, end: u64) -> io::Result<()> {
        let file = self.file.as_fd();
        match means {
            Means::PunchHole => sys::punch_hole(file, start, end - start),
            Means::ZeroRange => sys::zero_range(file, start, end - start),
            Means::PunchAndExtend => {
                let len = sys::file_len(file, self.kind)?;
                if start < len {
                    sys::punch_hole(file, start, end.min(len) - start)?;
                }
                if end > len && self.kind == Kind::Regular {
                    uninterrupted(|| rustix::fs::ftruncate(file, end))?;
                }
                Ok(())
            }
        }
    }

    async fn lock_shared(&self, range: HostRange) -> Hold {
        self.locks.lock(range.start.0..range.end().0, Mode::Shared).await
    }

    /// Locks the range, and the length if it will grow: an extension that another one overtakes
    /// would cut it off again.
    pub(super) async fn lock_to_extend(&self, range: HostRange) -> Result<Hold> {
        loop {
            if range.end().0 > self.current_len()? {
                return Ok(self.locks.lock(range.start.0..LENGTH, Mode::Exclusive).await);
            }
            let lock = self.lock_shared(range).await;
            // The file may have been cut while we waited.
            if range.end().0 <= self.current_len()? {
                return Ok(lock);
            }
        }
    }

    async fn write_zero_bytes(&self, range: HostRange, mut hold: Hold) -> Result<Hold> {
        let (mut at, end) = (range.start.0, range.end().0);
        while at < end {
            let piece = (end - at).min(PIECE_BYTES);
            let mut zeros = Buffer::zeroed(piece as usize);
            zeros.set_hold(hold);
            let (result, mut zeros) = self.write(at, zeros).await;
            hold = zeros.take_hold();
            result?;
            at += piece;
        }
        Ok(hold)
    }

    pub(super) async fn allocate(self: &Arc<Self>, range: HostRange) -> Result<()> {
        self.require_write_access()?;
        let (start, end) = (range.start.0, self.end_of(range.start.0, range.len)?);
        if range.is_empty() {
            return Ok(());
        }
        self.require_room(end)?;
        if self.kind == Kind::BlockDevice {
            // All of it is reserved.
            return Ok(());
        }
        let lock = self.lock_shared(range).await;
        let file = Arc::clone(&self.file);
        let call = move || {
            let result = sys::allocate(file.as_fd(), start, end - start);
            drop(lock);
            result
        };
        let result = self.on_thread(call).await;
        result.map_err(|error| self.error(error, "Reserving", start, range.len))
    }

    /// Refuses what passes the end of a block device.
    pub(super) fn require_room(&self, end: u64) -> Result<()> {
        if self.kind == Kind::Regular {
            return Ok(());
        }
        let len = self.current_len()?;
        if end <= len {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            format!("{} has {len} bytes and cannot grow to {end}", self.path.display()),
        ))
    }

    pub(super) async fn set_len(self: &Arc<Self>, len: u64, hold: Hold) -> Result<()> {
        self.require_write_access()?;
        self.end_of(len, 0)?;
        if self.kind == Kind::BlockDevice {
            return match self.current_len()? {
                current if current == len => Ok(()),
                current => Err(Error::unsupported(format!(
                    "{} is a block device of {current} bytes; its length cannot be set to {len}",
                    self.path.display()
                ))),
            };
        }
        let lock = self.locks.lock(0..LENGTH, Mode::Exclusive).await;
        let file = Arc::clone(&self.file);
        let call = move || {
            let result = uninterrupted(|| rustix::fs::ftruncate(&file, len));
            drop((lock, hold));
            result
        };
        let result = self.on_thread(call).await;
        result.map_err(|error| self.plain_error(error, &format!("Setting to {len} bytes")))
    }
}

/// Splits `range` into its whole sectors and the edges before and behind them.
fn split(range: HostRange, sector: u64) -> (HostRange, [HostRange; 2]) {
    let (start, end) = (range.start.0, range.end().0);
    let middle_start = start.next_multiple_of(sector).min(end);
    let middle_end = (end - end % sector).max(middle_start);
    let part = |from, to| HostRange::new(HostOffset(from), to - from);
    let edges = [part(start, middle_start), part(middle_end, end)];
    (part(middle_start, middle_end), edges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_range_are_its_sectors_and_its_edges() {
        let parts = |start, len| {
            let (middle, edges) = split(HostRange::new(HostOffset(start), len), 512);
            [edges[0], middle, edges[1]].map(|part| (part.start.0, part.len))
        };
        assert_eq!(parts(0, 1024), [(0, 0), (0, 1024), (1024, 0)]);
        assert_eq!(parts(10, 2000), [(10, 502), (512, 1024), (1536, 474)]);
        assert_eq!(parts(10, 20), [(10, 20), (30, 0), (30, 0)]);
        assert_eq!(parts(500, 24), [(500, 12), (512, 0), (512, 12)]);
    }
}
