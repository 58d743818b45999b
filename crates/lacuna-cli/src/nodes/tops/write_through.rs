//! What is written is durable when the call returns: QEMU's cache modes `writethrough` and
//! `directsync`.

use lacuna::Result;
use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::{Encoder, Stream};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

use crate::nodes::below::Below;

pub(in crate::nodes) struct WriteThrough(pub(in crate::nodes) Below);

impl Layer for WriteThrough {
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
        self.0.write(offset, buffer, flags | WriteFlags::FUA).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags | ZeroFlags::FUA).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.discard(range, mode).await?;
        self.0.flush().await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents(range).await
    }
}

impl Target for WriteThrough {
    fn encoder(&self) -> Option<Encoder> {
        self.0.encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        let (result, buffer) = self.0.write_encoded(offset, buffer, stream).await;
        match result {
            Ok(()) => (self.0.flush().await, buffer),
            Err(error) => (Err(error), buffer),
        }
    }
}
