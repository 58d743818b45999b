//! Changing what an image is: version, refcount width, lazy refcounts, names, private claims.
//!
//! | step | what | a crash in it leaves |
//! |---|---|---|
//! | 1 | a downgrade: zero clusters, those of snapshots too, become bytes, or nothing where nothing lies below | the image, reading the same; leaks at worst |
//! | 2 | the image is closed, for all clones | as closing does |
//! | 3 | the header with all that fits into the version it has or is to have | the old header or the new one |
//! | 4 | refcounts of another width, behind everything; one sector switches to them | the old or the new ones |
//! | 5 | a downgrade: the header of version 2 | the old header or the new one |
//!
//! * Always: what was asked for is checked before anything changes.
//! * Always: a claim is put up only after a walk over the map has proved it, with the image closed
//!   to changes (A.1.2).

mod prove;
mod refcount_width;
mod snapshot_zeros;
mod zeros;

use super::format::{
    AutoclearFeatures, CompatibleFeatures, Extensions, FeatureName, Features, Geometry, Header,
    IncompatibleFeatures, StoredName, Version,
};
use super::header_change::change_header;
use super::image::Image;
use super::zero_claims;
use crate::storage::Storage;
use crate::{Error, Result};

/// What is to become of an image; nothing stays as it is.
///
/// ```
/// use lacuna::qcow2::AmendOptions;
/// let options = AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() };
/// assert!(options.version.is_none());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// The version of the format. Version 2 has no features, no data file, no bitmaps, and refcounts
    /// of 16 bits.
    pub version: Option<Version>,
    /// Whether refcount updates may be put off; version 3.
    pub lazy_refcounts: Option<bool>,
    /// A power of two from 1 to 64; in version 2 only 16.
    pub refcount_bits: Option<u32>,
    /// Another name for the data file, of an image that has one; an empty one is left out.
    pub data_file: Option<String>,
    /// Whether the data file is a valid raw image by itself. That can be taken back, not promised.
    pub data_file_raw: Option<bool>,
    /// Whether the image says so while it is all zeros, or maps nothing. Put up is what a walk over
    /// the map finds to be true.
    pub zero_claims: Option<bool>,
}

impl<S: Storage> Image<S> {
    /// Closes the image and changes what it is. Durable when it returns; a guest reads the same.
    ///
    /// `progress` is told how much is done, of how much: bytes of the disk for a downgrade, clusters
    /// of the file for another refcount width.
    ///
    /// # Errors
    /// `InvalidRequest` or `Unsupported` for what the image cannot become, before anything changes
    /// but for a width that some refcount does not fit into; else what reading, writing and closing give. Whatever failed, the image is valid.
    ///
    /// ```
    /// use lacuna::qcow2::{Access, AmendOptions, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::qcow2::format::Header;
    /// use lacuna::storage::MemoryStorage;
    /// use std::sync::Arc;
    ///
    /// pollster::block_on(async {
    ///     let storage = Arc::new(MemoryStorage::new());
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    ///     let parts = Parts::alone(Arc::clone(&storage));
    ///     let image = Image::open(parts, OpenOptions::new(Access::ReadWrite)).await?;
    ///     let options = AmendOptions { refcount_bits: Some(64), ..AmendOptions::default() };
    ///     image.amend(&options, &mut |_, _| ()).await?;
    ///     assert_eq!(Header::decode(&storage.to_vec())?.geometry.refcount_order(), 6);
    ///     Ok::<_, lacuna::Error>(())
    /// }).unwrap();
    /// ```
    pub async fn amend(
        self,
        options: &AmendOptions,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<()> {
        self.check_writable()?;
        let old = self.header();
        options.check(&old)?;
        let version = old.geometry.version();
        let falls = options.version == Some(Version::V2) && version == Version::V3;
        if falls {
            self.check_downgrade(&old).await?;
            self.expand_zeros(progress).await?;
            self.expand_zeros_of_snapshots(&old).await?;
        }
        self.clone().close().await?;
        let claims = match options.zero_claims {
            Some(true) => self.true_claims(&old).await?,
            _ => AutoclearFeatures::empty(),
        };
        let storage = self.storage();
        let now = change_header(storage, |header| options.apply(header, claims)).await?;
        let order = options.refcount_bits.map(u32::trailing_zeros);
        if let Some(order) = order.filter(|order| *order != now.geometry.refcount_order()) {
            refcount_width::change(storage, &now, order, progress).await?;
        }
        if falls {
            change_header(storage, downgrade).await?;
        }
        Ok(())
    }
}

impl AmendOptions {
    /// Refuses what the image cannot become.
    fn check(&self, header: &Header) -> Result<()> {
        let version = self.version.unwrap_or_else(|| header.geometry.version());
        let bits = self.refcount_bits.unwrap_or_else(|| 1 << header.geometry.refcount_order());
        let external = header.has_external_data_file();
        let is_lazy = self.lazy_refcounts == Some(true);
        let problem = match () {
            () if !bits.is_power_of_two() || bits > 64 => {
                "Refcounts have 1, 2, 4, 8, 16, 32 or 64 bits"
            }
            () if version == Version::V2 && bits != 16 => {
                "Version 2 (compat=0.10) has refcounts of 16 bits only"
            }
            () if version == Version::V2 && is_lazy => {
                "Version 2 (compat=0.10) has no lazy refcounts"
            }
            () if version == Version::V2 && self.zero_claims == Some(true) => {
                "Version 2 (compat=0.10) has no bits to claim with"
            }
            () if version == Version::V2 && external => {
                "Version 2 (compat=0.10) has no external data file"
            }
            () if !external && self.data_file.is_some() => {
                "The image has no external data file that could have another name"
            }
            () if self.data_file_raw == Some(true) && !header.has_raw_external_data() => {
                "That the data file is a raw image cannot be promised afterwards"
            }
            () => return Ok(()),
        };
        Err(Error::invalid(problem))
    }

