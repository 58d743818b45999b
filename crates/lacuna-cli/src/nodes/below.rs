//! A disk behind a pointer: what a layer on top of a disk stands on.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{BoxFuture, DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::{Encoder, Stream};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

/// A disk, or layers on top of one. Clones are the same disk.
#[derive(Clone)]
pub(super) struct Below(Arc<dyn DynDisk>);

impl Below {
    pub(super) fn new(disk: impl Target + 'static) -> Self {
        Self(Arc::new(disk))
    }
}

/// A [`Target`] behind a pointer.
trait DynDisk: Send + Sync {
    fn bytes(&self) -> u64;
    fn refuses_writes(&self) -> bool;
    fn zero_unit(&self) -> u64;
    fn known_dyn(&self) -> BoxFuture<'_, Result<KnownZeroes>>;
    fn read_dyn(&self, offset: GuestOffset, buffer: Buffer) -> BoxFuture<'_, Transfer>;
    fn write_dyn(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> BoxFuture<'_, Transfer>;
    fn zero_dyn(&self, range: GuestRange, flags: ZeroFlags) -> BoxFuture<'_, Result<()>>;
    fn discard_dyn(&self, range: GuestRange, mode: DiscardMode) -> BoxFuture<'_, Result<()>>;
    fn flush_dyn(&self) -> BoxFuture<'_, Result<()>>;
    fn extents_dyn(&self, range: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>>;
    fn encoder_dyn(&self) -> Option<Encoder>;
    fn encoded_dyn(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> BoxFuture<'_, Transfer>;
}

impl<L: Target> DynDisk for L {
    fn bytes(&self) -> u64 {
        self.size_bytes()
    }

    fn refuses_writes(&self) -> bool {
        self.is_read_only()
    }

    fn zero_unit(&self) -> u64 {
        self.zero_unit_bytes()
    }

    fn known_dyn(&self) -> BoxFuture<'_, Result<KnownZeroes>> {
        Box::pin(self.known_zeroes())
    }

    fn read_dyn(&self, offset: GuestOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        Box::pin(self.read(offset, buffer))
    }

    fn write_dyn(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> BoxFuture<'_, Transfer> {
        Box::pin(self.write(offset, buffer, flags))
    }

    fn zero_dyn(&self, range: GuestRange, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_zeroes(range, flags))
    }

    fn discard_dyn(&self, range: GuestRange, mode: DiscardMode) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.discard(range, mode))
    }

    fn flush_dyn(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.flush())
    }

    fn extents_dyn(&self, range: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>> {
        Box::pin(self.extents(range))
    }

    fn encoder_dyn(&self) -> Option<Encoder> {
        self.encoder()
    }

    fn encoded_dyn(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> BoxFuture<'_, Transfer> {
        Box::pin(self.write_encoded(offset, buffer, stream))
    }
}

impl Layer for Below {
    fn size_bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn is_read_only(&self) -> bool {
        self.0.refuses_writes()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.0.zero_unit()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.0.known_dyn().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.0.read_dyn(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.0.write_dyn(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.zero_dyn(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.discard_dyn(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush_dyn().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents_dyn(range).await
    }
}

impl Target for Below {
    fn encoder(&self) -> Option<Encoder> {
        self.0.encoder_dyn()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.0.encoded_dyn(offset, buffer, stream).await
    }
}
