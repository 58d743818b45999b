//! What a backing layer gives is kept in the disk: the next read finds it there.
//!
//! * Whole units are copied, never one that the disk allocates already.
//! * Zeros stay zeros: they are written as such, and take no space.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{
    AllocationDepth, DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags, is_zero,
};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::{Encoder, Stream};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

use crate::nodes::below::Below;
use crate::nodes::debug::Rules;

/// The most that is copied at once.
const STEP_BYTES: u64 = 1 << 20;

pub(in crate::nodes) struct CopyOnRead {
    pub(in crate::nodes) below: Below,
    /// What the disk allocates as one.
    pub(in crate::nodes) unit_bytes: u64,
    /// Those of the test driver right below, where there is one.
    pub(in crate::nodes) rules: Option<Arc<Rules>>,
}

impl CopyOnRead {
    /// Tells a test driver that a copy is about to be written.
    async fn tell(&self) {
        if let Some(rules) = &self.rules {
            rules.event("cor_write").await;
        }
    }

    /// Copies what a read of `range` would get from below.
    async fn copy(&self, range: GuestRange) -> Result<()> {
        let start = range.start.0 / self.unit_bytes * self.unit_bytes;
        let end = range.end().0.next_multiple_of(self.unit_bytes).min(self.size_bytes());
        let mut at = GuestOffset(start);
        while at.0 < end {
            for extent in self.below.extents(GuestRange::new(at, end - at.0)).await? {
                if extent.status.depth != AllocationDepth::TOP {
                    self.copy_extent(extent).await?;
                }
                at = extent.range.end();
            }
        }
        Ok(())
    }

    async fn copy_extent(&self, extent: Extent) -> Result<()> {
        if extent.status.reads_zero {
            self.tell().await;
            return self.below.write_zeroes(extent.range, ZeroFlags::empty()).await;
        }
        let mut at = extent.range.start;
        while at < extent.range.end() {
            let len = (extent.range.end() - at).min(STEP_BYTES);
            let (result, bytes) = self.below.read(at, Buffer::new(len as usize)).await;
            result?;
            self.tell().await;
            match is_zero(&bytes) {
                true => {
                    let range = GuestRange::new(at, len);
                    self.below.write_zeroes(range, ZeroFlags::empty()).await?;
                }
                false => self.below.write(at, bytes, WriteFlags::empty()).await.0?,
            }
            at = at + len;
        }
        Ok(())
    }
}

impl Layer for CopyOnRead {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.below.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.below.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let range = GuestRange::new(offset, buffer.len() as u64);
        let fits = offset.0.checked_add(range.len).is_some_and(|end| end <= self.size_bytes());
        // Read first: a rule that a copy wakes is about what is written then.
        let (result, buffer) = self.below.read(offset, buffer).await;
        match result.is_ok() && fits && !range.is_empty() {
            true => (self.copy(range).await, buffer),
            false => (result, buffer),
        }
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.below.write(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.below.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.below.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.below.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.below.extents(range).await
    }
}

impl Target for CopyOnRead {
    fn encoder(&self) -> Option<Encoder> {
        self.below.encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.below.write_encoded(offset, buffer, stream).await
    }
}
