//! One storage type for all that a command line can describe.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use lacuna::block::BoxFuture;
use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    Capabilities, Claim, Event, FileStorage, HostExtent, HostSource, Permissions, Storage,
    Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, Result};
use lacuna_remote::NbdStorage;

/// A file, or something that plays one.
pub(crate) enum AnyStorage {
    File(FileStorage),
    Export(Arc<dyn DynStorage>),
    Other(Arc<dyn DynStorage>),
}

impl AnyStorage {
    /// Keeps other programs out as `claim` says; nothing where there is no file to be locked.
    pub(crate) fn claim(&self, claim: Claim) -> Result<()> {
        match self {
            Self::File(file) => file.claim(claim),
            Self::Export(_) | Self::Other(_) => Ok(()),
        }
    }

    /// Says whether this is a file on a disk that is known to turn.
    pub(crate) fn is_rotational(&self) -> bool {
        matches!(self, Self::File(file) if file.is_rotational())
    }

    /// Adds to what is held of a file.
    pub(crate) fn hold_more(&self, more: Permissions) -> Result<()> {
        match self {
            Self::File(file) => file.claim(file.claimed().holding(more)),
            Self::Export(_) | Self::Other(_) => Ok(()),
        }
    }

    /// Wraps an export of a server.
    pub(super) fn export(storage: NbdStorage) -> Self {
        Self::Export(Arc::new(storage))
    }

    /// Wraps what is no plain file.
    pub(super) fn other(storage: impl Storage) -> Self {
        Self::Other(Arc::new(storage))
    }

    /// Says whether this is an export of a server, as it is.
    pub(crate) fn is_export(&self) -> bool {
        matches!(self, Self::Export(_))
    }

    /// Returns how many bytes the host has allocated, where this is a file and the host says so.
    pub(crate) fn allocated_bytes(&self) -> Option<u64> {
        let Self::File(file) = self else { return None };
        let file = std::fs::File::from(file.as_fd().try_clone_to_owned().ok()?);
        Some(file.metadata().ok()?.blocks() * 512)
    }
}

/// A [`Storage`] behind a pointer.
pub(crate) trait DynStorage: Send + Sync {
    fn read_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer>;
    fn write_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer>;
    fn write_durably_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer>;
    fn zero_boxed(&self, range: HostRange, mode: ZeroMode, hold: Hold)
    -> BoxFuture<'_, Result<()>>;
    fn zero_durably_boxed(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> BoxFuture<'_, Result<()>>;
    fn punch_boxed(&self, range: HostRange, hold: Hold) -> BoxFuture<'_, Result<()>>;
    fn discard_boxed(&self, range: HostRange, hold: Hold) -> BoxFuture<'_, Result<()>>;
    fn allocate_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<()>>;
    fn flush_boxed(&self) -> BoxFuture<'_, Result<()>>;
    fn len_boxed(&self) -> BoxFuture<'_, Result<u64>>;
    fn set_len_boxed(&self, len: u64, hold: Hold) -> BoxFuture<'_, Result<()>>;
    fn status_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<HostExtent>>;
    fn extents_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<Vec<HostExtent>>>;
    fn event_boxed(&self, event: Event) -> BoxFuture<'_, ()>;
    fn abilities(&self) -> Capabilities;
}

impl<S: Storage> DynStorage for S {
    fn read_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        Box::pin(self.read_at(offset, buffer))
    }

    fn write_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        Box::pin(self.write_at(offset, buffer))
    }

    fn write_durably_boxed(&self, offset: HostOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        Box::pin(self.write_durably_at(offset, buffer))
    }

    fn zero_boxed(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_zeroes_at(range, mode, hold))
    }

    fn zero_durably_boxed(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_zeroes_durably_at(range, mode, hold))
    }

    fn punch_boxed(&self, range: HostRange, hold: Hold) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.punch_hole_at(range, hold))
    }

    fn discard_boxed(&self, range: HostRange, hold: Hold) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.discard_at(range, hold))
    }

    fn allocate_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.allocate_at(range))
    }

    fn flush_boxed(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.flush())
    }

    fn len_boxed(&self) -> BoxFuture<'_, Result<u64>> {
        Box::pin(self.len())
    }

    fn set_len_boxed(&self, len: u64, hold: Hold) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.set_len(len, hold))
    }

    fn status_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<HostExtent>> {
        Box::pin(self.status_at(range))
    }

    fn extents_boxed(&self, range: HostRange) -> BoxFuture<'_, Result<Vec<HostExtent>>> {
        Box::pin(self.extents_at(range))
    }

    fn event_boxed(&self, event: Event) -> BoxFuture<'_, ()> {
        Box::pin(self.event(event))
    }

    fn abilities(&self) -> Capabilities {
        self.capabilities()
    }
}

