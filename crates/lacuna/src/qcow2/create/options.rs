//! What an image is to be like, and which wishes exclude each other.

use super::super::format::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, EntryWidth, FeatureName, Geometry,
    Header, IncompatibleFeatures, MAX_BACKING_NAME_BYTES, MAX_L1_BYTES, StoredName, Version,
};
use super::super::zero_claims;
use crate::block::Preallocation;
use crate::{Error, Result};

/// Sizes of disks are multiples of this many bytes.
const SECTOR_BYTES: u64 = 512;
/// Longest name of a format that fits into the header's extension.
const MAX_FORMAT_BYTES: usize = 15;
/// With a raw data file guest offsets are host offsets, which have 56 bits.
const MAX_RAW_BYTES: u64 = 1 << 56;

/// The name of a backing file as it is to be stored.
///
/// ```
/// use lacuna::qcow2::BackingName;
/// let backing = BackingName { name: "base.img".into(), format: Some("raw".into()) };
/// assert!(backing.format.is_some());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// 1 to 1023 bytes.
    pub name: String,
    /// Its format, at most 15 bytes. Without one, readers would have to guess.
    pub format: Option<String>,
}

impl BackingName {
    /// Refuses names that the format has no room for.
    pub(in crate::qcow2) fn check(&self) -> Result<()> {
        let len = self.name.len();
        if !(1..=MAX_BACKING_NAME_BYTES).contains(&len) {
            return Err(Error::invalid(format!(
                "Backing file name has {len} bytes; 1 to {MAX_BACKING_NAME_BYTES} are allowed"
            )));
        }
        let len = self.format.as_ref().map_or(0, String::len);
        if len > MAX_FORMAT_BYTES {
            return Err(Error::invalid(format!(
                "Name of the backing format has {len} bytes; at most {MAX_FORMAT_BYTES} are \
                 allowed"
            )));
        }
        Ok(())
    }

    /// Makes it the one that a header names.
    pub(in crate::qcow2) fn put_into(&self, header: &mut Header) {
        header.backing_name = Some(StoredName::new(self.name.as_str()));
        header.extensions.backing_format = self.format.as_deref().map(StoredName::from);
    }
}

/// Says that a raw data file would have to hold what a backing file has.
pub(in crate::qcow2) fn raw_excludes_backing() -> Error {
    Error::invalid(
        "A raw external data file and a backing file exclude each other: the raw file \
         would lack what the backing file has",
    )
}

/// The name of an external data file as it is to be stored.
///
/// ```
/// use lacuna::qcow2::DataFileName;
/// let data = DataFileName { name: "disk.raw".into(), raw: true };
/// assert!(data.raw);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// At least one byte.
    pub name: String,
    /// Whether the file is to be a valid raw image by itself at any time.
    pub raw: bool,
}

/// Where the metadata of a preallocated image lies (002-7).
///
/// ```
/// use lacuna::qcow2::PreallocationLayout;
/// assert_eq!(PreallocationLayout::default(), PreallocationLayout::AsQemu);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PreallocationLayout {
    /// Where QEMU puts it: between the data (`metadata`) or on both sides of it.
    #[default]
    AsQemu,
    /// All of it in front, then one run of data: a guest offset and its host offset differ by the
    /// same amount everywhere.
    Contiguous,
}

/// What [`create`](super::create) makes. The default is QEMU's, with a disk of size 0.
///
/// ```
/// use lacuna::qcow2::CreateOptions;
/// let options = CreateOptions { size_bytes: 64 << 20, ..CreateOptions::default() };
/// assert_eq!((options.cluster_bytes, options.refcount_bits), (65536, 16));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size of the disk; rounded up to a multiple of 512 bytes.
    pub size_bytes: u64,
    /// The version of the format.
    pub version: Version,
    /// A power of two from 512 bytes to 2 MiB; at least 16 KiB with extended L2 entries.
    pub cluster_bytes: u64,
    /// Extended L2 entries need version 3.
    pub entry_width: EntryWidth,
    /// A power of two from 1 to 64; version 2 has only 16.
    pub refcount_bits: u32,
    /// zstd needs version 3.
    pub compression: CompressionType,
    /// Whether refcount updates may be put off, which needs version 3.
    pub lazy_refcounts: bool,
    /// Where clusters come from that the image does not have.
    pub backing: Option<BackingName>,
    /// Where guest data goes, if not into the image itself; needs version 3.
    pub data_file: Option<DataFileName>,
    /// What is allocated at once. With a backing file it needs extended L2 entries; a raw data
    /// file has its clusters mapped in any case.
    pub preallocation: Preallocation,
    /// How that is laid out.
    pub preallocation_layout: PreallocationLayout,
    /// Whether the image remembers that discards and zeroing are to keep the places of clusters
    /// ([`OnDiscard::KeepMapping`](crate::qcow2::OnDiscard)), for everybody who opens it here.
    /// Needs version 3.
    pub keep_mapping: bool,
    /// Whether the image says so while it is all zeros, or maps nothing: private bits that stock
    /// tools clear when they write. Needs version 3.
    pub zero_claims: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size_bytes: 0,
            version: Version::V3,
            cluster_bytes: 65536,
            entry_width: EntryWidth::Standard,
            refcount_bits: 16,
            compression: CompressionType::Deflate,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
            preallocation_layout: PreallocationLayout::default(),
            keep_mapping: false,
            zero_claims: false,
        }
    }
}

