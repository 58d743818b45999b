//! A storage object seen as a guest disk.

mod lent;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::lent::Lent;
use crate::block::{AllocationDepth, DiscardMode, Extent, ExtentBuilder, ExtentStatus, Layer};
use crate::block::{KnownZeroes, Preallocation, WriteFlags, ZeroFlags};
use crate::buffer::{Buffer, Hold};
use crate::storage::{Capability, HostSource, HostStatus, Storage, Transfer, ZeroMode, reserve};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// How many runs one status answer holds at most, so that memory stays bounded.
const EXTENTS_AT_ONCE: usize = 1024;

/// What most hosts can zero without writing bytes.
const HOST_BLOCK_BYTES: u64 = 4096;

/// A raw disk: guest offset equals host offset.
///
/// ```
/// use lacuna::block::Layer;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 4096)).unwrap();
/// assert_eq!(disk.size_bytes(), 4096);
/// ```
#[derive(Debug)]
pub struct Raw<S> {
    storage: S,
    size_bytes: AtomicU64,
    lent: Arc<Lent>,
}

impl<S: Storage> Raw<S> {
    fn new(storage: S, size_bytes: u64) -> Self {
        Self { storage, size_bytes: size_bytes.into(), lent: Arc::default() }
    }

    /// Sees all of `storage` as a disk. A tail shorter than a sector reads as if zero-filled.
    ///
    /// # Errors
    /// What asking for the length gives.
    pub async fn open(storage: S) -> Result<Self> {
        let size_bytes = storage.len().await?.next_multiple_of(512);
        Ok(Self::new(storage, size_bytes))
    }

    /// Sets the length of `storage` to `size_bytes` and sees it as a disk.
    ///
    /// # Errors
    /// What setting the length gives.
    pub async fn create(storage: S, size_bytes: u64) -> Result<Self> {
        storage.set_len(size_bytes, Hold::none()).await?;
        Ok(Self::new(storage, size_bytes))
    }

    /// Makes the disk `size_bytes` long, with what is added preallocated, and sees it so.
    ///
    /// Nothing is durable yet. Dropped half-way or failed, `storage` may have any length in
    /// between.
    ///
    /// # Errors
    /// `InvalidRequest` where the disk is longer already, or for
    /// [`Preallocation::Metadata`]: a raw disk has none. `NoSpace` where the host has no room.
    ///
    /// ```
    /// use lacuna::block::{Layer, Preallocation};
    /// use lacuna::{raw::Raw, storage::MemoryStorage};
    ///
    /// let grown = Raw::grow(MemoryStorage::new(), 1 << 20, Preallocation::Full);
    /// assert_eq!(pollster::block_on(grown)?.size_bytes(), 1 << 20);
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn grow(storage: S, size_bytes: u64, mode: Preallocation) -> Result<Self> {
        grow(&storage, size_bytes, mode).await?;
        Ok(Self::new(storage, size_bytes))
    }

    /// Makes the disk `size_bytes` long in place, for all who see it. Durable when it returns.
    ///
    /// # Errors
    /// `InvalidRequest` where the disk is longer already; else what setting the length gives.
    ///
    /// ```
    /// use lacuna::block::Layer;
    /// use lacuna::{raw::Raw, storage::MemoryStorage};
    ///
    /// pollster::block_on(async {
    ///     let disk = Raw::create(MemoryStorage::new(), 4096).await?;
    ///     disk.lengthen(8192).await?;
    ///     assert_eq!(disk.size_bytes(), 8192);
    ///     Ok::<_, lacuna::Error>(())
    /// }).unwrap();
    /// ```
    pub async fn lengthen(&self, size_bytes: u64) -> Result<()> {
        grow(&self.storage, size_bytes, Preallocation::Off).await?;
        self.storage.flush().await?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Returns the storage below.
    pub const fn storage(&self) -> &S {
        &self.storage
    }

    /// Gives the storage back.
    pub fn into_storage(self) -> S {
        self.storage
    }

    fn check(&self, range: GuestRange) -> Result<HostRange> {
        match range.start.checked_add(range.len) {
            Some(end) if end.0 <= self.size_bytes() => {
                Ok(HostRange::new(HostOffset(range.start.0), range.len))
            }
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{} bytes at {} pass the end of the disk at {:#x}",
                    range.len,
                    range.start,
                    self.size_bytes()
                ),
            )),
        }
    }
}

