//! What a chain that is served holds, and the way that writes of clients go.

use lacuna::Result;
use lacuna::block::{DetectZeroes, DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::DedupWrites;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

use crate::nodes::{AnyStorage, ToolDisk};

type Sharing = DetectZeroes<DedupWrites<AnyStorage>>;

/// A disk whose writes may go another way than all else.
pub(crate) struct Content {
    disk: ToolDisk,
    /// What writes go through where equal clusters are stored once.
    sharing: Option<Sharing>,
}

impl Content {
    pub(super) const fn new(disk: ToolDisk, sharing: Option<Sharing>) -> Self {
        Self { disk, sharing }
    }

    /// Leaves the disk as it should be left, with what waits to be shared.
    pub(super) async fn close(&self) -> Result<()> {
        let shared = match &self.sharing {
            Some(sharing) => sharing.below().finish().await,
            None => Ok(()),
        };
        // Closed in any case; the first error is the one to tell.
        let closed = self.disk.clone().close().await;
        shared.and(closed)
    }
}

impl Layer for Content {
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
        match &self.sharing {
            Some(sharing) => sharing.write(offset, buffer, flags).await,
            None => self.disk.write(offset, buffer, flags).await,
        }
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
