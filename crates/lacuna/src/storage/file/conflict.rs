//! Somebody else has the file: what is in the way, and the way to ask who that is.

use std::fmt;
use std::path::{Path, PathBuf};

use super::holders::{FileName, Holders, look_for};
use super::lock::byte_of;
use crate::storage::Permissions;
use crate::storage::sys::OpenFile;
use crate::{Error, ErrorKind};

/// Why a claim was refused: somebody else's locks on the file.
///
/// ```
/// use lacuna::storage::{FileOptions, FileStorage, LockConflict};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("disk.img");
/// let writer = FileStorage::open(&path, &FileOptions::replace())?;
/// let error = FileStorage::open(&path, &FileOptions::read_write()).unwrap_err();
/// let conflict = LockConflict::of(&error).expect("the file is busy");
/// for holder in conflict.holders().found {
///     println!("{} (pid {})", holder.command, holder.pid);
/// #   assert_eq!(holder.pid, std::process::id());
/// }
/// # drop(writer);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LockConflict {
    path: PathBuf,
    name: FileName,
    obstacle: Obstacle,
}

/// What is in the way of a claim.
///
/// ```
/// use lacuna::storage::{Obstacle, Permissions};
/// assert_ne!(Obstacle::Denied(Permissions::WRITE), Obstacle::Held(Permissions::WRITE));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Somebody has this byte of the file for himself; QEMU's programs never do that.
    Byte(u16),
    /// Somebody denies others this permission, which was to be held.
    Denied(Permissions),
    /// Somebody holds this permission, which was to be denied to others.
    Held(Permissions),
}

impl LockConflict {
    /// Remembers what is known of the file, of which at least one byte was tried to be locked.
    pub(super) fn new(file: &OpenFile, path: &Path, obstacle: Obstacle) -> Self {
        Self { path: path.to_owned(), name: FileName::of(file), obstacle }
    }

    pub(super) fn into_error(self) -> Error {
        Error::new(ErrorKind::Busy, self.to_string()).with_detail(self)
    }

    /// Returns the conflict that an error of kind [`ErrorKind::Busy`] is about.
    #[must_use]
    pub fn of(error: &Error) -> Option<&Self> {
        error.detail()
    }

    /// Returns the path by which the file was to be used.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what is in the way.
    #[must_use]
    pub const fn obstacle(&self) -> Obstacle {
        self.obstacle
    }

    /// Looks through the processes of this host for those that are in the way now.
    ///
    /// Reads what /proc says of every process, so it costs some milliseconds. Whoever has gone
    /// meanwhile is not found, nor is a process on another host, in another container, or of
    /// somebody whose processes may not be looked into.
    #[must_use]
    pub fn holders(&self) -> Holders {
        look_for(&self.name, byte_of(self.obstacle))
    }
}

impl fmt::Display for LockConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.obstacle {
            Obstacle::Byte(byte) => write!(f, "{path} is in use: its byte {byte} is locked"),
            Obstacle::Denied(one) => {
                write!(f, "{path} is in use by somebody who does not share {one}")
            }
            Obstacle::Held(one) => write!(f, "{path} is in use by somebody who holds {one}"),
        }
    }
}
