//! A local file or block device.
//!
//! A transfer takes the cheapest way that is open: buffered reads of cached pages happen inline
//! ([`transfer`]), other reads and O_DIRECT go to io_uring or to threads, O_DIRECT requests that
//! are not aligned go through a bounce buffer ([`bounce`]). Everything else that may block runs
//! on a thread.
//!
//! * Always: each change holds a range lock until the kernel is done with it ([`range_lock`]), so
//!   that read-modify-write, cutting the length and asking for unwritten extents can exclude it.
//! * Always: after a failed flush every later one fails: the kernel reports a lost page once.
//! * Never: zero claimed from an answer that a write through this storage could have overtaken.

mod bounce;
mod conductor;
mod conflict;
mod copy;
mod holders;
mod lock;
mod open;
mod options;
mod range_lock;
mod space;
mod status;
#[cfg(test)]
mod tests;
mod transfer;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use conductor::{Conductor, Runner};
pub use conflict::{LockConflict, Obstacle};
pub use copy::HostSource;
pub use holders::{Holder, Holders};
use lock::FileLock;
pub use options::{CacheMode, Create, Driver, DriverChoice, FileAccess, FileOptions};
use range_lock::{LENGTH, Mode, RangeLock};

use super::sys::{Bell, DirectAlignment, Kind, OpenFile, Pool, Task, file_len, uninterrupted};
use super::{Capabilities, Claim, HostExtent, Storage, Transfer, ZeroMode};
use crate::buffer::{Buffer, Hold};
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// A local file or block device as storage.
///
/// ```
/// use lacuna::buffer::Buffer;
/// use lacuna::storage::{FileOptions, FileStorage, Storage};
/// use lacuna::units::HostOffset;
///
/// let folder = tempfile::tempdir()?;
/// let storage = FileStorage::open(folder.path().join("disk.img"), &FileOptions::replace())?;
/// pollster::block_on(async {
///     storage.write_at(HostOffset(4096), Buffer::from(&b"lacuna"[..])).await.0?;
///     storage.flush().await?;
///     assert_eq!(storage.len().await?, 4102);
///     Ok::<_, lacuna::Error>(())
/// })?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FileStorage {
    inner: Arc<Inner>,
}

/// Things the host refused once and is not asked again.
#[derive(Debug, Default)]
struct Refusals {
    nowait: AtomicBool,
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    extent_map: AtomicBool,
    past_cache: AtomicBool,
    copy_range: AtomicBool,
}

/// The file once more, open with O_DIRECT for writing.
#[derive(Debug)]
struct PastCache {
    file: Arc<OpenFile>,
    alignment: DirectAlignment,
}

#[derive(Debug)]
struct Inner {
    file: Arc<OpenFile>,
    lock: FileLock,
    path: PathBuf,
    kind: Kind,
    access: FileAccess,
    /// Present with O_DIRECT.
    direct: Option<DirectAlignment>,
    /// Present where large writes go past the page cache.
    past_cache: Option<PastCache>,
    conductor: Conductor,
    pool: Arc<Pool>,
    /// Present with a foreign event loop.
    bell: Option<Bell>,
    capabilities: Capabilities,
    locks: Arc<RangeLock>,
    refusals: Refusals,
    /// The first flush that failed.
    lost: OnceLock<Error>,
}

impl FileStorage {
    /// Opens the file or block device at `path`. Blocks for as long as the host's open does.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] for anything that is neither a regular
    /// file nor a block device, and where O_DIRECT, the driver or the locks asked for cannot be
    /// had; [`ErrorKind::Busy`] where somebody holds the file who does not get along with
    /// [`FileOptions::claim`], with a [`LockConflict`]; else what the host said.
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        let (path, makers) = (path.as_ref(), open::Makers::default());
        let file = open::open_file(path, options)?;
        open::storage(file, path.to_owned(), options, makers)
    }

    /// Takes over an open file, whose access the options must not exceed; `create` is ignored.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn from_file(file: std::fs::File, options: &FileOptions) -> Result<Self> {
        let path = PathBuf::from("the file given");
        let options = FileOptions { create: Create::Never, ..*options };
        open::storage(std::os::fd::OwnedFd::from(file), path, &options, open::Makers::default())
    }

    /// Changes what is held of the file and what others may do with it; returns when that is so.
    ///
    /// What is new is taken before what is not needed any more is given up, so that nobody gets in
    /// between. The claim lasts until the storage is dropped and the last request in flight has
    /// ended. It is between programs (and between storages): what this storage itself can do is
    /// decided by [`FileOptions::access`]. With [`Locking::Off`](super::Locking::Off), and where
    /// the host has no such locks, nothing is locked and every claim succeeds.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where somebody else is in the way, with a [`LockConflict`];
    /// [`ErrorKind::Unsupported`] where [`Locking::On`](super::Locking::On) was asked for in vain.
    /// The claim is unchanged then.
    ///
    /// ```
    /// use lacuna::ErrorKind;
    /// use lacuna::storage::{Claim, FileOptions, FileStorage};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("disk.img");
    /// let writer = FileStorage::open(&path, &FileOptions::replace())?;
    /// writer.claim(Claim::WRITING)?;
    /// let reader = FileStorage::open(&path, &FileOptions::read_only());
    /// assert_eq!(reader.err().map(|error| error.kind()), Some(ErrorKind::Busy));
    ///
    /// writer.claim(Claim::READING)?;
    /// FileStorage::open(&path, &FileOptions::read_only())?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim(&self, claim: Claim) -> Result<()> {
        self.inner.lock.change(&self.inner.file, &self.inner.path, claim)
    }

    /// Returns what was claimed last, whether or not the host could lock it.
    #[must_use]
    pub fn claimed(&self) -> Claim {
        self.inner.lock.claim()
    }

    /// Returns who makes the calls that may block, and why not somebody better. With
    /// [`DriverChoice::Auto`] that is decided here or at the first such call, whichever is earlier.
    #[must_use]
    pub fn driver(&self) -> &Driver {
        self.inner.conductor.driver()
    }

    /// Returns the path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Says whether the host's disk below is known to have turning parts, so that requests near
    /// each other are cheaper. False where the host does not say.
    #[must_use]
    pub fn is_rotational(&self) -> bool {
        super::sys::is_rotational(self.as_fd())
    }

    /// Returns the eventfd that becomes readable when there is something to
    /// [`complete`](Self::complete); only with [`DriverChoice::External`].
    ///
    /// ```
    /// use lacuna::storage::{DriverChoice, FileOptions, FileStorage};
    /// let file = tempfile::NamedTempFile::new()?;
    /// let options = FileOptions { driver: DriverChoice::External, ..FileOptions::read_only() };
    /// if let Ok(storage) = FileStorage::open(file.path(), &options) {
    ///     let event_fd = storage.event_fd().expect("the driver is External");
    ///     // The caller's loop polls `event_fd` for reading, and then:
    ///     storage.complete()?;
    ///     // ... and polls the futures whose wakers were called.
    /// #   let _ = event_fd;
    /// }
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.bell.as_ref().map(|bell| bell.0.as_fd())
    }

    /// Takes up what the kernel has finished and wakes the futures that wait for it; returns how
    /// many transfers that were. Never blocks. Of use with [`DriverChoice::External`] only.
    ///
    /// # Errors
    /// What reading the eventfd gives.
    pub fn complete(&self) -> Result<usize> {
        let (Some(bell), Runner::Ring(ring)) = (&self.inner.bell, self.inner.conductor.runner())
        else {
            return Ok(0);
        };
        // The counter first: what completes after this rings again.
        match uninterrupted(|| rustix::io::read(&bell.0, &mut [0; 8])) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                Err(Error::io(error, "Reading the eventfd"))
            }
            _ => Ok(ring.reap()),
        }
    }
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
}

