//! A disk as the command line sees it: that of the library, with what options put on top.

use std::sync::Arc;

use lacuna::block::{
    DetectZeroes, DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroDetection, ZeroFlags,
};
use lacuna::buffer::Buffer;
use lacuna::chain::{Disk, Format};
use lacuna::job::{DedupWrites, DedupWritesOptions, Target};
use lacuna::qcow2::{Encoder, Image, Stream};
use lacuna::storage::{HostSource, Transfer};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, Result};

use super::any::AnyStorage;
use super::below::Below;
use super::debug::Rules;
use super::tops::stacked;
use crate::verbs::spec::tree::TopSpec;

/// A way for writes that shares what is equal.
type Sharing = DetectZeroes<DedupWrites<AnyStorage>>;

/// An opened disk. Clones are the same disk.
#[derive(Clone)]
pub(crate) struct ToolDisk {
    disk: DetectZeroes<Disk<AnyStorage>>,
    /// Disks that play storages somewhere below, innermost last.
    nested: Arc<[Disk<AnyStorage>]>,
    /// What a discard does.
    discards: Discards,
    /// What writes go through, below all layers, where equal clusters are stored once.
    sharing: Option<Arc<Sharing>>,
    /// The layers on top, where there are any.
    top: Option<Below>,
    /// What they are.
    tops: Arc<[TopSpec]>,
    /// The rules of the highest test driver, where there is one.
    rules: Option<Arc<Rules>>,
}

/// Whether a discard reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Discards {
    /// It is taken and forgotten.
    Ignored,
    Passed,
}

impl ToolDisk {
    pub(super) fn new(
        disk: Disk<AnyStorage>,
        detection: ZeroDetection,
        nested: Vec<Disk<AnyStorage>>,
        discards: Discards,
    ) -> Self {
        let disk = DetectZeroes::new(disk, detection);
        let (nested, tops) = (nested.into(), Arc::new([]));
        Self { disk, nested, discards, sharing: None, top: None, tops, rules: None }
    }

    /// Has equal clusters be stored once as they are written, whatever is on top.
    pub(super) fn sharing(self, options: DedupWritesOptions) -> Result<Self> {
        let Disk::Qcow2(image) = self.disk.below() else {
            return Err(Error::unsupported("Only the clusters of a qcow2 image can share"));
        };
        if self.tops.contains(&TopSpec::Compress) {
            return Err(Error::unsupported(
                "What the driver compress writes cannot share as it is written; lacuna dedup does it later",
            ));
        }
        let writes = DedupWrites::new(image.clone(), options)?;
        let sharing = Some(Arc::new(DetectZeroes::new(writes, self.disk.level())));
        let tops = Arc::clone(&self.tops);
        Self { sharing, top: None, tops: Arc::new([]), ..self }.topped(&tops)
    }

    /// Puts layers on top.
    pub(super) fn topped(self, tops: &[TopSpec]) -> Result<Self> {
        if tops.is_empty() {
            return Ok(self);
        }
        let unit_bytes = self.zero_unit_bytes();
        let above = stacked(Below::new(self.clone()), tops, unit_bytes)?;
        let rules = above.rules.or_else(|| self.rules.clone());
        Ok(Self { top: Some(above.top), tops: tops.into(), rules, ..self })
    }

    /// Puts the disk of a snapshot in the place of the disk, below the same layers.
    pub(super) fn at_snapshot(self, disk: Disk<AnyStorage>) -> Result<Self> {
        let disk = DetectZeroes::new(disk, ZeroDetection::Off);
        let tops = Arc::clone(&self.tops);
        Self { disk, top: None, ..self }.topped(&tops)
    }

    /// Returns the image for one who writes to it past this disk: only where nothing but zero detection
    /// is on top of it.
    pub(crate) fn bare_image(&self) -> Option<&Image<AnyStorage>> {
        match self.disk.below() {
            Disk::Qcow2(image) if self.tops.is_empty() => Some(image),
            _ => None,
        }
    }

    /// Returns the image at the bottom of this disk, for one who changes where its content lies and not
    /// what it is; nothing for a raw disk and for a snapshot.
    pub(crate) fn image_below(&self) -> Option<&Image<AnyStorage>> {
        match self.disk.below() {
            Disk::Qcow2(image) => Some(image),
            _ => None,
        }
    }

    /// Remembers the rules of a test driver.
    pub(super) fn with_rules(self, rules: Option<Arc<Rules>>) -> Self {
        Self { rules, ..self }
    }

    /// Returns the rules of the highest test driver, where there is one.
    pub(crate) const fn rules(&self) -> Option<&Arc<Rules>> {
        self.rules.as_ref()
    }

    /// Returns the format.
    pub(crate) const fn format(&self) -> Format {
        self.disk.below().format()
    }

    /// Returns the image where this is one of qcow2.
    pub(crate) const fn as_qcow2(&self) -> Option<&Image<AnyStorage>> {
        self.disk.below().as_qcow2()
    }

    /// Returns what closed the image to changes, if anything did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.as_qcow2().and_then(Image::failure)
    }

    /// Returns the storage of the image file.
    pub(crate) fn storage(&self) -> &AnyStorage {
        self.disk.below().storage()
    }

    /// Makes everything durable and leaves all images as they should be left, from the top down.
    pub(crate) async fn close(self) -> Result<()> {
        let shared = match &self.sharing {
            Some(sharing) => sharing.below().finish().await,
            None => Ok(()),
        };
        // Closed in any case; the first error is the one to tell.
        let closed = self.disk.into_below().close().await;
        shared.and(closed)?;
        for disk in self.nested.iter().rev() {
            disk.clone().close().await?;
        }
        Ok(())
    }
}

impl Layer for ToolDisk {
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
        match &self.top {
            Some(top) => top.read(offset, buffer).await,
            None => self.disk.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        match &self.top {
            Some(top) => top.write(offset, buffer, flags).await,
            None => match &self.sharing {
                Some(sharing) => sharing.write(offset, buffer, flags).await,
                None => self.disk.write(offset, buffer, flags).await,
            },
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        match &self.top {
            Some(_) => None,
            None => self.disk.host_source(extent),
        }
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        match &self.top {
            Some(_) => Err(Error::unsupported("What lies on top must see what is written")),
            None => self.disk.copy_from(offset, source).await,
        }
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        match &self.top {
            Some(top) => top.write_zeroes(range, flags).await,
            None => self.disk.write_zeroes(range, flags).await,
        }
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        match (self.discards, &self.top) {
            (Discards::Ignored, _) => Ok(()),
            (Discards::Passed, Some(top)) => top.discard(range, mode).await,
            (Discards::Passed, None) => self.disk.discard(range, mode).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        match &self.top {
            Some(top) => top.flush().await,
            None => self.disk.flush().await,
        }
    }

    async fn settled(&self) {
        self.disk.settled().await;
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        match &self.top {
            Some(top) => top.extents(range).await,
            None => self.disk.extents(range).await,
        }
    }
}

impl Target for ToolDisk {
    fn encoder(&self) -> Option<Encoder> {
        self.disk.encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.disk.write_encoded(offset, buffer, stream).await
    }
}