/// Gives a raw disk another size, with what is added preallocated. Durable when it returns.
///
/// A disk that somebody sees as [`Raw`] keeps the size it had there. What is added reads as zeros;
/// what is cut off is lost.
///
/// # Errors
/// `InvalidRequest` for [`Preallocation::Metadata`], which raw disks do not have, and for
/// preallocation without growth; otherwise what the storage says.
///
/// ```
/// use lacuna::block::Preallocation;
/// use lacuna::raw::resize;
/// use lacuna::storage::{MemoryStorage, Storage};
///
/// let storage = MemoryStorage::new();
/// pollster::block_on(async {
///     resize(&storage, 4096, Preallocation::Full).await?;
///     resize(&storage, 512, Preallocation::Off).await?;
///     assert_eq!(storage.len().await?, 512);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn resize<S: Storage>(storage: &S, size_bytes: u64, mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off => storage.set_len(size_bytes, Hold::none()).await?,
        _ => grow(storage, size_bytes, mode).await?,
    }
    storage.flush().await
}

/// Makes a raw disk longer.
async fn grow<S: Storage>(storage: &S, to: u64, mode: Preallocation) -> Result<()> {
    let old = storage.len().await?;
    let Some(added) = to.checked_sub(old) else {
        return Err(Error::invalid(format!("The disk has {old} bytes already, more than {to}")));
    };
    if mode == Preallocation::Metadata {
        return Err(Error::invalid("A raw disk has no metadata that could be preallocated"));
    }
    let range = HostRange::new(HostOffset(old), added);
    reserve(storage, range, mode.of_data(), Hold::none()).await.map(drop)
}

impl<S: Storage> Layer for Raw<S> {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        !self.storage.capabilities().writable
    }

    fn zero_unit_bytes(&self) -> u64 {
        HOST_BLOCK_BYTES
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        // Where the file ends in the midst of a sector, zeros follow.
        let there = self.storage.len().await?.min(self.size_bytes());
        let whole = HostRange::new(HostOffset(0), there);
        // A file; what a device or an export held before nobody knows.
        let is_file = self.storage.capabilities().set_len != Capability::Unsupported;
        if whole.is_empty() {
            return Ok(KnownZeroes { create: is_file, truncate: is_file, open: true });
        }
        let first = self.storage.status_at(whole).await?;
        let open = first.status == HostStatus::Hole && first.len == whole.len;
        Ok(KnownZeroes { create: is_file, truncate: is_file, open })
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        match self.check(GuestRange::new(offset, buffer.len() as u64)) {
            Ok(range) => self.storage.read_at(range.start, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        let range = match self.check(GuestRange::new(offset, buffer.len() as u64)) {
            Ok(range) => range,
            Err(error) => return (Err(error), buffer),
        };
        match flags.contains(WriteFlags::FUA) {
            true => self.storage.write_durably_at(range.start, buffer).await,
            false => self.storage.write_at(range.start, buffer).await,
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.storage.host_source(self.check(extent.range).ok()?)
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        let range = self.check(GuestRange::new(offset, source.range().len))?;
        self.storage.copy_at(source, range.start, self.lent.hold()).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        let range = self.check(range)?;
        let mode = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => ZeroMode::MayUnmap,
            false => ZeroMode::Allocate,
        };
        let native = self.storage.capabilities().write_zeroes;
        if flags.contains(ZeroFlags::FAST) && native != Capability::Native {
            return Err(Error::unsupported("The host cannot zero faster than writing"));
        }
        match flags.contains(ZeroFlags::FUA) {
            true => self.storage.write_zeroes_durably_at(range, mode, self.lent.hold()).await,
            false => self.storage.write_zeroes_at(range, mode, self.lent.hold()).await,
        }
    }

    async fn discard(&self, range: GuestRange, _: DiscardMode) -> Result<()> {
        let range = self.check(range)?;
        match self.storage.discard_at(range, self.lent.hold()).await {
            // A discard is a hint; a host that cannot take it loses nothing.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    async fn flush(&self) -> Result<()> {
        self.storage.flush().await
    }

    /// Of writes those know whose buffers hold something.
    async fn settled(&self) {
        self.lent.settled().await;
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let host = self.check(range)?;
        let (mut builder, mut at) = (ExtentBuilder::default(), host.start);
        while at < host.end() && builder.len() < EXTENTS_AT_ONCE {
            for found in self.storage.extents_at(HostRange::new(at, host.end() - at)).await? {
                let status = ExtentStatus {
                    depth: AllocationDepth::TOP,
                    reads_zero: found.status.reads_zero(),
                    is_hole: found.status.is_hole(),
                    is_compressed: false,
                    host: Some(at),
                };
                let range = GuestRange::new(GuestOffset(at.0), found.len);
                builder.push(Extent { range, status });
                at = at + found.len;
            }
        }
        Ok(builder.finish())
    }
}
