//! Points in time: a disk as it was at one moment, while guests go on changing it.
//!
//! [`Points`] lies on a disk, and all that changes it goes through there. [`Points::add`] makes a
//! [`Point`], a disk that cannot be changed: what a change would overwrite is saved first, to a layer
//! that the caller gives; everything else is read from the disk itself
//! (`docs/design/points.md`).
//!
//! * `gate.rs`: changes under way, and a moment without any
//! * `kept.rs`: what a point saves, and how
//! * `units.rs`: what is saved
//! * `point.rs`: the disk that a point is
//!
//! * Always: a change begins when every point has saved what it would overwrite.
//! * Always: what is read from the disk is looked at a second time: where it was saved meanwhile, what
//!   was saved counts.
//! * Never: zeros that metadata knows are read or saved.
//! * Locks, all short: the gate's, then a point's.

mod gate;
mod kept;
mod point;
mod units;

use std::sync::Arc;

use self::gate::{Closed, Gate, Passed};
use self::kept::Kept;
use super::{
    AllocationDepth, DiscardMode, Extent, ExtentStatus, KnownZeroes, Layer, WriteFlags, ZeroFlags,
};
use crate::buffer::{Buffer, Hold};
use crate::storage::{HostSource, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, Result};

pub use self::kept::PointStatus;
pub use self::point::Point;

/// What happens when a point may save no more.
///
/// ```
/// assert_eq!(lacuna::block::WhenFull::default(), lacuna::block::WhenFull::Break);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenFull {
    /// The point cannot be read any more, and guests go on.
    #[default]
    Break,
    /// Guests that would change what is not saved wait for space, or for the end of the point.
    Wait,
}

/// How a point keeps what changes.
///
/// ```
/// let options = lacuna::block::PointOptions { space_bytes: 1 << 30, ..Default::default() };
/// assert_eq!(options.when_full, lacuna::block::WhenFull::Break);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PointOptions {
    /// How many bytes may be saved.
    pub space_bytes: u64,
    /// What happens when more would be.
    pub when_full: WhenFull,
}

impl Default for PointOptions {
    fn default() -> Self {
        Self { space_bytes: u64::MAX, when_full: WhenFull::default() }
    }
}

/// A disk of which points in time can be kept. `T` is what they save to. Clones are the same disk.
///
/// All changes of the disk must go through it, or through what [`before_change`](Self::before_change)
/// returned.
///
/// A write that was dropped, and that a driver still works on, is waited for by a point that is added
/// later; so is a zeroing or a discard of an [`Image`](crate::qcow2::Image) by
/// [`freeze_bitmaps`](crate::qcow2::Image::freeze_bitmaps). One of a raw disk may show in the point or
/// not.
///
/// ```
/// use lacuna::block::{Layer, PointOptions, Points, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let disk = Points::new(Raw::create(MemoryStorage::new(), 1 << 20).await?);
///     let saved = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let (point, ()) = disk.add(saved, PointOptions::default(), async { Ok(()) }).await?;
///     disk.write(GuestOffset(512), Buffer::from(&[7; 512][..]), WriteFlags::empty()).await.0?;
///     let (result, bytes) = point.read(GuestOffset(512), Buffer::new(512)).await;
///     result?;
///     assert_eq!(bytes[..], [0; 512]);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub struct Points<L, T>(Arc<Shared<L, T>>);

struct Shared<L, T> {
    below: L,
    gate: Arc<Gate<Arc<Kept<T>>>>,
}

/// Leave to change a part of a disk, as long as it lives; made by [`Points::before_change`].
///
/// ```
/// use lacuna::block::{Layer, Points, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::raw::Raw;
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 4096).await?;
///     let points = Points::<_, Raw<MemoryStorage>>::new(disk);
///     let change = points.before_change(points.whole()).await;
///     let mut bytes = Buffer::from(&[7; 512][..]);
///     bytes.set_hold(change.hold());
///     points.below().write(GuestOffset(0), bytes, WriteFlags::empty()).await.0
/// }).unwrap();
/// ```
pub struct Change<T: Send + Sync>(Passed<Arc<Kept<T>>>);

impl<T: Layer + 'static> Change<T> {
    /// Returns what rides with the buffer of a change that goes to the disk directly: dropped half-way,
    /// it is over when no driver has a part of it.
    #[must_use]
    pub fn hold(&self) -> Hold {
        self.0.again()
    }
}

impl<L, T> Clone for Points<L, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<L, T> std::fmt::Debug for Points<L, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Points").finish_non_exhaustive()
    }
}

