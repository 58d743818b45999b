//! What the host knows about a range.
//!
//! The extent map proposes, SEEK_DATA confirms: it looks into the page cache, the map does not.
//! Only where SEEK_DATA finds cached pages over an unwritten extent (they may be dirty, or come
//! from a mere read) the map decides, after writeback, with our own writes kept out.
//!
//! * Never: zero from the map without writeback (trap D.1-67).
//! * Never: an answer kept; another process may write at any time.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::range_lock::Mode;
use super::{Inner, is_refusal, remember, remembered};
use crate::Result;
use crate::storage::sys::{Kind, Mapping, Run, Writeback, file_len, first_run, uninterrupted};
use crate::storage::{HostExtent, HostStatus};
use crate::units::HostRange;

/// The first answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Glance {
    Known(HostExtent),
    /// Unwritten on the disk, but with cached pages among them: so many bytes must be written back to
    /// tell, which is nothing where they come from reads.
    Doubtful(u64),
}

impl Inner {
    pub(super) async fn status(self: &Arc<Self>, range: HostRange) -> Result<HostExtent> {
        let (start, len) = (range.start.0, range.len);
        let failed = |error| self.error(error, "Asking for the status of", start, len);
        match self.glance(start, len).map_err(failed)? {
            Glance::Known(extent) => Ok(extent),
            Glance::Doubtful(len) => Ok(self.status_on_disk(start, len).await),
        }
    }

    fn glance(&self, start: u64, len: u64) -> io::Result<Glance> {
        let known = |status, len| Ok(Glance::Known(HostExtent { len, status }));
        let end_of_file = file_len(self.file.as_fd(), self.kind)?;
        if start >= end_of_file {
            return known(HostStatus::Hole, len);
        }
        let len = len.min(end_of_file - start);
        if self.kind == Kind::BlockDevice {
            return known(HostStatus::Data, len);
        }
        match self.map(start, len) {
            None => Ok(Glance::Known(self.seek_status(start, len))),
            Some(Run { mapping: Mapping::Written, len }) => known(HostStatus::Data, len),
            Some(Run { mapping: Mapping::Gap, len }) => {
                Ok(Glance::Known(self.seek_status(start, len)))
            }
            // Where the cached pages end is not asked: that looks at each of them.
            Some(Run { mapping: Mapping::Unwritten, len }) => match self.data_from(start) {
                Some(data) if data - start >= len => known(HostStatus::Unwritten, len),
                _ => Ok(Glance::Doubtful(len)),
            },
        }
    }

    /// Asks the map without writeback; nothing where the host has none, or fails to read it.
    fn map(&self, start: u64, len: u64) -> Option<Run> {
        if remembered(&self.refusals.extent_map) {
            return None;
        }
        let run = first_run(self.file.as_fd(), start, len, Writeback::Skip);
        if run.as_ref().is_err_and(is_refusal) {
            remember(&self.refusals.extent_map);
        }
        run.ok()
    }

    /// Returns where data begins at or behind `start`, the largest offset where there is none;
    /// nothing where the host cannot tell.
    fn data_from(&self, start: u64) -> Option<u64> {
        match uninterrupted(|| rustix::fs::seek(&self.file, SeekFrom::Data(start))) {
            Ok(data) => Some(data.max(start)),
            // Nothing but a hole up to the end of the file.
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
                Some(u64::MAX)
            }
            Err(_) => None,
        }
    }

    /// Says how far there is a hole from `start` on, or how far there is data.
    fn seek_status(&self, start: u64, len: u64) -> HostExtent {
        // A host that cannot tell has data everywhere.
        let Some(data) = self.data_from(start) else {
            return HostExtent { len, status: HostStatus::Data };
        };
        if data > start {
            return HostExtent { len: len.min(data - start), status: HostStatus::Hole };
        }
        let hole = uninterrupted(|| rustix::fs::seek(&self.file, SeekFrom::Hole(start)));
        let run = hole.ok().and_then(|hole| hole.checked_sub(start)).filter(|&run| run > 0);
        HostExtent { len: run.map_or(len, |run| run.min(len)), status: HostStatus::Data }
    }

    /// Asks the map after writeback, while no write of ours is under way in the range.
    async fn status_on_disk(self: &Arc<Self>, start: u64, len: u64) -> HostExtent {
        let lock = self.locks.lock(start..start + len, Mode::Exclusive).await;
        let inner = Arc::clone(self);
        let call = move || {
            let run = first_run(inner.file.as_fd(), start, len, Writeback::First);
            drop(lock);
            match run {
                Ok(Run { mapping: Mapping::Unwritten, len }) => {
                    HostExtent { len, status: HostStatus::Unwritten }
                }
                Ok(Run { mapping: Mapping::Written | Mapping::Gap, len }) => {
                    HostExtent { len, status: HostStatus::Data }
                }
                // Data is never a wrong answer; what ails the file shows at the next flush.
                Err(_) => HostExtent { len, status: HostStatus::Data },
            }
        };
        self.on_thread(call).await
    }
}
