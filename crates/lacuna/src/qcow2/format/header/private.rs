//! What of a header is private to this engine: `docs/private-bits.md`.

use super::super::extension::{BITMAP_INTENTS, place_of};
use super::super::features::{AutoclearFeatures, FeatureName};
use super::super::geometry::Version;
use super::Header;
use crate::units::{HostOffset, HostRange};

/// Where the header says how long it is (version 3).
const LENGTH_AT: std::ops::Range<usize> = 100..104;

impl Header {
    /// Says whether discards and zeroing are to keep the places of clusters, as the image remembers
    /// (version 3).
    #[must_use]
    pub fn keeps_mapping(&self) -> bool {
        self.geometry.version() == Version::V3 && self.extensions.keep_mapping()
    }

    /// Has the image remember to keep places, and say that so far everybody did.
    pub(crate) fn remember_to_keep_mapping(&mut self) {
        self.extensions.set_keep_mapping();
        self.extensions.feature_names.push(FeatureName::mapping_kept());
        self.features.autoclear |= AutoclearFeatures::MAPPING_KEPT;
    }

    /// Says whether bitmaps that were left in use can be recovered by what the header says: the bit
    /// is set, the image calls it by no other name, and they are there.
    pub(crate) fn keeps_bitmap_intents(&self) -> bool {
        let bit = AutoclearFeatures::BITMAP_INTENTS;
        self.features.autoclear.contains(bit)
            && self.may_keep_bitmap_intents()
            && self.extensions.bitmap_intents().is_some()
    }

    /// Says whether the bit can be set.
    pub(crate) fn may_keep_bitmap_intents(&self) -> bool {
        let ours = FeatureName::bitmap_intents();
        let is_other = |name: &FeatureName| {
            (name.word, name.bit) == (ours.word, ours.bit) && name.name != ours.name
        };
        self.geometry.version() == Version::V3
            && !self.extensions.feature_names.iter().any(is_other)
    }

    /// Has the header keep intents of bitmaps.
    pub(crate) fn put_bitmap_intents(&mut self, data: Vec<u8>) {
        let name = FeatureName::bitmap_intents();
        if !self.extensions.feature_names.contains(&name) {
            self.extensions.feature_names.push(name);
        }
        self.extensions.set_bitmap_intents(data);
        self.features.autoclear |= AutoclearFeatures::BITMAP_INTENTS;
    }

    /// Returns where the intents of bitmaps lie in the first cluster of an image.
    pub(crate) fn place_of_bitmap_intents(first_cluster: &[u8]) -> Option<HostRange> {
        let length = first_cluster.get(LENGTH_AT)?;
        let start = u32::from_be_bytes(length.try_into().ok()?) as usize;
        let found = place_of(first_cluster.get(start..)?, BITMAP_INTENTS)?;
        let offset = HostOffset(start.checked_add(found.start)? as u64);
        Some(HostRange::new(offset, found.len() as u64))
    }
}
