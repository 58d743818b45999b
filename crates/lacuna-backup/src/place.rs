//! Where the files of a backup lie: in a folder of the host, or wherever else somebody has files by
//! name.
//!
//! * Always: what a file holds is durable after a flush of it; which file has a name, after
//!   [`Place::sync_folder`]. In between a cut may leave the one and not the other.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use lacuna::chain::{FileOpener, Opener};
use lacuna::storage::{Claim, Create, FileOptions, FileStorage, Locking, Storage};
use lacuna::{Error, Result};

use crate::durable::failed;

/// What an opened file is for.
///
/// ```
/// assert_ne!(lacuna_backup::OpenAs::New, lacuna_backup::OpenAs::Unchanging);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenAs {
    /// An empty one, whatever was there, to be written once, by nobody else.
    New,
    /// An empty one, whatever was there, that will be an image.
    NewImage,
    /// One that is there, to be changed.
    Changing,
    /// One that is there, that nobody changes.
    Unchanging,
}

/// Files by name. [`Host`] is the one that there is without a choice.
///
/// Names are paths: a folder, and the name of a file in it. Calls that are no futures are done when they
/// return, though not yet durable.
pub trait Place: Clone + Send + Sync + 'static {
    /// An opened file.
    type Storage: Storage;
    /// Opens images with what they stand on.
    type Opener: Opener<Storage = Self::Storage>;
    /// Keeps others out while it lives.
    type Lock: Send + Sync;

    /// Makes a folder, durably; nothing where it is there.
    ///
    /// # Errors
    /// What the place gives.
    fn make_folder(&self, path: &Path) -> Result<()>;

    /// Lists the names of the files in a folder, without it; those that are no text are left out.
    ///
    /// # Errors
    /// What the place gives.
    fn names(&self, folder: &Path) -> Result<Vec<String>>;

    /// Says whether there is such a file.
    fn has(&self, path: &Path) -> bool;

    /// Reads a file whose length is at most so many bytes.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a longer one; else what the place gives.
    fn read(&self, path: &Path, most_bytes: u64) -> Result<Vec<u8>>;

    /// Opens a file.
    ///
    /// # Errors
    /// `NotFound`; else what the place gives.
    fn open(&self, path: &Path, how: OpenAs) -> Result<Self::Storage>;

    /// Returns what opens images, those of one folder by their names.
    fn opener(&self) -> Self::Opener;

    /// Gives a file another name; one of that name is gone.
    ///
    /// # Errors
    /// What the place gives.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file, where it is there.
    ///
    /// # Errors
    /// What the place gives.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Makes durable which files a folder has, by which names.
    ///
    /// # Errors
    /// What the place gives.
    fn sync_folder(&self, folder: &Path) -> Result<()>;

    /// Keeps others from locking a file until what is returned is dropped; nothing where somebody else
    /// has locked it.
    ///
    /// # Errors
    /// What the place gives.
    fn lock(&self, path: &Path) -> Result<Option<Self::Lock>>;
}

/// The files of the host.
///
/// ```
/// use lacuna_backup::{Host, Place};
/// let place = tempfile::tempdir().unwrap();
/// assert!(Host.names(place.path()).unwrap().is_empty());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host;

impl Place for Host {
    type Storage = FileStorage;
    type Opener = FileOpener;
    type Lock = File;

    fn make_folder(&self, path: &Path) -> Result<()> {
        match std::fs::create_dir(path) {
            Ok(()) => self.sync_folder(&folder_of(path)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed(error, "Making the folder", path)),
        }
    }

    fn names(&self, folder: &Path) -> Result<Vec<String>> {
        let failed = |error| failed(error, "Reading", folder);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    fn has(&self, path: &Path) -> bool {
        path.exists()
    }

    fn read(&self, path: &Path, most_bytes: u64) -> Result<Vec<u8>> {
        let failed = |error| failed(error, "Reading", path);
        let file = File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(most_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
        match bytes.len() as u64 <= most_bytes {
            true => Ok(bytes),
            false => {
                let text = format!("{} is longer than {most_bytes} bytes", path.display());
                Err(Error::corrupt(text))
            }
        }
    }

    fn open(&self, path: &Path, how: OpenAs) -> Result<FileStorage> {
        let (claim, locking) = (Some(Claim::NONE), Locking::Off);
        let options = match how {
            OpenAs::New => {
                let create = Create::Replace;
                FileOptions { create, claim, locking, ..FileOptions::read_write() }
            }
            OpenAs::NewImage => FileOptions::replace(),
            OpenAs::Changing => FileOptions::read_write(),
            OpenAs::Unchanging => FileOptions { locking, ..FileOptions::read_only() },
        };
        FileStorage::open(path, &options)
    }

    fn opener(&self) -> FileOpener {
        FileOpener::new(FileOptions::default())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(|error| failed(error, "Naming", to))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failed(error, "Removing", path))
            }
            _ => Ok(()),
        }
    }

    fn sync_folder(&self, folder: &Path) -> Result<()> {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| failed(error, "Flushing", folder))
    }

    fn lock(&self, path: &Path) -> Result<Option<File>> {
        let file = File::open(path).map_err(|error| failed(error, "Reading", path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(failed(error, "Locking", path)),
        }
    }
}

/// Returns the folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or_else(|| Path::new(".")).to_owned()
}
