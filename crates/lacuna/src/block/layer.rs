//! The trait every guest-visible disk has.

use std::future::{Future, ready};
use std::pin::Pin;

use bitflags::bitflags;

use super::{Extent, KnownZeroes};
use crate::storage::{HostSource, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

bitflags! {
    /// How a write is to be done.
    ///
    /// ```
    /// assert!(lacuna::block::WriteFlags::default().is_empty());
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct WriteFlags: u32 {
        /// The bytes and all that is needed to find them are durable when the call returns.
        const FUA = 1;
    }
}

bitflags! {
    /// How zeroes are to be written.
    ///
    /// ```
    /// use lacuna::block::ZeroFlags;
    /// assert!((ZeroFlags::FUA | ZeroFlags::MAY_UNMAP).contains(ZeroFlags::FUA));
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ZeroFlags: u32 {
        /// Durable when the call returns.
        const FUA = 1;
        /// Space may be given back (the opposite of NBD's NO_HOLE).
        const MAY_UNMAP = 2;
        /// Fail with `Unsupported` rather than write bytes; nothing is changed then.
        const FAST = 4;
        /// Where less than a unit is zeroed, read the rest of the unit to learn whether all of it
        /// can become one (004-5b): up to two reads of less than a unit each. Layers that have no
        /// units ignore it.
        const THOROUGH = 8;
    }
}

/// Who wants the space back, which decides how thoroughly a mapping is removed (A.3.1).
///
/// ```
/// assert_ne!(lacuna::block::DiscardMode::Guest, lacuna::block::DiscardMode::Full);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiscardMode {
    /// The guest no longer needs the content; afterwards the range reads as zeros where the
    /// format can say so.
    Guest,
    /// The mapping is removed completely; a backing layer shows through.
    Full,
}

/// A fixed-size guest disk.
///
/// All calls may be in flight at once. Overlapping writes in flight at the same time leave, for
/// each sector, the content of one of them. A call may be dropped at any await: it then took
/// place, in part or not at all, and later calls see a consistent disk.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::raw::Raw;
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     disk.write(GuestOffset(512), Buffer::from(&[7; 512][..]), WriteFlags::FUA).await.0?;
///     assert!(disk.extents(disk.whole()).await?.iter().any(|extent| extent.status.reads_zero));
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub trait Layer: Send + Sync {
    /// Returns the size of the disk in bytes.
    fn size_bytes(&self) -> u64;

    /// Says whether writes are refused: by a layer that says nothing else of changes, they are.
    fn is_read_only(&self) -> bool {
        true
    }

    /// Returns the unit in bytes, a power of two of at least 512, in which the layer can make
    /// aligned ranges read as zeros without writing bytes. A hint: smaller ranges work too.
    fn zero_unit_bytes(&self) -> u64;

    /// Returns what is known of being all zeros without a walk (000-5). Cheap; where in doubt,
    /// [`KnownZeroes::NOTHING`].
    fn known_zeroes(&self) -> impl Future<Output = Result<KnownZeroes>> + Send;

    /// Fills the buffer from `offset` on. `OutOfBounds` where that passes the end.
    fn read(
        &self,
        offset: GuestOffset,
        buffer: crate::buffer::Buffer,
    ) -> impl Future<Output = Transfer> + Send;

    /// Writes the buffer at `offset`; durable after the next flush, or at once with FUA.
    ///
    /// `ReadOnly` unless a layer has its own.
    fn write(
        &self,
        _: GuestOffset,
        buffer: crate::buffer::Buffer,
        _: WriteFlags,
    ) -> impl Future<Output = Transfer> + Send {
        ready((Err(only_read()), buffer))
    }

    /// Returns where the host can copy an extent of this layer from, where it can: one that
    /// [`extents`](Self::extents) gave, or a part of it.
    fn host_source(&self, _: &Extent) -> Option<HostSource> {
        None
    }

    /// Has the host copy bytes to `offset`, instead of a write.
    ///
    /// `Unsupported` where it cannot: the range then holds anything, and is to be written.
    fn copy_from(&self, _: GuestOffset, _: HostSource) -> impl Future<Output = Result<()>> + Send {
        ready(Err(Error::unsupported("This disk cannot be copied to by the host")))
    }

    /// Makes the range read as zeros; `ReadOnly` unless a layer has its own.
    fn write_zeroes(&self, _: GuestRange, _: ZeroFlags) -> impl Future<Output = Result<()>> + Send {
        ready(Err(only_read()))
    }

    /// Takes note that the content of the range is no longer needed.
    ///
    /// Parts that are smaller than what the layer can free keep their content. `ReadOnly` unless a
    /// layer has its own.
    fn discard(&self, _: GuestRange, _: DiscardMode) -> impl Future<Output = Result<()>> + Send {
        ready(Err(only_read()))
    }

    /// Makes everything durable that was acknowledged before the call began.
    fn flush(&self) -> impl Future<Output = Result<()>> + Send;

    /// Returns when no driver has a part any more of a change that began before and was dropped on the
    /// way: what is read from then on does not come to be something else by it. At once, unless a layer
    /// knows of such.
    fn settled(&self) -> impl Future<Output = ()> + Send {
        ready(())
    }

    /// Returns the leading extents of `range`, at least one, in guest order without gaps; they
    /// may end before the range does (then ask on from there). Neighbours of one status are one
    /// extent within an answer, not across answers.
    fn extents(&self, range: GuestRange) -> impl Future<Output = Result<Vec<Extent>>> + Send;

    /// Returns the range of the whole disk.
    fn whole(&self) -> GuestRange {
        GuestRange::new(GuestOffset(0), self.size_bytes())
    }
}

fn only_read() -> Error {
    Error::new(ErrorKind::ReadOnly, "This disk is only read, and never changed")
}

/// A future in a box, as [`DynLayer`] returns it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A [`Layer`] behind a pointer: how a chain hands a backing layer to the image above it.
///
/// Every `Layer` is one. The box for each call is paid only where a request leaves the top image.
///
/// ```
/// use std::sync::Arc;
/// use lacuna::block::DynLayer;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 4096)).unwrap();
/// let backing: Arc<dyn DynLayer> = Arc::new(disk);
/// assert_eq!(backing.size(), 4096);
/// ```
pub trait DynLayer: Send + Sync {
    /// As [`Layer::size_bytes`].
    fn size(&self) -> u64;
    /// As [`Layer::read`].
    fn read_boxed(
        &self,
        offset: GuestOffset,
        buffer: crate::buffer::Buffer,
    ) -> BoxFuture<'_, Transfer>;
    /// As [`Layer::host_source`].
    fn host_source_of(&self, extent: &Extent) -> Option<HostSource>;
    /// As [`Layer::known_zeroes`].
    fn known_zeroes_boxed(&self) -> BoxFuture<'_, Result<KnownZeroes>>;
    /// As [`Layer::extents`].
    fn extents_boxed(&self, range: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>>;
}

impl<L: Layer> DynLayer for L {
    fn size(&self) -> u64 {
        self.size_bytes()
    }

    fn read_boxed(
        &self,
        offset: GuestOffset,
        buffer: crate::buffer::Buffer,
    ) -> BoxFuture<'_, Transfer> {
        Box::pin(self.read(offset, buffer))
    }

    fn host_source_of(&self, extent: &Extent) -> Option<HostSource> {
        self.host_source(extent)
    }

    fn known_zeroes_boxed(&self) -> BoxFuture<'_, Result<KnownZeroes>> {
        Box::pin(self.known_zeroes())
    }

    fn extents_boxed(&self, range: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>> {
        Box::pin(self.extents(range))
    }
}
