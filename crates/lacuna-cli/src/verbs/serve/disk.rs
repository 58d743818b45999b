//! An opened chain as a server sees it.

use lacuna::block::{
    Change, DiscardMode, Extent, ExtentStatus, KnownZeroes, Layer, Points, WriteFlags, ZeroFlags,
};
use lacuna::buffer::Buffer;
use lacuna::job::DedupWritesOptions;
use lacuna::qcow2::{Image, Shrink};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_export::{DirtyRun, ServedDisk};

use super::bitmaps::Bitmaps;
use super::point::{Asked, PointDisk, Scratch};
use crate::error::CliResult;
use crate::nodes::{AnyStorage, FileChain, ToolDisk};

/// A chain that is served.
pub(crate) struct ChainDisk {
    chain: FileChain,
    bitmaps: Bitmaps,
    is_rotational: bool,
    /// All that changes the disk goes through here.
    content: Points<ToolDisk, Scratch>,
}

impl ChainDisk {
    pub(super) fn new(chain: FileChain, bitmaps: Bitmaps) -> Self {
        let is_rotational = chain.content_storage().is_rotational();
        let content = Points::new(chain.disk().clone());
        Self { chain, bitmaps, is_rotational, content }
    }

    /// Makes it one that stores equal clusters once.
    pub(super) fn with_sharing(self, options: DedupWritesOptions) -> CliResult<Self> {
        let chain = self.chain.sharing(options)?;
        let content = Points::new(chain.disk().clone());
        Ok(Self { chain, content, ..self })
    }

    /// Leaves the disk as it should be left, with what waits to be shared.
    pub(super) async fn close(&self) -> Result<()> {
        self.content.below().clone().close().await
    }

    /// Makes it one that does not tell whether it turns: qemu-nbd never does.
    pub(crate) fn silent_about_turning(self) -> Self {
        Self { is_rotational: false, ..self }
    }

    pub(crate) const fn disk(&self) -> &ToolDisk {
        self.chain.disk()
    }

    pub(crate) const fn own_bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Returns the image that guests write to, if it is one.
    pub(crate) fn image(&self) -> Option<&Image<AnyStorage>> {
        self.disk().image_below()
    }

    /// Makes a disk that stays what this one is at a moment of the call.
    pub(crate) async fn point(&self, scratch: Scratch, asked: &Asked) -> Result<PointDisk> {
        let frozen = super::point::freeze(self, asked);
        let (point, frozen) = self.content.add(scratch, asked.options, frozen).await?;
        Ok(PointDisk::new(point, frozen, self.is_rotational))
    }
}

impl Layer for ChainDisk {
    fn size_bytes(&self) -> u64 {
        self.content.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.content.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.content.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.content.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.content.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.content.write(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.content.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.content.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.content.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.content.extents(range).await
    }
}

impl ServedDisk for ChainDisk {
    fn bitmaps(&self) -> Vec<String> {
        self.bitmaps.names().to_vec()
    }

    async fn dirty(&self, bitmap: &str, range: GuestRange) -> Result<Vec<DirtyRun>> {
        let level = self.bitmaps.level_of(bitmap)?;
        self.level_dirty(level, bitmap, range).await
    }

    fn level_sizes(&self) -> Vec<u64> {
        let below = (1..self.chain.levels().len()).filter_map(|level| self.chain.level_disk(level));
        std::iter::once(self.size_bytes()).chain(below.map(Layer::size_bytes)).collect()
    }

    async fn level_extents(&self, level: usize, range: GuestRange) -> Result<Vec<Extent>> {
        let Some(disk) = self.chain.level_disk(level) else { return Ok(vec![nothing(range)]) };
        // A backing file may be shorter than what stands on it.
        let end = range.end().min(GuestOffset(disk.size_bytes()));
        match end > range.start {
            true => disk.extents(GuestRange::new(range.start, end - range.start)).await,
            false => Ok(vec![nothing(range)]),
        }
    }

    fn level_bitmaps(&self, level: usize) -> Vec<String> {
        self.bitmaps.level(level).to_vec()
    }

    async fn level_dirty(
        &self,
        level: usize,
        name: &str,
        range: GuestRange,
    ) -> Result<Vec<DirtyRun>> {
        self.bitmaps.dirty(&self.chain, level, name, range).await
    }

    async fn resize(&self, size_bytes: u64) -> Result<()> {
        if self.disk().is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "The disk is served for reading only"));
        }
        let Some(image) = self.disk().as_qcow2() else {
            return Err(Error::unsupported("Only qcow2 images change their size while served"));
        };
        let _change: Change<Scratch> = self.content.before_resize(size_bytes).await;
        image.resize(size_bytes, Shrink::Allow).await?;
        image.flush().await
    }

    fn is_rotational(&self) -> bool {
        self.is_rotational
    }
}

fn nothing(range: GuestRange) -> Extent {
    Extent { range, status: ExtentStatus::UNALLOCATED }
}
