//! Claims about the whole disk in private autoclear bits: all zero, all unallocated (A.1.2).
//!
//! * Always: a claim is off, durably, before the first byte or mapping that would make it a lie.
//!   If it cannot be taken off, the write fails.
//! * Always: a claim is put up as the last step, while nothing can change the disk.
//! * Never: a claim is put into an image whose creator did not ask for them.
//! * Never: a bit is believed that the image's own table of names calls something else.

use super::format::{AutoclearFeatures, FeatureName, FeatureWord, Header, L2Entry, Version};
use super::image::Image;
use super::meta::Meta;
use super::need::{Need, Planned};
use crate::Result;
use crate::block::{KnownZeroes, Layer, ZeroFlags};
use crate::storage::Storage;

/// Returns the claims that an image may carry at all (000-2).
///
/// Data in a file of its own can be changed by somebody who never sees the bits.
pub(super) fn possible(header: &Header) -> AutoclearFeatures {
    if header.geometry.version() == Version::V2 || header.encryption().is_some() {
        return AutoclearFeatures::empty();
    }
    let claims = match header.backing_name.is_some() || header.has_external_data_file() {
        true => AutoclearFeatures::ALL_UNALLOCATED,
        false => AutoclearFeatures::ZERO_CLAIMS,
    };
    claims - named_otherwise(header)
}

/// Returns the autoclear bits to which the image gives names that are not ours: the bits are
/// private, and a later format may mean something else by them (A.1.3).
fn named_otherwise(header: &Header) -> AutoclearFeatures {
    let ours = FeatureName::zero_claims();
    let foreign = header.extensions.feature_names.iter().filter(|name| !ours.contains(name));
    foreign
        .filter(|name| name.word == FeatureWord::AUTOCLEAR)
        .filter_map(|name| 1_u64.checked_shl(u32::from(name.bit)))
        .fold(AutoclearFeatures::empty(), |all, bit| all | AutoclearFeatures::from_bits_retain(bit))
}

/// Says whether the image's creator asked for claims: their names stand in the image.
pub(super) fn are_wanted(header: &Header) -> bool {
    let wanted = FeatureName::zero_claims();
    header.extensions.feature_names.iter().any(|name| wanted.contains(name))
}

impl Header {
    /// Returns what the image says of its whole disk, as far as it can be believed (000-2).
    #[must_use]
    pub fn zero_claims(&self) -> AutoclearFeatures {
        self.features.autoclear & possible(self)
    }
}

impl Meta {
    /// Asks for what must come before guest data is written or linked.
    pub(super) fn before_data(&self) -> Planned<()> {
        self.without_claims(AutoclearFeatures::ZERO_CLAIMS)
    }

    /// Asks for what must come before a cluster gets a mapping, be it to zeros.
    pub(super) fn before_mapping(&self, entry: L2Entry) -> Planned<()> {
        match entry == L2Entry::UNALLOCATED {
            true => Ok(()),
            false => self.without_claims(AutoclearFeatures::ALL_UNALLOCATED),
        }
    }

    fn without_claims(&self, claims: AutoclearFeatures) -> Planned<()> {
        match self.claims.intersects(claims) {
            true => Err(Need::DropClaims(claims).into()),
            false => Ok(()),
        }
    }

    /// Says whether no cluster can have a mapping.
    fn maps_nothing(&self) -> bool {
        self.claims.contains(AutoclearFeatures::ALL_UNALLOCATED)
            || self.l1.entries.iter().all(|entry| entry.table().is_none())
    }
}

impl<S: Storage> Image<S> {
    /// Takes claims off, durably.
    pub(super) async fn drop_claims(&self, claims: AutoclearFeatures) -> Result<()> {
        let _turn = self.0.turn.take().await;
        if self.0.meta.lock().claims.intersects(claims) {
            self.change_features(|features| features.autoclear.remove(claims)).await?;
            self.0.meta.lock().claims.remove(claims);
        }
        Ok(())
    }

    /// Returns what is known without looking at more than the L1 table (000-5, 000-9).
    pub(super) async fn zeroes_known(&self) -> Result<KnownZeroes> {
        let (is_zero, maps_nothing, size) = {
            let meta = self.0.meta.lock();
            let is_zero = meta.claims.contains(AutoclearFeatures::ALL_ZERO);
            (is_zero, meta.maps_nothing(), meta.size_bytes)
        };
        let Some(backing) = &self.0.backing else {
            let external = self.0.header.lock().has_raw_external_data();
            let open = (is_zero || maps_nothing) && !external;
            return Ok(KnownZeroes { create: !external, truncate: true, open });
        };
        let open = maps_nothing && backing.known_zeroes_boxed().await?.open;
        Ok(KnownZeroes { create: false, truncate: backing.size() <= size, open })
    }

    /// Makes the whole disk read as zeros, giving its space back. Nothing is done where that is
    /// known already (000-15). Durable when it returns.
    ///
    /// Where the image's creator asked for it, the image says afterwards that it is all zeros.
    ///
    /// # Errors
    /// As for writing zeroes.
    pub async fn make_zero(&self) -> Result<()> {
        if self.zeroes_known().await?.open {
            return Ok(());
        }
        self.write_zeroes(self.whole(), ZeroFlags::MAY_UNMAP | ZeroFlags::FUA).await?;
        self.claim_zero().await
    }

    /// Puts the claim up that the disk is all zeros, where it may be and still is.
    async fn claim_zero(&self) -> Result<()> {
        let claim = AutoclearFeatures::ALL_ZERO;
        let may = {
            let header = self.0.header.lock();
            are_wanted(&header) && possible(&header).contains(claim)
        };
        if !may {
            return Ok(());
        }
        // Nobody writes while this is held; who waits plans anew and finds the claim.
        let whole = self.whole();
        let _hold = self.exclude_others(whole).await?;
        if !self.reads_zero(whole).await? {
            return Ok(());
        }
        self.flush_all().await?;
        let _turn = self.0.turn.take().await;
        if !self.claim_in_memory(claim, whole.len) {
            return Ok(());
        }
        self.change_features(|features| features.autoclear.insert(claim)).await
    }

    /// Puts the claims up that may be of a disk that maps nothing, where it does and they are wanted.
    pub(super) async fn claim_empty(&self) -> Result<()> {
        let claims = {
            let header = self.0.header.lock();
            if are_wanted(&header) { possible(&header) } else { AutoclearFeatures::empty() }
        };
        let whole = self.whole();
        let _hold = self.exclude_others(whole).await?;
        if claims.is_empty() || !self.0.meta.lock().maps_nothing() {
            return Ok(());
        }
        self.flush_all().await?;
        let _turn = self.0.turn.take().await;
        if !self.claim_in_memory(claims, whole.len) {
            return Ok(());
        }
        self.change_features(|features| features.autoclear.insert(claims)).await
    }

    /// Has writers drop the claim from here on. Not where the disk has another size by now: what
    /// it grew by was not kept from them.
    fn claim_in_memory(&self, claim: AutoclearFeatures, size_bytes: u64) -> bool {
        let mut meta = self.0.meta.lock();
        if meta.size_bytes != size_bytes {
            return false;
        }
        meta.claims.insert(claim);
        true
    }
}