    /// Changes a header as far as that needs no other tables.
    fn apply(&self, header: &mut Header, claims: AutoclearFeatures) -> Result<()> {
        if self.version == Some(Version::V3) {
            let old = header.geometry;
            let (bits, order) = (old.cluster_bits(), old.refcount_order());
            header.geometry = Geometry::new(Version::V3, bits, order, old.entry_width())?;
        }
        let features = &mut header.features;
        if let Some(lazy) = self.lazy_refcounts {
            features.compatible.set(CompatibleFeatures::LAZY_REFCOUNTS, lazy);
        }
        if let Some(raw) = self.data_file_raw {
            features.autoclear.set(AutoclearFeatures::RAW_EXTERNAL_DATA, raw);
        }
        if let Some(name) = &self.data_file {
            let name = Some(StoredName::new(name.as_str())).filter(|name| !name.is_empty());
            header.extensions.data_file_name = name;
        }
        if let Some(wanted) = self.zero_claims {
            want_claims(header, wanted);
            header.features.autoclear |= claims;
        }
        Ok(())
    }
}

/// Notes whether an image is to carry claims. None is up afterwards.
fn want_claims(header: &mut Header, wanted: bool) {
    let names = FeatureName::zero_claims();
    header.features.autoclear -= AutoclearFeatures::ZERO_CLAIMS;
    header.extensions.feature_names.retain(|name| !names.contains(name));
    if wanted {
        header.extensions.feature_names.extend(names);
    }
    debug_assert_eq!(zero_claims::are_wanted(header), wanted, "the names are the wish");
}

/// Makes a header one of version 2.
fn downgrade(header: &mut Header) -> Result<()> {
    let old = header.geometry;
    let (bits, order) = (old.cluster_bits(), old.refcount_order());
    header.geometry = Geometry::new(Version::V2, bits, order, old.entry_width())?;
    header.features = Features::default();
    header.unknown_fields = Vec::new();
    let Extensions { feature_names, .. } = &mut header.extensions;
    feature_names.clear();
    Ok(())
}

/// Returns incompatible features that version 2 lacks.
fn beyond_version_2(header: &Header) -> IncompatibleFeatures {
    let mut features = header.features.incompatible - IncompatibleFeatures::DIRTY;
    features.set(IncompatibleFeatures::EXTENDED_L2, header.geometry.has_subclusters());
    features
}
