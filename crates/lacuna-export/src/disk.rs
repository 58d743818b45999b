//! What a disk must tell to be served.

use std::future::Future;

use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, Result};

/// A run of a disk that is dirty, or not, in one bitmap.
///
/// ```
/// use lacuna::units::{GuestOffset, GuestRange};
/// use lacuna_export::DirtyRun;
/// let run = DirtyRun { range: GuestRange::new(GuestOffset(0), 65536), is_dirty: true };
/// assert!(run.is_dirty);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRun {
    /// Where.
    pub range: GuestRange,
    /// Whether it changed since the bitmap began.
    pub is_dirty: bool,
}

/// A [`Layer`] with the facts that clients may ask for beyond it.
///
/// No method has a default: one that was forgotten would tell a client less than the truth.
/// [`Plain`] makes one of a layer that knows nothing more.
pub trait ServedDisk: Layer + 'static {
    /// Returns the names of the dirty bitmaps that can be read, in the order they are listed.
    fn bitmaps(&self) -> Vec<String>;

    /// Returns the leading runs of `range` in a bitmap, at least one, in guest order without gaps;
    /// they may end before the range does.
    fn dirty(
        &self,
        bitmap: &str,
        range: GuestRange,
    ) -> impl Future<Output = Result<Vec<DirtyRun>>> + Send;

    /// Returns the sizes in bytes of the chain's levels, top first; at least the disk's own.
    fn level_sizes(&self) -> Vec<u64>;

    /// Returns the leading extents of `range` as level `level` (0 is the top) has them, with what
    /// lies below it: an extent of depth 1 is allocated in that level itself. As
    /// [`Layer::extents`] otherwise. What passes the end of a shorter level is unallocated.
    fn level_extents(
        &self,
        level: usize,
        range: GuestRange,
    ) -> impl Future<Output = Result<Vec<Extent>>> + Send;

    /// Returns the names of the bitmaps of a level, as [`bitmaps`](Self::bitmaps).
    fn level_bitmaps(&self, level: usize) -> Vec<String>;

    /// Returns what [`dirty`](Self::dirty) does, of a level's own bitmap.
    fn level_dirty(
        &self,
        level: usize,
        bitmap: &str,
        range: GuestRange,
    ) -> impl Future<Output = Result<Vec<DirtyRun>>> + Send;

    /// Gives the disk another size; durable when the call returns. `Unsupported` where it cannot.
    fn resize(&self, size_bytes: u64) -> impl Future<Output = Result<()>> + Send;

    /// Says whether it lies on a disk whose parts turn.
    fn is_rotational(&self) -> bool;
}

/// A layer that is served with no facts beyond its own: no bitmaps, one level, a fixed size.
///
/// ```
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_export::{Plain, ServedDisk};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?;
/// assert!(Plain(disk).bitmaps().is_empty());
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Plain<L>(pub L);

impl<L: Layer + 'static> ServedDisk for Plain<L> {
    fn bitmaps(&self) -> Vec<String> {
        Vec::new()
    }

    async fn dirty(&self, bitmap: &str, _: GuestRange) -> Result<Vec<DirtyRun>> {
        Err(no_bitmap(bitmap))
    }

    fn level_sizes(&self) -> Vec<u64> {
        vec![self.0.size_bytes()]
    }

    async fn level_extents(&self, _: usize, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents(range).await
    }

    fn level_bitmaps(&self, _: usize) -> Vec<String> {
        Vec::new()
    }

    async fn level_dirty(&self, _: usize, bitmap: &str, _: GuestRange) -> Result<Vec<DirtyRun>> {
        Err(no_bitmap(bitmap))
    }

    async fn resize(&self, _: u64) -> Result<()> {
        Err(Error::unsupported("This disk has a fixed size"))
    }

    fn is_rotational(&self) -> bool {
        false
    }
}

impl<L: Layer> Layer for Plain<L> {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.0.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.0.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.0.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.0.write(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents(range).await
    }
}

fn no_bitmap(name: &str) -> Error {
    Error::new(lacuna::ErrorKind::NotFound, format!("This disk has no bitmap {name}"))
}