impl CreateOptions {
    /// Returns the geometry of the image to be.
    ///
    /// # Errors
    /// `InvalidRequest` where cluster size, refcount width or L2 entry width are out of limits.
    pub fn geometry(&self) -> Result<Geometry> {
        let smallest = match self.entry_width {
            EntryWidth::Standard => 512,
            EntryWidth::Extended => 16384,
        };
        let cluster_bytes = self.cluster_bytes;
        if !cluster_bytes.is_power_of_two() || !(smallest..=2 << 20).contains(&cluster_bytes) {
            return Err(Error::invalid(format!(
                "Cluster size is {cluster_bytes} bytes; a power of two from {smallest} to 2 MiB \
                 would be right"
            )));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(Error::invalid(format!(
                "Refcount width is {} bits; a power of two from 1 to 64 would be right",
                self.refcount_bits
            )));
        }
        self.check_version()?;
        let order = self.refcount_bits.trailing_zeros();
        Geometry::new(self.version, cluster_bytes.trailing_zeros(), order, self.entry_width)
    }

    /// Returns the header of the image, as yet without tables.
    pub(super) fn header(&self) -> Result<Header> {
        let geometry = self.geometry()?;
        self.check_names()?;
        self.check_preallocation()?;
        let mut header = Header::new(geometry, self.rounded_size(&geometry)?);
        header.compression = self.compression;
        if self.lazy_refcounts {
            header.features.compatible |= CompatibleFeatures::LAZY_REFCOUNTS;
        }
        if let Some(data) = &self.data_file {
            header.features.incompatible |= IncompatibleFeatures::EXTERNAL_DATA_FILE;
            header.features.autoclear.set(AutoclearFeatures::RAW_EXTERNAL_DATA, data.raw);
            header.extensions.data_file_name = Some(StoredName::new(data.name.as_str()));
        }
        if let Some(backing) = &self.backing {
            backing.put_into(&mut header);
        }
        if self.keep_mapping {
            header.remember_to_keep_mapping();
        }
        if self.zero_claims {
            header.extensions.feature_names.extend(FeatureName::zero_claims());
            header.features.autoclear |= self.true_claims(&header);
        }
        Ok(header)
    }

    /// What was just made reads as zeros; it maps nothing unless it is preallocated.
    fn true_claims(&self, header: &Header) -> AutoclearFeatures {
        let possible = zero_claims::possible(header);
        match self.effective_preallocation() {
            Preallocation::Off => possible,
            _ => possible - AutoclearFeatures::ALL_UNALLOCATED,
        }
    }

    fn check_version(&self) -> Result<()> {
        if self.version >= Version::V3 {
            return Ok(());
        }
        let wishes = [
            (self.refcount_bits != 16, "refcounts of another width than 16 bits"),
            (self.entry_width == EntryWidth::Extended, "extended L2 entries"),
            (self.compression != CompressionType::Deflate, "zstd compression"),
            (self.lazy_refcounts, "lazy refcounts"),
            (self.data_file.is_some(), "an external data file"),
            (self.zero_claims, "claims of being all zero"),
            (self.keep_mapping, "clusters that read as zeros and keep their place"),
        ];
        match wishes.iter().find(|(wished, _)| *wished) {
            None => Ok(()),
            Some((_, what)) => Err(Error::invalid(format!(
                "Version 2 (compat=0.10) cannot have {what}; version 3 (compat=1.1) can"
            ))),
        }
    }

    fn check_names(&self) -> Result<()> {
        if let Some(backing) = &self.backing {
            backing.check()?;
        }
        match (&self.data_file, &self.backing) {
            (Some(data), _) if data.name.is_empty() => {
                Err(Error::invalid("Name of the external data file is empty"))
            }
            (Some(data), Some(_)) if data.raw => Err(raw_excludes_backing()),
            _ => Ok(()),
        }
    }

    /// Returns what is allocated: a raw data file is mapped from the start.
    pub(super) fn effective_preallocation(&self) -> Preallocation {
        let raw = self.data_file.as_ref().is_some_and(|data| data.raw);
        self.preallocation.max(if raw { Preallocation::Metadata } else { Preallocation::Off })
    }

    fn check_preallocation(&self) -> Result<()> {
        if self.preallocation_layout == PreallocationLayout::Contiguous
            && self.effective_preallocation() == Preallocation::Off
        {
            return Err(Error::invalid(
                "A contiguous layout is one of preallocated clusters: metadata, falloc or full \
                 preallocation would be right",
            ));
        }
        let hides = self.backing.is_some() && self.entry_width == EntryWidth::Standard;
        match self.preallocation {
            Preallocation::Off => Ok(()),
            _ if !hides => Ok(()),
            _ => Err(Error::invalid(
                "Preallocated clusters would hide the backing file; with extended L2 entries they \
                 do not",
            )),
        }
    }

    fn rounded_size(&self, geometry: &Geometry) -> Result<u64> {
        let most = (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage_bytes());
        let raw = self.data_file.as_ref().is_some_and(|data| data.raw);
        let most = if raw { most.min(MAX_RAW_BYTES) } else { most };
        self.size_bytes
            .checked_next_multiple_of(SECTOR_BYTES)
            .filter(|size| *size <= most)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "A disk of {} bytes is too large; clusters of {} bytes allow {most}{}",
                    self.size_bytes,
                    self.cluster_bytes,
                    if geometry.cluster_bits() < 21 { ", larger ones more" } else { "" }
                ))
            })
    }
}
