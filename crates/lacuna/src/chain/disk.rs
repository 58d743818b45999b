//! One opened disk of either format, with what must hold for it whatever its storage allows.
//!
//! * A disk opened for reading refuses changes, also where its storage would take them.
//! * A raw disk whose format was probed never becomes something else to the next probe
//!   (CVE-2026-27211): writes that put a magic at its start are refused.

use std::fmt;
use std::sync::Arc;

use super::policy::Format;
use super::probe::MAGIC;
use crate::block::{DiscardMode, Extent, KnownZeroes, Layer, Preallocation, WriteFlags, ZeroFlags};
use crate::buffer::Buffer;
use crate::qcow2::{Access, Image, SnapshotChoice, SnapshotLayer};
use crate::raw::Raw;
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// An opened image of either format. Clones are the same disk.
///
/// ```
/// use std::path::Path;
/// use lacuna::block::Layer;
/// use lacuna::chain::{self, ChainOptions, Disk, Format, MemoryOpener};
/// use lacuna::qcow2::Access;
/// use lacuna::storage::MemoryStorage;
///
/// let opener = MemoryOpener::default().with("disk", MemoryStorage::from(&[7; 4096][..]));
/// let options = ChainOptions::new(Format::Raw, Access::ReadOnly);
/// let chain = pollster::block_on(chain::open(&opener, Path::new("disk"), &options))?;
/// assert!(matches!(chain.disk(), Disk::Raw(_)));
/// assert_eq!(chain.disk().size_bytes(), 4096);
/// # Ok::<_, lacuna::Error>(())
/// ```
pub enum Disk<S: Storage> {
    /// A qcow2 image.
    Qcow2(Image<S>),
    /// A raw disk.
    Raw(RawDisk<S>),
    /// The disk of a qcow2 image as it was when a snapshot was made; read-only.
    Snapshot(SnapshotLayer<S>),
}

/// How the format of a raw disk became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Probed,
    Told,
}

/// A raw disk of a chain.
///
/// See [`Disk`] for an example.
#[derive(Debug)]
pub struct RawDisk<S> {
    raw: Arc<Raw<S>>,
    access: Access,
    origin: Origin,
}

impl<S: Storage> Disk<S> {
    /// Returns the format.
    pub const fn format(&self) -> Format {
        match self {
            Self::Qcow2(_) | Self::Snapshot(_) => Format::Qcow2,
            Self::Raw(_) => Format::Raw,
        }
    }

    /// Returns the image where this is one of qcow2; for a snapshot the image that has it.
    pub const fn as_qcow2(&self) -> Option<&Image<S>> {
        match self {
            Self::Qcow2(image) => Some(image),
            Self::Raw(_) => None,
            Self::Snapshot(layer) => Some(layer.image()),
        }
    }

    /// Returns the disk as it was when a snapshot was made.
    ///
    /// # Errors
    /// `Unsupported` for a raw disk, which has none; else as [`Image::snapshot`].
    pub async fn snapshot(&self, choice: &SnapshotChoice) -> Result<Self> {
        match self.as_qcow2() {
            Some(image) => Ok(Self::Snapshot(image.snapshot(choice).await?)),
            None => Err(Error::unsupported("A raw disk has no snapshots")),
        }
    }

    /// Returns the storage of the image file.
    pub fn storage(&self) -> &S {
        match self {
            Self::Qcow2(image) => image.storage(),
            Self::Raw(disk) => disk.raw.storage(),
            Self::Snapshot(layer) => layer.image().storage(),
        }
    }

    /// Makes the disk `size_bytes` long, for all clones. What is added reads as zeros. Durable when it
    /// returns.
    ///
    /// # Errors
    /// `ReadOnly`; `InvalidRequest` where the disk would not grow; else as [`Image::grow`] and
    /// [`Raw::lengthen`].
    pub async fn grow(&self, size_bytes: u64) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.grow(size_bytes, Preallocation::Off).await,
            Self::Raw(disk) => {
                disk.check_writable()?;
                disk.raw.lengthen(size_bytes).await
            }
            Self::Snapshot(_) => {
                Err(Error::new(ErrorKind::ReadOnly, "The disk of a snapshot keeps its size"))
            }
        }
    }

    /// Makes everything durable and leaves the image as it should be left; that of a snapshot is
    /// left to whoever has it open.
    ///
    /// # Errors
    /// What flushing gives, and what [`Image::close`] does.
    pub async fn close(self) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.close().await,
            Self::Raw(disk) if disk.access == Access::ReadOnly => Ok(()),
            Self::Raw(disk) => disk.raw.flush().await,
            Self::Snapshot(_) => Ok(()),
        }
    }
}

impl<S: Storage> Clone for Disk<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Qcow2(image) => Self::Qcow2(image.clone()),
            Self::Raw(disk) => Self::Raw(RawDisk { raw: Arc::clone(&disk.raw), ..*disk }),
            Self::Snapshot(layer) => Self::Snapshot(layer.clone()),
        }
    }
}

