//! Bitmaps that a crash left in use, and the intents that keep them from missing what changed.
//!
//! | step | what is durable | what a crash right after it leaves |
//! |---|---|---|
//! | 1 | an extension with no intent, and its autoclear bit | bitmaps as stored |
//! | 2 | every enabled bitmap is marked in use | the same, recovered as they are stored |
//! | 3 | an intent for each region, before anything changes there | bitmaps that name these regions too |
//! | 4 | what was marked is stored, intents and marks of use are taken off | bitmaps as stored |
//!
//! * Always: when the image is opened to write, bitmaps that were left in use are stored with all
//!   regions that have an intent, in one step, before anything else.
//! * Never: an intent is written for an image with a bitmap that somebody else left in use, for that
//!   would be believed afterwards.

use std::ops::Range;

use super::super::format::{AutoclearFeatures, BitmapFlags, Header};
use super::super::image::Image;
use super::intents::{self, Intents};
use super::merge::Ranges;
use super::{Bitmaps, Tracked, add_bits, directory, set_bits};
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::{ErrorKind, Result};

/// Reads the intents of an image; none where it keeps none.
pub(super) async fn load_intents<S: Storage>(storage: &S, header: &Header) -> Result<Intents> {
    let data = header.extensions.bitmap_intents().filter(|_| header.keeps_bitmap_intents());
    let Some(data) = data else { return Ok(Intents::default()) };
    let cluster = Buffer::new(header.geometry.cluster_bytes() as usize);
    let (result, cluster) = storage.read_at(HostOffset(0), cluster).await;
    result.map_err(|error| error.context("Reading the header"))?;
    let place = Header::place_of_bitmap_intents(&cluster);
    Ok(place.and_then(|place| Intents::new(place, data)).unwrap_or_default())
}

impl Bitmaps {
    /// Finds the bitmaps that were left in use and can be read all the same, for an image that is
    /// only read. What cannot be read is told to whoever asks for it.
    pub(in crate::qcow2) async fn left_in_use<S: Storage>(storage: &S, header: &Header) -> Self {
        let mut found = Self::default();
        let Ok(intents) = load_intents(storage, header).await else { return found };
        if !intents.are_kept() {
            return found;
        }
        for (at, entry) in directory(storage, header).await.unwrap_or_default() {
            let used = BitmapFlags::IN_USE | BitmapFlags::AUTO;
            if entry.flags.contains(used) && entry.extra_data.is_empty() {
                found.tracked.push(Tracked::new(at, entry, header));
            }
        }
        Self { intents, left: true, ..found }
    }
}

impl Tracked {
    /// Returns the guest range of some chunks.
    fn range_of(&self, chunks: &Range<u64>) -> Range<u64> {
        let start = |chunk: u64| {
            let bits = u128::from(chunk) * u128::from(self.chunk_bits);
            u64::try_from(bits << self.entry.granularity_bits).unwrap_or(u64::MAX)
        };
        start(chunks.start)..start(chunks.end)
    }

    /// Returns the first of some chunks in which a region has an intent.
    pub(super) fn first_left(&self, intents: &Intents, chunks: &Range<u64>) -> Option<u64> {
        let range = self.range_of(chunks);
        let first = intents.first_in(range.start, range.end)?;
        Some((first.start.0 >> self.entry.granularity_bits) / self.chunk_bits)
    }

    /// Adds the regions with an intent to a part of a chunk that starts at byte `from` of it.
    pub(super) fn add_left(&self, intents: &Intents, chunk: u64, from: usize, bytes: &mut [u8]) {
        let first_bit = chunk * self.chunk_bits + from as u64 * 8;
        let end_bit = first_bit + bytes.len() as u64 * 8;
        let bound =
            |bit: u64| bit.checked_shl(self.entry.granularity_bits.into()).unwrap_or(u64::MAX);
        let (mut at, end) = (bound(first_bit), bound(end_bit));
        let mut left = vec![0; bytes.len()];
        while let Some(range) = intents.first_in(at, end) {
            let first = (range.start.0 >> self.entry.granularity_bits) - first_bit;
            let last = ((range.end().0 - 1) >> self.entry.granularity_bits) - first_bit;
            set_bits(&mut left, first, last);
            at = range.end().0;
        }
        add_bits(bytes, &left);
    }
}

impl<S: Storage> Image<S> {
    /// Has the image keep intents, or no longer say that it does. The caller has the turn, and no
    /// bitmap is in use by us.
    pub(super) async fn prepare_intents(&self) -> Result<()> {
        let (fits, may) = {
            let meta = self.0.meta.lock();
            let header = self.0.header.lock();
            let cluster_bytes = header.geometry.cluster_bytes();
            let may = self.0.bitmap_intents
                && !meta.bitmaps.has_stale
                && !meta.bitmaps.is_empty()
                && header.may_keep_bitmap_intents();
            (meta.bitmaps.intents.fit(meta.size_bytes, cluster_bytes), may)
        };
        match (may, fits) {
            (true, true) => Ok(()),
            (true, false) => self.begin_intents().await,
            (false, _) => self.end_intents().await,
        }
    }

