//! Which bitmaps there are: the directory, and how another one takes its place (B.10).
//!
//! | step | what is written | what a crash leaves |
//! |---|---|---|
//! | 1 | what was marked, into the stored bitmaps; none is in use then | the same bitmaps |
//! | 2 | new bits, tables, and a new directory, to free clusters; their refcounts | leaks |
//! | 3 | the header names the new directory, one sector at a time | the old or the new bitmaps |
//! | 4 | the refcounts of what only the old directory named | leaks |
//!
//! * Always: nobody changes the disk between the first step and the third, so that a bitmap is from
//!   one moment.
//! * Always: a change that was dropped in the middle is looked up before the next one.

use super::super::format::{AutoclearFeatures, BitmapEntry, BitmapsExtension, Header, Version};
use super::super::header_change;
use super::super::image::Image;
use super::super::meta::Meta;
use super::super::overlap::Structure;
use super::super::resize::MAX_SIZE_BYTES;
use super::super::turn::Taken;
use super::super::write_back::Refcounting;
use super::Bitmaps;
use crate::buffer::{Buffer, Hold};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Reads the directory: where each entry lies, and what it says.
pub(in crate::qcow2) async fn directory<S: Storage>(
    storage: &S,
    header: &Header,
) -> Result<Vec<(HostOffset, BitmapEntry)>> {
    let Some(extension) = header.valid_bitmaps() else { return Ok(Vec::new()) };
    let buffer = Buffer::new(extension.directory_bytes as usize);
    let (result, bytes) = storage.read_at(extension.directory_offset, buffer).await;
    result.map_err(|error| error.context("Reading the bitmap directory"))?;
    let mut at = extension.directory_offset;
    let mut placed = Vec::new();
    for entry in BitmapEntry::decode_directory(&bytes, &extension)? {
        let len = BitmapEntry::encode_directory(std::slice::from_ref(&entry))?.len() as u64;
        placed.push((at, entry));
        at = at + len;
    }
    Ok(placed)
}

/// The bitmaps while nobody changes the disk, all of them stored as they are.
pub(in crate::qcow2) struct AtRest<'a, S: Storage> {
    pub(super) image: &'a Image<S>,
    /// As the directory has them.
    pub(super) entries: Vec<BitmapEntry>,
    /// The directory that is to be replaced.
    old: Option<HostRange>,
    _still: Still<'a>,
}

/// Nobody changes the disk while this lives, and nobody edits or stores bitmaps.
pub(in crate::qcow2) struct Still<'a> {
    pub(in crate::qcow2) turn: Taken<'a>,
    pub(in crate::qcow2) exclusion: Hold,
    pub(in crate::qcow2) edits: Taken<'a>,
}

