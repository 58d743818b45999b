//! The image as a guest disk.

use super::image::Image;
use super::view::View;
use crate::Result;
use crate::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use crate::buffer::Buffer;
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};

impl<S: Storage> Layer for Image<S> {
    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn is_read_only(&self) -> bool {
        !self.0.meta.lock().writable
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.geometry().subcluster_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.zeroes_known().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.read_guest(View::Active, offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.give_way().await;
        self.write_guest(offset, buffer, flags).await
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.source_of(extent)
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        self.give_way().await;
        self.copy_guest(offset, source).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.give_way().await;
        self.zero_guest(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.give_way().await;
        self.discard_guest(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        self.flush_all().await
    }

    async fn settled(&self) {
        let now = self.0.meta.lock().in_flight.moment();
        self.wait_until(|in_flight| in_flight.changes_are_over(now)).await;
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.extents_of(View::Active, range).await
    }
}