impl Storage for AnyStorage {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::File(file) => file.read_at(offset, buffer).await,
            Self::Export(other) | Self::Other(other) => other.read_boxed(offset, buffer).await,
        }
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::File(file) => file.write_at(offset, buffer).await,
            Self::Export(other) | Self::Other(other) => other.write_boxed(offset, buffer).await,
        }
    }

    async fn write_durably_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::File(file) => file.write_durably_at(offset, buffer).await,
            Self::Export(other) | Self::Other(other) => {
                other.write_durably_boxed(offset, buffer).await
            }
        }
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        match self {
            Self::File(file) => file.write_zeroes_at(range, mode, hold).await,
            Self::Export(other) | Self::Other(other) => other.zero_boxed(range, mode, hold).await,
        }
    }

    async fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> Result<()> {
        match self {
            Self::File(file) => file.write_zeroes_durably_at(range, mode, hold).await,
            Self::Export(other) | Self::Other(other) => {
                other.zero_durably_boxed(range, mode, hold).await
            }
        }
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        match self {
            Self::File(file) => file.punch_hole_at(range, hold).await,
            Self::Export(other) | Self::Other(other) => other.punch_boxed(range, hold).await,
        }
    }

    async fn discard_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        match self {
            Self::File(file) => file.discard_at(range, hold).await,
            Self::Export(other) | Self::Other(other) => other.discard_boxed(range, hold).await,
        }
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        match self {
            Self::File(file) => file.allocate_at(range).await,
            Self::Export(other) | Self::Other(other) => other.allocate_boxed(range).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        match self {
            Self::File(file) => file.flush().await,
            Self::Export(other) | Self::Other(other) => other.flush_boxed().await,
        }
    }

    async fn len(&self) -> Result<u64> {
        match self {
            Self::File(file) => file.len().await,
            Self::Export(other) | Self::Other(other) => other.len_boxed().await,
        }
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        match self {
            Self::File(file) => file.set_len(len, hold).await,
            Self::Export(other) | Self::Other(other) => other.set_len_boxed(len, hold).await,
        }
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        match self {
            Self::File(file) => file.status_at(range).await,
            Self::Export(other) | Self::Other(other) => other.status_boxed(range).await,
        }
    }

    async fn extents_at(&self, range: HostRange) -> Result<Vec<HostExtent>> {
        match self {
            Self::File(file) => file.extents_at(range).await,
            Self::Export(other) | Self::Other(other) => other.extents_boxed(range).await,
        }
    }

    fn host_source(&self, range: HostRange) -> Option<HostSource> {
        match self {
            Self::File(file) => file.host_source(range),
            Self::Export(_) | Self::Other(_) => None,
        }
    }

    async fn copy_at(&self, source: HostSource, to: HostOffset, hold: Hold) -> Result<()> {
        match self {
            Self::File(file) => file.copy_at(source, to, hold).await,
            Self::Export(_) | Self::Other(_) => {
                Err(Error::unsupported("Only the host's files copy by themselves"))
            }
        }
    }

    async fn event(&self, event: Event) {
        match self {
            Self::File(_) => {}
            Self::Export(other) | Self::Other(other) => other.event_boxed(event).await,
        }
    }

    fn capabilities(&self) -> Capabilities {
        match self {
            Self::File(file) => file.capabilities(),
            Self::Export(other) | Self::Other(other) => other.abilities(),
        }
    }
}