    async fn begin_intents(&self) -> Result<()> {
        let size_bytes = self.0.meta.lock().size_bytes;
        let data = intents::empty(size_bytes, self.geometry().cluster_bytes());
        {
            let bitmaps = &mut self.0.meta.lock().bitmaps;
            (bitmaps.intents, bitmaps.intents_unsure) = (Intents::default(), true);
        }
        let changed = self.try_change_open_header(|it| it.put_bitmap_intents(data)).await?;
        // Without room a crash leaves the bitmaps in use.
        let Ok(header) = changed else { return self.end_intents().await };
        let intents = load_intents(&self.0.storage, &header).await?;
        let mut meta = self.0.meta.lock();
        let mut known = self.0.header.lock();
        known.features.autoclear |= AutoclearFeatures::BITMAP_INTENTS;
        known.extensions = header.extensions;
        (meta.bitmaps.intents, meta.bitmaps.intents_unsure) = (intents, false);
        Ok(())
    }

    async fn end_intents(&self) -> Result<()> {
        let bit = AutoclearFeatures::BITMAP_INTENTS;
        let may_be_set = {
            let mut meta = self.0.meta.lock();
            meta.bitmaps.intents = Intents::default();
            meta.bitmaps.intents_unsure || self.0.header.lock().features.autoclear.contains(bit)
        };
        if may_be_set {
            self.change_features(|features| features.autoclear.remove(bit)).await?;
            self.0.meta.lock().bitmaps.intents_unsure = false;
        }
        Ok(())
    }

    /// Writes the intents that somebody waits for.
    pub(in crate::qcow2) async fn write_intents(&self) -> Result<()> {
        let _turn = self.take_bitmap_turn().await?;
        let is_clearing = self.0.meta.lock().bitmaps.intents.is_clearing;
        if is_clearing {
            // What was dropped half-way must not take back what is written now.
            self.wait_for_metadata_writes().await;
        }
        let mut batch = self.0.meta.lock().bitmaps.intents.batch();
        let pieces = std::mem::take(&mut batch.pieces);
        if pieces.is_empty() {
            return Ok(());
        }
        for (offset, bytes) in pieces {
            self.write_bytes(offset, &bytes).await?;
        }
        self.sync().await?;
        self.0.meta.lock().bitmaps.intents.written(batch);
        Ok(())
    }

    /// Has storage forget the intents; durable with the next flush.
    pub(super) async fn clear_intents(&self) -> Result<()> {
        let pieces = self.0.meta.lock().bitmaps.intents.clear();
        for (offset, bytes) in pieces {
            self.write_bytes(offset, &bytes).await?;
        }
        Ok(())
    }

    /// Stores bitmaps that a crash of ours left in use, with every region that may have changed.
    /// Where there is no room for that, they stay in use and are not believed any more.
    pub(in crate::qcow2) async fn recover_bitmaps(&self) -> Result<()> {
        let is_left = {
            let meta = self.0.meta.lock();
            meta.writable && meta.bitmaps.has_stale && meta.bitmaps.intents.are_kept()
        };
        if !is_left {
            return Ok(());
        }
        match self.store_left_bitmaps().await {
            Err(error) if error.kind() == ErrorKind::NoSpace => self.end_intents().await,
            result => result,
        }
    }

    async fn store_left_bitmaps(&self) -> Result<()> {
        let mut rest = self.bitmaps_at_rest().await?;
        let size_bytes = self.size();
        let regions = self.0.meta.lock().bitmaps.intents.regions(size_bytes);
        let mut dropped = Vec::new();
        for entry in &mut rest.entries {
            if !entry.flags.contains(BitmapFlags::IN_USE | BitmapFlags::AUTO) {
                continue;
            }
            // What is broken stays in use, and is no longer believed below.
            let Ok(old) = self.bitmap_ranges(entry).await else { continue };
            let ranges: Ranges<S> = Ranges::Listed(regions.clone().into_iter());
            let table = self.merged_table(entry, ranges).await?;
            let settled = entry.flags - BitmapFlags::IN_USE;
            dropped.extend(super::edit::no_longer_named(old, entry, &table, &self.geometry()));
            *entry = self.write_table(entry, &table).await?;
            entry.flags = settled;
        }
        let has_stale = rest.entries.iter().any(|it| it.flags.contains(BitmapFlags::IN_USE));
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, dropped).await?;
        match has_stale {
            true => self.end_intents().await,
            false => {
                self.clear_intents().await?;
                self.sync().await?;
                self.0.meta.lock().bitmaps.intents.is_clearing = false;
                Ok(())
            }
        }
    }
}

impl Intents {
    /// Returns the regions that have an intent.
    fn regions(&self, size_bytes: u64) -> Vec<GuestRange> {
        let mut regions = Vec::new();
        let mut at = GuestOffset(0);
        while let Some(range) = self.first_in(at.0, size_bytes) {
            at = range.end();
            regions.push(range);
        }
        regions
    }
}