impl<S: Storage> fmt::Debug for Disk<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("format", &self.format())
            .field("size_bytes", &self.size_bytes())
            .finish_non_exhaustive()
    }
}

impl<S: Storage> RawDisk<S> {
    pub(super) async fn open(storage: S, access: Access, origin: Origin) -> Result<Self> {
        Ok(Self { raw: Arc::new(Raw::open(storage).await?), access, origin })
    }

    /// Returns the raw disk below, without the checks of this type.
    #[must_use]
    pub fn raw(&self) -> &Raw<S> {
        &self.raw
    }

    fn check_writable(&self) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::new(
                ErrorKind::ReadOnly,
                "The disk was opened for reading; open it for reading and writing to change it",
            )),
        }
    }

    /// Refuses what could make a later probe see another format.
    fn check_probe(&self, offset: GuestOffset, bytes: &[u8]) -> Result<()> {
        let magic = MAGIC.len();
        let partial = offset.0 > 0 || bytes.len() < magic;
        let touches = offset.0 < magic as u64 && !bytes.is_empty();
        match self.origin == Origin::Probed && touches && (partial || bytes.starts_with(&MAGIC)) {
            false => Ok(()),
            true => Err(Error::invalid(
                "The format of this raw disk was guessed, and the write would make it look like \
                 qcow2; name the format raw when opening to allow it",
            )),
        }
    }
}

impl<S: Storage> Layer for RawDisk<S> {
    fn size_bytes(&self) -> u64 {
        self.raw.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly || self.raw.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.raw.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.raw.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.raw.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        match self.check_writable().and_then(|()| self.check_probe(offset, &buffer)) {
            Ok(()) => self.raw.write(offset, buffer, flags).await,
            Err(error) => (Err(error), buffer),
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.raw.host_source(extent)
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        self.check_writable()?;
        if self.origin == Origin::Probed && offset.0 < MAGIC.len() as u64 {
            // What is copied is not seen here, and must not look like a header.
            return Err(Error::unsupported(
                "The start of a guessed raw disk is written, not copied",
            ));
        }
        self.raw.copy_from(offset, source).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        self.raw.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.check_writable()?;
        self.raw.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.raw.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.raw.extents(range).await
    }
}

impl<S: Storage> Layer for Disk<S> {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.size_bytes(),
            Self::Raw(disk) => disk.size_bytes(),
            Self::Snapshot(layer) => layer.size_bytes(),
        }
    }

    fn is_read_only(&self) -> bool {
        match self {
            Self::Qcow2(image) => image.is_read_only(),
            Self::Raw(disk) => disk.is_read_only(),
            Self::Snapshot(layer) => layer.is_read_only(),
        }
    }

    fn zero_unit_bytes(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.zero_unit_bytes(),
            Self::Raw(disk) => disk.zero_unit_bytes(),
            Self::Snapshot(layer) => layer.zero_unit_bytes(),
        }
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        match self {
            Self::Qcow2(image) => image.known_zeroes().await,
            Self::Raw(disk) => disk.known_zeroes().await,
            Self::Snapshot(layer) => layer.known_zeroes().await,
        }
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::Qcow2(image) => image.read(offset, buffer).await,
            Self::Raw(disk) => disk.read(offset, buffer).await,
            Self::Snapshot(layer) => layer.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        match self {
            Self::Qcow2(image) => image.write(offset, buffer, flags).await,
            Self::Raw(disk) => disk.write(offset, buffer, flags).await,
            Self::Snapshot(layer) => layer.write(offset, buffer, flags).await,
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        match self {
            Self::Qcow2(image) => image.host_source(extent),
            Self::Raw(disk) => disk.host_source(extent),
            Self::Snapshot(layer) => layer.host_source(extent),
        }
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.copy_from(offset, source).await,
            Self::Raw(disk) => disk.copy_from(offset, source).await,
            Self::Snapshot(layer) => layer.copy_from(offset, source).await,
        }
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.write_zeroes(range, flags).await,
            Self::Raw(disk) => disk.write_zeroes(range, flags).await,
            Self::Snapshot(layer) => layer.write_zeroes(range, flags).await,
        }
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.discard(range, mode).await,
            Self::Raw(disk) => disk.discard(range, mode).await,
            Self::Snapshot(layer) => layer.discard(range, mode).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.flush().await,
            Self::Raw(disk) => disk.flush().await,
            Self::Snapshot(layer) => layer.flush().await,
        }
    }

    async fn settled(&self) {
        match self {
            Self::Qcow2(image) => image.settled().await,
            Self::Raw(disk) => disk.settled().await,
            Self::Snapshot(layer) => layer.settled().await,
        }
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        match self {
            Self::Qcow2(image) => image.extents(range).await,
            Self::Raw(disk) => disk.extents(range).await,
            Self::Snapshot(layer) => layer.extents(range).await,
        }
    }
}
