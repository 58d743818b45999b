//! The files of a chain on this host.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::opener::{Identity, Opener};
use crate::qcow2::Access;
use crate::storage::{Claim, Create, FileAccess, FileOptions, FileStorage};
use crate::{Error, Result};

/// Opens local files and block devices.
///
/// ```
/// use lacuna::chain::FileOpener;
/// use lacuna::storage::{CacheMode, FileOptions};
/// let opener = FileOpener::new(FileOptions { cache: CacheMode::Direct, ..Default::default() });
/// # let _ = format!("{opener:?}");
/// ```
#[derive(Clone, Debug, Default)]
pub struct FileOpener {
    options: FileOptions,
}

impl FileOpener {
    /// Opens everything with these options, but with the access and the claim a chain asks for,
    /// and never creates.
    #[must_use]
    pub const fn new(options: FileOptions) -> Self {
        Self { options }
    }
}

impl Opener for FileOpener {
    type Storage = FileStorage;

    async fn open(&self, path: &Path, access: Access) -> Result<Self::Storage> {
        let access = match access {
            Access::ReadOnly => FileAccess::ReadOnly,
            Access::ReadWrite => FileAccess::ReadWrite,
        };
        let (claim, create) = (Some(Claim::NONE), Create::Never);
        FileStorage::open(path, &FileOptions { access, claim, create, ..self.options })
    }

    async fn claim(&self, storage: &FileStorage, claim: Claim) -> Result<()> {
        storage.claim(claim)
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        let facts = std::fs::metadata(path)
            .map_err(|error| Error::io(error, format!("Looking for {}", path.display())))?;
        Ok(match facts.file_type().is_block_device() {
            true => Identity::Device(facts.rdev()),
            false => Identity::Inode { device: facts.dev(), number: facts.ino() },
        })
    }
}
