//! All layers below the top one, seen as one layer.
//!
//! * Never recursive: a request goes through the levels in a loop, so that the depth of a chain
//!   costs neither stack nor a future per level. Each level is opened as if it ended the chain.
//! * Never read where a level knows to be zero, never asked past the end of a shorter level: what
//!   that one lacks reads as zeros, whatever lies further down.
//! * Always unchanged while open: what one answer says stays true.

use super::disk::Disk;
use crate::block::{
    AllocationDepth, BoxFuture, DiscardMode, DynLayer, Extent, ExtentBuilder, ExtentCursor,
    ExtentStatus, KnownZeroes, Layer, WriteFlags, ZeroFlags,
};
use crate::buffer::Buffer;
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// How many extents one answer holds at most, so that its memory stays bounded.
const EXTENTS_AT_ONCE: usize = 1024;

/// The levels below the top one, the highest first; at least one.
pub(super) struct Below<S: Storage>(Vec<Disk<S>>);

/// A run and the level that has its bytes, where one does.
struct Found {
    extent: Extent,
    level: Option<usize>,
}

impl<S: Storage> Below<S> {
    pub(super) const fn new(levels: Vec<Disk<S>>) -> Self {
        Self(levels)
    }

    fn cursors(&self) -> Vec<ExtentCursor> {
        self.0.iter().map(|_| ExtentCursor::default()).collect()
    }

    /// Goes down from the highest level until one decides what is at `rest.start`.
    async fn find(&self, cursors: &mut [ExtentCursor], rest: GuestRange) -> Result<Found> {
        let at = rest.start;
        let (mut len, mut above) = (rest.len, ExtentStatus::UNALLOCATED);
        for (level, (disk, cursor)) in self.0.iter().zip(cursors).enumerate() {
            let there = disk.size_bytes().saturating_sub(at.0);
            if there == 0 {
                break;
            }
            let extent = cursor.at(disk, GuestRange::new(at, rest.len.min(there))).await?;
            len = len.min(extent.range.len);
            if extent.status.depth == AllocationDepth::TOP {
                let status = ExtentStatus { depth: depth(level), ..extent.status };
                let extent = Extent { range: GuestRange::new(at, len), status };
                return Ok(Found { extent, level: Some(level) });
            }
            above = extent.status;
        }
        let status = ExtentStatus { depth: AllocationDepth::NOWHERE, reads_zero: true, ..above };
        Ok(Found { extent: Extent { range: GuestRange::new(at, len), status }, level: None })
    }

    async fn fill(&self, found: &Found, mut buffer: Buffer) -> Transfer {
        match found.level {
            Some(level) if !found.extent.status.reads_zero => {
                self.0[level].read(found.extent.range.start, buffer).await
            }
            _ => {
                buffer.fill(0);
                (Ok(()), buffer)
            }
        }
    }
}

/// How deep a level is, seen from the highest one here.
fn depth(level: usize) -> AllocationDepth {
    AllocationDepth(u32::try_from(level + 1).unwrap_or(u32::MAX))
}

fn read_only<T>() -> Result<T> {
    Err(Error::new(ErrorKind::ReadOnly, "Backing layers are not changed"))
}

impl<S: Storage> Layer for Below<S> {
    fn size_bytes(&self) -> u64 {
        self.0.first().map_or(0, Layer::size_bytes)
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    /// Each level knows of itself alone: all must.
    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        for level in self.0.iter() {
            if !level.known_zeroes().await?.open {
                return Ok(KnownZeroes::NOTHING);
            }
        }
        Ok(KnownZeroes { open: true, ..KnownZeroes::NOTHING })
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let mut cursors = self.cursors();
        let (mut done, mut rest, mut at) = (None, buffer, offset);
        while !rest.is_empty() {
            let range = GuestRange::new(at, rest.len() as u64);
            let found = match self.find(&mut cursors, range).await {
                Ok(found) => found,
                Err(error) => return (Err(error), Buffer::joined(done, rest)),
            };
            let behind = rest.split_off(found.extent.range.len as usize);
            let (result, part) = self.fill(&found, rest).await;
            (done, rest, at) = (Some(Buffer::joined(done, part)), behind, found.extent.range.end());
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
        (Ok(()), Buffer::joined(done, rest))
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        let level = extent.status.depth.0.checked_sub(1)? as usize;
        let status = ExtentStatus { depth: AllocationDepth::TOP, ..extent.status };
        self.0.get(level)?.host_source(&Extent { status, ..*extent })
    }

    async fn write(&self, _: GuestOffset, buffer: Buffer, _: WriteFlags) -> Transfer {
        (read_only(), buffer)
    }

    async fn write_zeroes(&self, _: GuestRange, _: ZeroFlags) -> Result<()> {
        read_only()
    }

    async fn discard(&self, _: GuestRange, _: DiscardMode) -> Result<()> {
        read_only()
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let mut cursors = self.cursors();
        let (mut builder, mut at) = (ExtentBuilder::default(), range.start);
        while at < range.end() && builder.len() < EXTENTS_AT_ONCE {
            let rest = GuestRange::new(at, range.end() - at);
            let found = self.find(&mut cursors, rest).await?;
            at = found.extent.range.end();
            builder.push(found.extent);
        }
        Ok(builder.finish())
    }
}

/// What a lower level gets for a backing layer: one without a byte.
pub(super) struct Nothing;

impl DynLayer for Nothing {
    fn size(&self) -> u64 {
        0
    }

    fn read_boxed(&self, offset: GuestOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        let result = match buffer.is_empty() {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("{} bytes at {offset} pass the end of an empty layer", buffer.len()),
            )),
        };
        Box::pin(std::future::ready((result, buffer)))
    }

    fn host_source_of(&self, _: &Extent) -> Option<HostSource> {
        None
    }

    fn known_zeroes_boxed(&self) -> BoxFuture<'_, Result<KnownZeroes>> {
        Box::pin(std::future::ready(Ok(KnownZeroes { open: true, ..KnownZeroes::NOTHING })))
    }

    fn extents_boxed(&self, _: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}