impl<T: Send + Sync> std::fmt::Debug for Change<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Change").finish_non_exhaustive()
    }
}

impl<L: Layer, T: Layer + 'static> Points<L, T> {
    /// Puts itself on a disk; there is no point yet.
    pub fn new(below: L) -> Self {
        Self(Arc::new(Shared { below, gate: Arc::new(Gate::new()) }))
    }

    /// Returns the disk below, to be read, not to be changed.
    #[must_use]
    pub fn below(&self) -> &L {
        &self.0.below
    }

    /// Makes a point of the disk as it is at a moment at which no change is under way, which it waits for;
    /// changes that come meanwhile wait as well. `at_the_moment` is done then, and nothing changes before
    /// it is over: what it makes is of the same moment.
    ///
    /// `target` reads as zeros, is as large as the disk, and is used by nobody else. It needs no more than to live
    /// as long as the point.
    ///
    /// # Errors
    /// What `at_the_moment` gives; there is no point then. `InvalidRequest` for a target that is too small.
    pub async fn add<R>(
        &self,
        target: T,
        options: PointOptions,
        at_the_moment: impl Future<Output = Result<R>>,
    ) -> Result<(Point<L, T>, R)> {
        let _closed = self.close().await;
        let size_bytes = self.0.below.size_bytes();
        if target.size_bytes() < size_bytes {
            return Err(Error::invalid(format!(
                "A point of a disk of {size_bytes} bytes cannot be saved to {}",
                target.size_bytes()
            )));
        }
        let made = at_the_moment.await?;
        let kept = Arc::new(Kept::new(size_bytes, target, options));
        self.0.gate.change_points(|all| {
            let all = all.iter().map(Arc::clone);
            all.chain([Arc::clone(&kept)]).collect()
        });
        Ok((Point::new(Arc::clone(&self.0), kept), made))
    }

    /// Does `work` at a moment at which no change is under way; changes that come meanwhile wait.
    ///
    /// # Errors
    /// What `work` gives.
    pub async fn at_rest<R>(&self, work: impl Future<Output = Result<R>>) -> Result<R> {
        let _closed = self.close().await;
        work.await
    }

    /// Lets no change begin while what is returned lives; none is under way, nor left with a driver.
    async fn close(&self) -> Closed<'_, Arc<Kept<T>>> {
        let closed = self.0.gate.close().await;
        self.0.below.settled().await;
        closed
    }

    /// Has every point save what a change of `range` would overwrite. The change may be made as long as
    /// what is returned lives; an empty range is for a change that overwrites nothing.
    pub async fn before_change(&self, range: GuestRange) -> Change<T> {
        loop {
            let passed = self.0.gate.pass().await;
            if passed.points.is_none() {
                return Change(passed);
            }
            if let Some(change) = Box::pin(self.save(passed, range)).await {
                return change;
            }
        }
    }

    /// Has every point save what lies behind the end that the disk is to have; otherwise as
    /// [`before_change`](Self::before_change).
    pub async fn before_resize(&self, size_bytes: u64) -> Change<T> {
        self.before_change(GuestRange::new(GuestOffset(size_bytes), u64::MAX - size_bytes)).await
    }

    /// Has the points save. Where one has no space it is waited for, without the leave, so that points
    /// can come and go; then all begins anew.
    async fn save(&self, passed: Passed<Arc<Kept<T>>>, range: GuestRange) -> Option<Change<T>> {
        let points = passed.points.iter().flat_map(|points| points.iter());
        for kept in points {
            if let Some(space) = kept.save(&self.0.below, range).await {
                let kept = Arc::clone(kept);
                drop(passed);
                let _counted = kept.count_waiting();
                space.await;
                return None;
            }
        }
        Some(Change(passed))
    }
}

impl<L: Layer, T: Layer + 'static> Layer for Points<L, T> {
    fn size_bytes(&self) -> u64 {
        self.0.below.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.0.below.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.0.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.0.below.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.0.below.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, mut buffer: Buffer, flags: WriteFlags) -> Transfer {
        let range = GuestRange::new(offset, buffer.len() as u64);
        let change = self.before_change(range).await;
        buffer.set_hold(change.hold());
        let (result, mut buffer) = self.0.below.write(offset, buffer, flags).await;
        drop(buffer.take_hold());
        (result, buffer)
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.0.below.host_source(extent)
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        let _change = self.before_change(GuestRange::new(offset, source.range().len)).await;
        self.0.below.copy_from(offset, source).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        let _change = self.before_change(range).await;
        self.0.below.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        let _change = self.before_change(range).await;
        self.0.below.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.below.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.below.extents(range).await
    }
}
