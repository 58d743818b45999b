//! Bytes that the host copies from file to file: shared blocks where its file system can (reflink),
//! else a copy that does not come through here.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::{FileStorage, Inner, is_refusal, remember, remembered};
use crate::buffer::Hold;
use crate::storage::sys::{OpenFile, uninterrupted};
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// A range of a file that the host can copy from.
///
/// It keeps the file open.
///
/// ```
/// use lacuna::storage::{FileOptions, FileStorage, Storage};
/// use lacuna::units::{HostOffset, HostRange};
/// let file = tempfile::NamedTempFile::new()?;
/// let storage = FileStorage::open(file.path(), &FileOptions::read_only())?;
/// let source = storage.host_source(HostRange::new(HostOffset(0), 4096)).unwrap();
/// assert_eq!(source.part(512, 512).range().start, HostOffset(512));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct HostSource {
    file: Arc<OpenFile>,
    range: HostRange,
}

impl HostSource {
    /// Returns the range in its file.
    #[must_use]
    pub const fn range(&self) -> HostRange {
        self.range
    }

    /// Returns `len` bytes of it from `from` on, as far as it reaches.
    #[must_use]
    pub fn part(&self, from: u64, len: u64) -> Self {
        let from = from.min(self.range.len);
        let range = HostRange::new(self.range.start + from, len.min(self.range.len - from));
        Self { file: Arc::clone(&self.file), range }
    }
}

impl FileStorage {
    pub(super) fn source(&self, range: HostRange) -> HostSource {
        HostSource { file: Arc::clone(&self.inner.file), range }
    }
}

impl Inner {
    /// Has the host copy `source` to `to`.
    ///
    /// # Errors
    /// `Unsupported` where the host refuses, or the source ends early; part of the range may have
    /// been written then.
    pub(super) async fn copy(
        self: &Arc<Self>,
        source: HostSource,
        to: HostOffset,
        hold: Hold,
    ) -> Result<()> {
        self.require_write_access()?;
        let len = source.range.len;
        let end = self.end_of(to.0, len)?;
        self.require_room(end)?;
        if remembered(&self.refusals.copy_range) {
            return Err(self.cannot_copy());
        }
        let lock = self.lock_to_extend(HostRange::new(to, len)).await?;
        let inner = Arc::clone(self);
        let call = move || {
            let result = inner.copy_now(&source, to);
            drop((lock, hold));
            result
        };
        match self.on_thread(call).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.cannot_copy()),
            Err(error) if is_refusal(&error) || crosses_devices(&error) => {
                remember(&self.refusals.copy_range);
                Err(self.cannot_copy())
            }
            Err(error) => Err(self.error(error, "Copying", to.0, len)),
        }
    }

    /// Says whether all of it was there to be copied.
    fn copy_now(&self, source: &HostSource, to: HostOffset) -> io::Result<bool> {
        let (mut from, mut to, end) = (source.range.start.0, to.0, source.range.end().0);
        while from < end {
            let rest = usize::try_from(end - from).unwrap_or(usize::MAX);
            let copied = uninterrupted(|| {
                let (source, target) = (source.file.as_fd(), self.file.as_fd());
                let (from, to) = (&mut from.clone(), &mut to.clone());
                rustix::fs::copy_file_range(source, Some(from), target, Some(to), rest)
            })?;
            if copied == 0 {
                return Ok(false);
            }
            from += copied as u64;
            to += copied as u64;
        }
        Ok(true)
    }

    fn cannot_copy(&self) -> Error {
        Error::unsupported(format!("The host cannot copy to {}", self.path.display()))
    }
}

/// Refusals that are about this pair of files: another file system, or the same file.
fn crosses_devices(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::XDEV, Errno::INVAL, Errno::BADF, Errno::TXTBSY]
        .iter()
        .any(|code| error.raw_os_error() == Some(code.raw_os_error()))
}
