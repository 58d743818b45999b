//! How a path becomes a storage: whatever the caller brings.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::qcow2::Access;
use crate::storage::{Claim, MemoryStorage, Storage};
use crate::{Error, ErrorKind, Result};

/// What tells whether two paths lead to the same object.
///
/// ```
/// use lacuna::chain::Identity;
/// assert_ne!(Identity::Inode { device: 1, number: 2 }, Identity::Inode { device: 2, number: 2 });
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A file: its file system and its number there.
    Inode {
        /// The device the file system is on.
        device: u64,
        /// The number of the file.
        number: u64,
    },
    /// A block device, whatever node leads to it.
    Device(u64),
    /// An object whose path is its only identity, in canonical form.
    Path(PathBuf),
}

/// Opens what a chain consists of.
///
/// ```
/// use std::path::Path;
/// use lacuna::chain::{MemoryOpener, Opener};
/// use lacuna::qcow2::Access;
/// use lacuna::storage::{MemoryStorage, Storage};
///
/// let opener = MemoryOpener::default().with("base", MemoryStorage::from(&b"abc"[..]));
/// pollster::block_on(async {
///     let storage = opener.open(Path::new("base"), Access::ReadOnly).await?;
///     assert_eq!(storage.len().await?, 3);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub trait Opener: Send + Sync {
    /// What it opens.
    type Storage: Storage;

    /// Opens the object at `path`, which exists; never creates one. Nothing is claimed yet.
    fn open(
        &self,
        path: &Path,
        access: Access,
    ) -> impl Future<Output = Result<Self::Storage>> + Send;

    /// Claims an object against others who use it, before more of it is read than tells its format;
    /// does nothing where nobody else can.
    ///
    /// Whatever comes back is given to the caller: [`ErrorKind::Busy`] where somebody is in the way.
    fn claim(
        &self,
        storage: &Self::Storage,
        claim: Claim,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Says whether a name that an image has, or a path that this opener was given, leads to
    /// something that is elsewhere, by the word in front of its colon. All else is a local file.
    ///
    /// Such a name is followed as it is, where the caller allows that; it has no folder from which
    /// others could start, and the format of what is there is never guessed.
    fn is_remote(&self, _: &[u8]) -> bool {
        false
    }

    /// Says what `path` leads to, so that a chain that bites its tail is noticed.
    fn identify(&self, path: &Path) -> impl Future<Output = Result<Identity>> + Send;
}

/// Storages in memory by name: for tests, and for images that came over a wire.
///
/// See [`Opener`] for an example.
#[derive(Clone, Debug, Default)]
pub struct MemoryOpener(BTreeMap<PathBuf, Arc<MemoryStorage>>);

impl MemoryOpener {
    /// Adds `storage` under the name `path`.
    #[must_use]
    pub fn with(
        mut self,
        path: impl Into<PathBuf>,
        storage: impl Into<Arc<MemoryStorage>>,
    ) -> Self {
        self.0.insert(path.into(), storage.into());
        self
    }
}

impl Opener for MemoryOpener {
    type Storage = Arc<MemoryStorage>;

    async fn open(&self, path: &Path, _: Access) -> Result<Self::Storage> {
        let found = self.0.get(path).cloned();
        found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{} is not in memory", path.display()))
        })
    }

    async fn claim(&self, _: &Self::Storage, _: Claim) -> Result<()> {
        Ok(())
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::Path(path.to_owned()))
    }
}