impl<S: Storage> Image<S> {
    /// Waits until nothing changes the disk, keeps it so, and brings the stored bitmaps up to date.
    pub(in crate::qcow2) async fn bitmaps_at_rest(&self) -> Result<AtRest<'_, S>> {
        self.check_writable()?;
        if self.geometry().version() == Version::V2 {
            return Err(Error::unsupported("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        let still = self.still(GuestRange::new(GuestOffset(0), MAX_SIZE_BYTES)).await?;
        self.store_bitmaps_in_turn().await?;
        let header = {
            let mut meta = self.0.meta.lock();
            // Whoever changes the disk next marks them in use again.
            meta.gate.bitmaps = !meta.bitmaps.is_empty();
            self.0.header.lock().clone()
        };
        let placed = directory(&self.0.storage, &header).await?;
        let entries = placed.into_iter().map(|(_, entry)| entry).collect();
        let old = header.valid_bitmaps().map(range_of);
        Ok(AtRest { image: self, entries, old, _still: still })
    }

    /// Waits until nobody changes `range` or is about to change bitmaps, and keeps it so; what is known of
    /// bitmaps is what storage has then.
    pub(in crate::qcow2) async fn still(&self, range: GuestRange) -> Result<Still<'_>> {
        let edits = self.0.bitmap_edits.take().await;
        // Before the turn: a request that runs may be waiting for it.
        let exclusion = self.be_alone(range).await?;
        let turn = self.take_bitmap_turn().await?;
        if self.0.meta.lock().closed {
            return Err(Error::invalid("The image was closed"));
        }
        if self.0.meta.lock().bitmaps.outdated {
            self.reload_bitmaps().await?;
        }
        Ok(Still { turn, exclusion, edits })
    }

    /// Takes note of the directory that storage has. The caller has the turn.
    pub(in crate::qcow2) async fn reload_bitmaps(&self) -> Result<()> {
        self.wait_for_metadata_writes().await;
        let header = super::super::read_header(&self.0.storage).await?;
        let loaded = Bitmaps::load(&self.0.storage, &header).await?;
        let mut meta = self.0.meta.lock();
        let mut known = self.0.header.lock();
        if let Some(old) = known.valid_bitmaps() {
            meta.structures.remove(range_of(old));
        }
        if let Some(new) = header.valid_bitmaps() {
            meta.structures.add(range_of(new), Structure::BitmapDirectory);
        }
        known.extensions = header.extensions.clone();
        let has_any = header.features.autoclear.contains(AutoclearFeatures::BITMAPS);
        known.features.autoclear.set(AutoclearFeatures::BITMAPS, has_any);
        let generation = meta.bitmaps.generation + 1;
        meta.gate.bitmaps = !loaded.is_empty();
        let recordings = std::mem::take(&mut meta.bitmaps.recordings);
        meta.bitmaps = Bitmaps { generation, recordings, ..loaded };
        Ok(())
    }

    /// Changes the header where it lies, durably; returns what storage has then.
    pub(super) async fn change_open_header(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<Header> {
        self.try_change_open_header(change).await?
    }

    /// As [`change_open_header`](Self::change_open_header); the inner error says that nothing was
    /// written, as the first cluster has no room. After the outer one, storage may have either header.
    pub(super) async fn try_change_open_header(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<Result<Header>> {
        let _turn = self.0.turn.take().await;
        self.wait_for_metadata_writes().await;
        // What a change that was dropped has written is what this one begins with, and may be all of it.
        self.sync().await?;
        let change = |header: &mut Header| {
            change(header);
            Ok(())
        };
        let (header, steps) = match header_change::plan(&self.0.storage, change).await {
            Err(error) if error.kind() == ErrorKind::NoSpace => return Ok(Err(error)),
            planned => planned?,
        };
        for step in steps {
            self.write_header_field(HostOffset(step.at as u64), &step.bytes).await?;
        }
        Ok(Ok(header))
    }
}

impl<S: Storage> AtRest<'_, S> {
    /// Has the image name other bitmaps, durably, and gives back what only the old directory named:
    /// itself, and `dropped`.
    pub(super) async fn replace(
        self,
        entries: &[BitmapEntry],
        dropped: Vec<HostRange>,
    ) -> Result<()> {
        let bytes = BitmapEntry::encode_directory(entries)?;
        let clusters = self.image.geometry().clusters_for(bytes.len() as u64);
        if clusters == 0 {
            return self.name(None, dropped).await;
        }
        let at = self.image.plan(|meta| meta.allocate_for_bitmap(clusters)).await?;
        let extension = self.image.write_directory(entries, &bytes, at).await?;
        self.name(Some(extension), dropped).await
    }

    /// Gives the directory a place that ends before cluster `limit`. Returns how many clusters it takes;
    /// none where there is no such place.
    pub(in crate::qcow2) async fn move_below(self, limit: u64) -> Result<u64> {
        let bytes = BitmapEntry::encode_directory(&self.entries)?;
        let clusters = self.image.geometry().clusters_for(bytes.len() as u64);
        let allocate = |meta: &mut Meta| {
            meta.before_any_change()?;
            meta.allocate_below(clusters, limit, &mut 0)
        };
        let Some(at) = self.image.plan(allocate).await? else { return Ok(0) };
        let extension = self.image.write_directory(&self.entries, &bytes, at).await?;
        self.name(Some(extension), Vec::new()).await?;
        Ok(clusters)
    }

    async fn name(
        self,
        extension: Option<BitmapsExtension>,
        dropped: Vec<HostRange>,
    ) -> Result<()> {
        let image = self.image;
        {
            let mut meta = image.0.meta.lock();
            meta.bitmaps.outdated = true;
            meta.gate.bitmaps = true;
        }
        image.change_open_header(|header| header.name_bitmaps(extension)).await?;
        image.reload_bitmaps().await?;
        for range in self.old.into_iter().chain(dropped) {
            image.free_bitmap_range(range).await?;
        }
        Ok(())
    }
}

impl<S: Storage> Image<S> {
    /// Writes a directory to clusters that were allocated, with its refcounts, durably; nothing names it
    /// yet.
    async fn write_directory(
        &self,
        entries: &[BitmapEntry],
        bytes: &[u8],
        directory_offset: HostOffset,
    ) -> Result<BitmapsExtension> {
        let extension = BitmapsExtension {
            count: entries.len() as u32,
            directory_bytes: bytes.len() as u64,
            directory_offset,
        };
        extension.check(&self.geometry())?;
        self.write_bitmap(directory_offset, bytes).await?;
        self.write_back(Refcounting::Written).await?;
        Ok(extension)
    }
}

const fn range_of(extension: BitmapsExtension) -> HostRange {
    HostRange::new(extension.directory_offset, extension.directory_bytes)
}
