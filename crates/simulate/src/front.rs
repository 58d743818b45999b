//! The disk as guests see it: the image, or a layer on top of it.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{
    DetectZeroes, DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroDetection, ZeroFlags,
};
use lacuna::buffer::Buffer;
use lacuna::job::{DedupWrites, DedupWritesOptions};
use lacuna::qcow2::Image;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::SimStorage;

use crate::scenario::Front;

/// One of the layers there are.
#[derive(Clone)]
pub(crate) enum Disk {
    Image(Image<SimStorage>),
    DetectsZeroes(DetectZeroes<Image<SimStorage>>),
    SharesOnline(Arc<DedupWrites<SimStorage>>),
}

impl Disk {
    /// Puts the layer on top; an image that cannot share is served as it is.
    pub(crate) fn new(image: &Image<SimStorage>, front: Front) -> Self {
        let image = image.clone();
        match front {
            Front::Image => Self::Image(image),
            Front::DetectsZeroes => {
                Self::DetectsZeroes(DetectZeroes::new(image, ZeroDetection::Unmap))
            }
            Front::SharesOnline => {
                let batch_bytes = 3 * image.geometry().cluster_bytes();
                let options = DedupWritesOptions { batch_bytes, ..DedupWritesOptions::default() };
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
            Self::Image(_) | Self::DetectsZeroes(_) => Ok(()),
        }
    }
}

/// Asks whichever it is.
macro_rules! each {
    ($self:ident, $disk:ident => $call:expr) => {
        match $self {
            Self::Image($disk) => $call,
            Self::DetectsZeroes($disk) => $call,
            Self::SharesOnline($disk) => $call,
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
