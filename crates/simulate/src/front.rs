//! The disk as guests see it: the image, or a layer on top of it.

use std::sync::Arc;

use lacuna::block::{
    Change, DetectZeroes, DiscardMode, Extent, KnownZeroes, Layer, Points, WriteFlags, ZeroFlags,
};
use lacuna::buffer::Buffer;
use lacuna::job::{DedupWrites, DedupWritesOptions};
use lacuna::qcow2::{Image, Shrink};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, Result};
use lacuna_export::{DirtyRun, ServedDisk};
use testkit::sim::SimStorage;

use crate::jobs::FINGERPRINT_SEED;
use crate::points::Scratch;
use crate::scenario::Front;

/// One of the layers there are.
#[derive(Clone)]
pub(crate) enum Disk {
    Image(Image<SimStorage>),
    DetectsZeroes(DetectZeroes<Image<SimStorage>>),
    SharesOnline(Arc<DedupWrites<SimStorage>>),
    KeepsPoints(Points<Image<SimStorage>, Scratch>),
}

impl Disk {
    /// Puts the layer on top; an image that cannot share is served as it is.
    pub(crate) fn new(image: &Image<SimStorage>, front: Front) -> Self {
        let image = image.clone();
        match front {
            Front::Image => Self::Image(image),
            Front::KeepsPoints => Self::KeepsPoints(Points::new(image)),
            Front::DetectsZeroes(level) => Self::DetectsZeroes(DetectZeroes::new(image, level)),
            Front::SharesOnline => {
                let batch_bytes = 3 * image.geometry().cluster_bytes();
                let seed = Some(FINGERPRINT_SEED);
                let options = DedupWritesOptions { batch_bytes, seed, ..Default::default() };
                match DedupWrites::new(image.clone(), options) {
                    Ok(disk) => Self::SharesOnline(Arc::new(disk)),
                    Err(_cannot_share) => Self::Image(image),
                }
            }
        }
    }

    /// Does what waits.
    pub(crate) async fn finish(&self) -> Result<()> {
        match self {
            Self::SharesOnline(disk) => disk.finish().await,
            Self::Image(_) | Self::DetectsZeroes(_) | Self::KeepsPoints(_) => Ok(()),
        }
    }

    /// Lets points save what a change that goes past them would overwrite. The change may be made as
    /// long as what is returned lives.
    pub(crate) async fn before_change(&self, range: GuestRange) -> Option<Change<Scratch>> {
        match self {
            Self::KeepsPoints(points) => Some(points.before_change(range).await),
            _ => None,
        }
    }

    /// Gives the image another size.
    pub(crate) async fn resize(&self, image: &Image<SimStorage>, size_bytes: u64) -> Result<()> {
        let _change = match self {
            Self::KeepsPoints(points) => Some(points.before_resize(size_bytes).await),
            _ => None,
        };
        image.resize(size_bytes, Shrink::Allow).await
    }
}

/// Asks whichever it is.
macro_rules! each {
    ($self:ident, $disk:ident => $call:expr) => {
        match $self {
            Self::Image($disk) => $call,
            Self::DetectsZeroes($disk) => $call,
            Self::SharesOnline($disk) => $call,
            Self::KeepsPoints($disk) => $call,
        }
    };
}

impl Layer for Disk {
    fn size_bytes(&self) -> u64 {
        each!(self, disk => disk.size_bytes())
    }

    fn is_read_only(&self) -> bool {
        each!(self, disk => disk.is_read_only())
    }

    fn zero_unit_bytes(&self) -> u64 {
        each!(self, disk => disk.zero_unit_bytes())
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        each!(self, disk => disk.known_zeroes().await)
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        each!(self, disk => disk.read(offset, buffer).await)
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        each!(self, disk => disk.write(offset, buffer, flags).await)
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        each!(self, disk => disk.write_zeroes(range, flags).await)
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        each!(self, disk => disk.discard(range, mode).await)
    }

    async fn flush(&self) -> Result<()> {
        each!(self, disk => disk.flush().await)
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        each!(self, disk => disk.extents(range).await)
    }
}

/// The disk as it is served: with a size that clients can change.
#[derive(Clone)]
pub(crate) struct Served {
    disk: Disk,
    image: Image<SimStorage>,
}

impl Served {
    pub(crate) const fn new(disk: Disk, image: Image<SimStorage>) -> Self {
        Self { disk, image }
    }
}

impl ServedDisk for Served {
    fn bitmaps(&self) -> Vec<String> {
        Vec::new()
    }

    async fn dirty(&self, _: &str, _: GuestRange) -> Result<Vec<DirtyRun>> {
        Err(Error::unsupported("No bitmaps are served"))
    }

    fn level_sizes(&self) -> Vec<u64> {
        vec![self.size_bytes()]
    }

    async fn level_extents(&self, _: usize, range: GuestRange) -> Result<Vec<Extent>> {
        self.extents(range).await
    }

    fn level_bitmaps(&self, _: usize) -> Vec<String> {
        Vec::new()
    }

    async fn level_dirty(
        &self,
        _: usize,
        bitmap: &str,
        range: GuestRange,
    ) -> Result<Vec<DirtyRun>> {
        self.dirty(bitmap, range).await
    }

    async fn resize(&self, size_bytes: u64) -> Result<()> {
        self.disk.resize(&self.image, size_bytes).await
    }

    fn is_rotational(&self) -> bool {
        false
    }
}

impl Layer for Served {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.disk.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.disk.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.disk.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.disk.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.disk.write(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.disk.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.disk.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.disk.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.disk.extents(range).await
    }
}