impl Inner {
    fn error(&self, source: std::io::Error, doing: &str, offset: u64, len: u64) -> Error {
        let doing = format!("{doing} {len} bytes at {offset:#x} of {}", self.path.display());
        Error::io(source, doing).at(HostOffset(offset))
    }

    fn plain_error(&self, source: std::io::Error, doing: &str) -> Error {
        Error::io(source, format!("{doing} {}", self.path.display()))
    }

    fn require_write_access(&self) -> Result<()> {
        match self.access {
            FileAccess::ReadWrite => Ok(()),
            FileAccess::ReadOnly => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{} was opened for reading only", self.path.display()),
            )),
        }
    }

    /// Returns the end of the range, which must be an offset that files can have.
    fn end_of(&self, offset: u64, len: u64) -> Result<u64> {
        match offset.checked_add(len) {
            Some(end) if i64::try_from(end).is_ok() => Ok(end),
            _ => Err(Error::invalid(format!(
                "{len} bytes at {offset:#x} of {} pass the largest file offset",
                self.path.display()
            ))),
        }
    }

    /// Runs a call that may block on a thread.
    fn on_thread<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> Task<T> {
        self.pool.run(self.bell.clone(), call)
    }

    fn current_len(&self) -> Result<u64> {
        file_len(self.file.as_fd(), self.kind)
            .map_err(|error| self.plain_error(error, "Asking for the length of"))
    }

    async fn len(&self) -> Result<u64> {
        // Waits for a tail that is longer for a moment than it will be, and for cuts.
        let _steady = self.locks.lock(LENGTH - 1..LENGTH, Mode::Shared).await;
        self.current_len()
    }

    async fn flush(self: &Arc<Self>) -> Result<()> {
        let inner = Arc::clone(self);
        self.on_thread(move || inner.flush_now()).await
    }

    /// Flushes on this thread, and remembers a failure even if nobody waits for it any more: the
    /// kernel would tell nobody a second time.
    fn flush_now(&self) -> Result<()> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        let result = uninterrupted(|| rustix::fs::fdatasync(&self.file));
        self.settle_flush(result)
    }

    fn settle_flush(&self, result: std::io::Result<()>) -> Result<()> {
        if let Err(error) = result {
            let error = self.plain_error(error, "Flushing");
            drop(self.lost.set(error));
        }
        // Another flush may have failed meanwhile: what it lost may be ours.
        self.lost.get().map_or(Ok(()), |error| Err(error.clone()))
    }
}

/// A refusal for good, as opposed to a failure.
fn is_refusal(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY]
        .iter()
        .any(|code| error.raw_os_error() == Some(code.raw_os_error()))
}

fn remembered(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

fn remember(flag: &AtomicBool) {
    flag.store(true, Ordering::Relaxed);
}

impl Storage for FileStorage {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.inner.read(offset.0, buffer).await
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.inner.write(offset.0, buffer).await
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.inner.write_zeroes(range, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.inner.punch_hole(range, hold).await
    }

    fn host_source(&self, range: HostRange) -> Option<HostSource> {
        Some(self.source(range))
    }

    async fn copy_at(&self, source: HostSource, to: HostOffset, hold: Hold) -> Result<()> {
        self.inner.copy(source, to, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.inner.allocate(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn len(&self) -> Result<u64> {
        self.inner.len().await
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        self.inner.set_len(len, hold).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.inner.status(range).await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities
    }
}
