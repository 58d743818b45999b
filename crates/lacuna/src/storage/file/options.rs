//! How a file is opened.

use crate::Error;
use crate::storage::{Claim, Locking};

/// Whether an object may be changed.
///
/// ```
/// assert_eq!(lacuna::storage::FileAccess::default(), lacuna::storage::FileAccess::ReadOnly);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FileAccess {
    /// Every change fails with [`ErrorKind::ReadOnly`](crate::ErrorKind::ReadOnly).
    #[default]
    ReadOnly,
    /// Everything is allowed.
    ReadWrite,
}

/// Whether bytes go through the host's page cache.
///
/// ```
/// assert_eq!(lacuna::storage::CacheMode::default(), lacuna::storage::CacheMode::Buffered);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheMode {
    /// Through the page cache; what is in it is read without waiting.
    #[default]
    Buffered,
    /// Past it (O_DIRECT). Requests that do not keep to the alignment work, slowly.
    Direct,
    /// Through it, but large aligned writes to a regular file past it, where the host can: for
    /// bulk copies, which spare the copy in memory and leave others' pages in the cache.
    LargeWritesDirect,
}

/// Who makes the calls that may block.
///
/// ```
/// assert_eq!(lacuna::storage::DriverChoice::default(), lacuna::storage::DriverChoice::Auto);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DriverChoice {
    /// io_uring, or threads where the kernel refuses it.
    #[default]
    Auto,
    /// io_uring, reaped by one thread of the process; its refusal fails the opening.
    IoUring,
    /// A small thread pool, shared by the process.
    Threads,
    /// io_uring with a ring of its own that the caller's event loop reaps: see
    /// [`FileStorage::event_fd`](super::FileStorage::event_fd). Its refusal fails the opening.
    External,
}

/// Who makes the calls that may block, after the kernel had its say.
///
/// ```
/// use lacuna::storage::{Driver, FileOptions, FileStorage};
/// let file = tempfile::NamedTempFile::new()?;
/// let storage = FileStorage::open(file.path(), &FileOptions::default())?;
/// if let Driver::Threads { refusal: Some(reason) } = storage.driver() {
///     eprintln!("slower than it could be: {reason}");
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Driver {
    /// The ring of the process.
    IoUring,
    /// A ring of its own, reaped by the caller.
    External,
    /// The thread pool of the process.
    Threads {
        /// Why it is not io_uring, where that was tried first.
        refusal: Option<Error>,
    },
}

/// What to do where the file is not there, or is.
///
/// ```
/// assert_eq!(lacuna::storage::Create::default(), lacuna::storage::Create::Never);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Create {
    /// It must exist.
    #[default]
    Never,
    /// It is made where it does not exist; what exists keeps its content.
    IfMissing,
    /// It must not exist.
    Exclusive,
    /// It is made, or emptied.
    Replace,
}

/// How [`FileStorage::open`](super::FileStorage::open) opens.
///
/// ```
/// use lacuna::storage::{CacheMode, FileAccess, FileOptions};
/// let options = FileOptions { cache: CacheMode::Direct, ..FileOptions::read_write() };
/// assert_eq!(options.access, FileAccess::ReadWrite);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileOptions {
    /// Whether the object may be changed.
    pub access: FileAccess,
    /// Whether bytes go through the page cache.
    pub cache: CacheMode,
    /// Who makes the calls that may block.
    pub driver: DriverChoice,
    /// What to do where the file is not there, or is; needs [`FileAccess::ReadWrite`].
    pub create: Create,
    /// Whether others are kept from what does not go together with the claim.
    pub locking: Locking,
    /// What is held of the file from before it is read (or emptied) on; nothing here stands for
    /// [`Claim::READING`] or [`Claim::WRITING`], by the access.
    pub claim: Option<Claim>,
}

impl FileOptions {
    /// Returns the claim that is meant.
    pub(super) fn effective_claim(&self) -> Claim {
        self.claim.unwrap_or(match self.access {
            FileAccess::ReadOnly => Claim::READING,
            FileAccess::ReadWrite => Claim::WRITING,
        })
    }

    /// Returns the options to read what exists.
    #[must_use]
    pub fn read_only() -> Self {
        Self::default()
    }

    /// Returns the options to read and change what exists.
    #[must_use]
    pub fn read_write() -> Self {
        Self { access: FileAccess::ReadWrite, ..Self::default() }
    }

    /// Returns the options to make a file, or to empty the one that exists.
    #[must_use]
    pub fn replace() -> Self {
        Self { create: Create::Replace, ..Self::read_write() }
    }
}
