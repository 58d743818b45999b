//! A part of a disk, to read from.

use lacuna::Result;
use lacuna::block::{Extent, KnownZeroes, Layer};
use lacuna::buffer::Buffer;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

/// So many bytes of a disk from an offset on, all of them within it.
pub(super) struct Part<'a, L> {
    disk: &'a L,
    start: u64,
    len: u64,
}

impl<'a, L: Layer> Part<'a, L> {
    pub(super) const fn new(disk: &'a L, start: u64, len: u64) -> Self {
        Self { disk, start, len }
    }
}

impl<L: Layer> Layer for Part<'_, L> {
    fn size_bytes(&self) -> u64 {
        self.len
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes::NOTHING)
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.disk.read(offset + self.start, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let mut extents =
            self.disk.extents(GuestRange::new(range.start + self.start, range.len)).await?;
        for extent in &mut extents {
            extent.range.start = GuestOffset(extent.range.start.0 - self.start);
        }
        Ok(extents)
    }
}
