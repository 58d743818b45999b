//! A disk that stays what another one was at a moment, as clients see it.
//!
//! * Never offered: how deep in the chain something lies. Of what was saved nobody knows it any more.

use lacuna::block::{Extent, KnownZeroes, Layer, Point, PointOptions, PointStatus, WhenFull};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{DirtyExtent, FrozenBitmaps, NewBitmap};
use lacuna::raw::Raw;
use lacuna::storage::{FileStorage, Transfer};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_export::{DirtyRun, ServedDisk};

use super::disk::ChainDisk;
use crate::nodes::{AnyStorage, ToolDisk};

/// Where a point saves to: a file without a name.
pub(crate) type Scratch = Raw<FileStorage>;

/// Runs that a bitmap is asked for at a time.
const RUNS_AT_ONCE: usize = 1024;

/// What a point is to have.
pub(crate) struct Asked {
    pub(crate) options: PointOptions,
    /// Bitmaps to be frozen.
    pub(crate) bitmaps: Vec<String>,
    pub(crate) new_bitmaps: Vec<NewBitmap>,
}

/// A point in time of a disk that is served.
pub(crate) struct PointDisk {
    point: Point<ToolDisk, Scratch>,
    /// Nothing for a disk without bitmaps.
    frozen: Option<FrozenBitmaps<AnyStorage>>,
    is_rotational: bool,
}

/// Freezes and makes the bitmaps of a disk that does not change meanwhile.
pub(super) async fn freeze(
    disk: &ChainDisk,
    asked: &Asked,
) -> Result<Option<FrozenBitmaps<AnyStorage>>> {
    let wants_bitmaps = !asked.bitmaps.is_empty() || !asked.new_bitmaps.is_empty();
    match disk.image() {
        Some(image) if wants_bitmaps || !disk.is_read_only() => {
            let names: Vec<_> = asked.bitmaps.iter().map(|name| name.as_str().into()).collect();
            image.freeze_bitmaps(&names, &asked.new_bitmaps).await.map(Some)
        }
        None if wants_bitmaps => {
            Err(Error::unsupported("Only the bitmaps of a qcow2 image can be frozen or made"))
        }
        _ => Ok(None),
    }
}

impl PointDisk {
    pub(super) const fn new(
        point: Point<ToolDisk, Scratch>,
        frozen: Option<FrozenBitmaps<AnyStorage>>,
        is_rotational: bool,
    ) -> Self {
        Self { point, frozen, is_rotational }
    }

    pub(crate) fn status(&self) -> PointStatus {
        self.point.status()
    }

    pub(crate) fn when_full(&self) -> WhenFull {
        self.point.when_full()
    }

    /// Changes how much may be saved.
    pub(crate) fn set_space(&self, space_bytes: u64) {
        self.point.set_space(space_bytes);
    }

    /// Has the frozen bitmaps name what changed since, durably.
    pub(crate) async fn finish(&self) -> Result<()> {
        match &self.frozen {
            Some(frozen) => frozen.finish().await,
            None => Ok(()),
        }
    }

    /// Ends it: nothing is kept or noted any more.
    pub(crate) fn end(&self) {
        self.point.end();
        if let Some(frozen) = &self.frozen {
            frozen.end();
        }
    }
}

impl Layer for PointDisk {
    fn size_bytes(&self) -> u64 {
        self.point.size_bytes()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.point.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.point.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.point.read(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        self.point.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.point.extents(range).await
    }
}

impl ServedDisk for PointDisk {
    fn bitmaps(&self) -> Vec<String> {
        let names = self.frozen.iter().flat_map(FrozenBitmaps::bitmaps);
        names.map(|bitmap| bitmap.name().to_string()).collect()
    }

    async fn dirty(&self, bitmap: &str, range: GuestRange) -> Result<Vec<DirtyRun>> {
        let frozen = self.frozen.as_ref().and_then(|frozen| frozen.bitmap(bitmap));
        let frozen = frozen.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("There is no bitmap {bitmap}"))
        })?;
        let run = |it: DirtyExtent| DirtyRun { range: it.range, is_dirty: it.is_dirty };
        Ok(frozen.extents(range, RUNS_AT_ONCE).into_iter().map(run).collect())
    }

    fn level_sizes(&self) -> Vec<u64> {
        vec![self.size_bytes()]
    }

    async fn level_extents(&self, _: usize, range: GuestRange) -> Result<Vec<Extent>> {
        self.point.extents(range).await
    }

    fn level_bitmaps(&self, _: usize) -> Vec<String> {
        Vec::new()
    }

    async fn level_dirty(
        &self,
        _: usize,
        bitmap: &str,
        range: GuestRange,
    ) -> Result<Vec<DirtyRun>> {
        self.dirty(bitmap, range).await
    }

    async fn resize(&self, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "A point in time does not change"))
    }

    fn is_rotational(&self) -> bool {
        self.is_rotational
    }
}
