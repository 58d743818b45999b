//! The header in the first cluster (B.1).
//!
//! | byte | size | field | | byte | size | field (version 3) |
//! |---|---|---|---|---|---|---|
//! | 0 | 4 | magic `QFI\xfb` | | 72 | 8 | incompatible features |
//! | 4 | 4 | version: 2, 3 | | 80 | 8 | compatible features |
//! | 8, 16 | 8, 4 | backing file name: offset, bytes | | 88 | 8 | autoclear features |
//! | 20 | 4 | cluster bits: 9 to 21 | | 96 | 4 | refcount order: 0 to 6 |
//! | 24 | 8 | size of the disk in bytes | | 100 | 4 | header length: 104, 112 … |
//! | 32 | 4 | encryption: 0, 1 AES, 2 LUKS | | 104 | 1 | compression: 0 deflate, 1 zstd |
//! | 36, 40 | 4, 8 | L1 table: entries, offset | | 105 | 7 | zero |
//! | 48, 56 | 8, 4 | refcount table: offset, clusters | | 112 | | unknown fields, kept |
//! | 60, 64 | 4, 8 | snapshot table: entries, offset | | | | |
//!
//! Then the extensions, then the backing file name, all in the first cluster.
//!
//! * Always: what was decoded is within every limit of B.1; what is encoded was checked again.
//! * Always: encoding gives the bytes that QEMU gives for the same facts; unknown header fields
//!   and extensions survive.
//! * Never: an unknown incompatible bit is decoded. Whether a corrupt, dirty or encrypted image may
//!   be opened is the engine's decision: those decode.

mod limits;
mod location;
mod placed;
mod private;

use std::borrow::Cow;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) use self::limits::check_table;
pub use self::location::{L1Location, RefcountTableLocation, SnapshotTableLocation};
pub(crate) use self::placed::{Placed, SECTOR, shown_parts};
use super::extension::{self, Extensions, Surroundings};
use super::features::{AutoclearFeatures, CompatibleFeatures, Features, IncompatibleFeatures};
use super::geometry::{EntryWidth, Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, Version};
use super::name::StoredName;
use crate::units::HostOffset;
use crate::{Error, Result};

/// The first four bytes of every image: `QFI\xfb`.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name of a backing file in bytes (B.11).
pub const MAX_BACKING_NAME_BYTES: usize = 1023;
/// Largest L1 table in bytes (B.11).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (B.11).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots (B.9).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Header length of version 2.
const V2_BYTES: usize = 72;
/// Header length of the first version 3 images, without a compression type.
const V3_LEAST_BYTES: usize = 104;
/// Header length that QEMU writes.
const V3_BYTES: usize = 112;

/// How guest data is compressed.
///
/// ```
/// assert_ne!(lacuna::qcow2::format::CompressionType::Deflate, lacuna::qcow2::format::CompressionType::Zstd);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Raw deflate streams; QEMU calls it zlib.
    #[default]
    Deflate,
    /// zstd frames; only in version 3.
    Zstd,
}

/// How guest data is encrypted. Recognised and described, not decrypted.
///
/// ```
/// assert_ne!(lacuna::qcow2::format::Encryption::Aes, lacuna::qcow2::format::Encryption::Luks);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encryption {
    /// AES-CBC with a plain key, the legacy way.
    Aes,
    /// A LUKS header in the image; [`Extensions::encryption_header`] says where.
    Luks,
}

/// The header of an image with its extensions and the name of the backing file.
///
/// Fields may be changed freely; [`encode`](Self::encode) checks them like decoding does. The
/// incompatible bits for extended L2 entries and the compression type follow the
/// [`geometry`](Self::geometry) and [`compression`](Self::compression) when encoded.
///
/// ```
/// use lacuna::qcow2::format::{EntryWidth, Geometry, Header, RefcountTableLocation, Version};
/// use lacuna::units::HostOffset;
///
/// let geometry = Geometry::new(Version::V3, 16, 4, EntryWidth::Standard)?;
/// let mut header = Header::new(geometry, 0);
/// header.refcount_table = RefcountTableLocation { offset: HostOffset(0x10000), clusters: 1 };
/// let bytes = header.encode()?;
/// assert_eq!(Header::peek_cluster_bytes(&bytes)?, 65536);
/// assert_eq!(Header::decode(&bytes)?.size_bytes, 0);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size, refcount width and L2 entry width.
    pub geometry: Geometry,
    /// The size of the disk in bytes; any value, although QEMU rounds it down to 512.
    pub size_bytes: u64,
    /// How guest data is encrypted, if it is.
    pub encryption: Option<Encryption>,
    /// The active L1 table.
    pub l1: L1Location,
    /// The refcount table.
    pub refcount_table: RefcountTableLocation,
    /// The snapshot table.
    pub snapshots: SnapshotTableLocation,
    /// The feature words.
    pub features: Features,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// The bytes from 112 to the end of the header: fields of a later version of the format.
    pub unknown_fields: Vec<u8>,
    /// The header extensions.
    pub extensions: Extensions,
    /// The name of the backing file, not empty; at most 1023 bytes.
    pub backing_name: Option<StoredName>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    backing_name_offset: U64,
    backing_name_bytes: U32,
    cluster_bits: U32,
    size_bytes: U64,
    encryption: U32,
    l1_entries: U32,
    l1_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshot_count: U32,
    snapshots_offset: U64,
}
const _: () = assert!(size_of::<RawHeader>() == V2_BYTES);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeaderV3 {
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_bytes: U32,
    compression: u8,
    padding: [u8; 7],
}
const _: () = assert!(size_of::<RawHeaderV3>() == V3_BYTES - V2_BYTES);

/// What of the header a reader insists on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Demand {
    /// An image that can be worked with.
    Usable,
    /// An image that can be checked: the refcount table may be lost.
    Checkable,
}

/// Where the parts of the first cluster lie.
struct Areas {
    header_bytes: usize,
    extensions_end: usize,
    backing_name: Option<StoredName>,
}

impl Header {
    /// Makes the header of an image without tables, features or backing file.
    #[must_use]
    pub fn new(geometry: Geometry, size_bytes: u64) -> Self {
        Self {
            geometry,
            size_bytes,
            encryption: None,
            l1: L1Location::default(),
            refcount_table: RefcountTableLocation::default(),
            snapshots: SnapshotTableLocation::default(),
            features: Features::default(),
            compression: CompressionType::Deflate,
            unknown_fields: Vec::new(),
            extensions: Extensions::default(),
            backing_name: None,
        }
    }

    /// Returns the cluster size in bytes, which is how much [`decode`](Self::decode) wants to see,
    /// from the first 24 bytes or more of an image.
    ///
    /// # Errors
    /// `Corrupt` where this is no qcow2 image or the size is outside of 512 bytes to 2 MiB;
    /// `Unsupported` for another version than 2 and 3.
    pub fn peek_cluster_bytes(bytes: &[u8]) -> Result<u64> {
        let mut start = [0; V2_BYTES];
        for (place, byte) in start.iter_mut().zip(bytes) {
            *place = *byte;
        }
        let raw: RawHeader = zerocopy::transmute!(start);
        if raw.magic != MAGIC {
            return Err(Error::corrupt(format!(
                "Not a qcow2 image: starts with {:02x?}, {MAGIC:02x?} would be right",
                raw.magic
            )));
        }
        raw.version()?;
        let bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
            return Err(Error::corrupt(format!(
                "Cluster size is 2^{bits} bytes; 2^{MIN_CLUSTER_BITS} to 2^{MAX_CLUSTER_BITS} are allowed"
            )));
        }
        Ok(1_u64.checked_shl(bits).unwrap_or(0))
    }

    /// Decodes the header from the first cluster. Where the file ends earlier, all there is will
    /// do: what is missing reads as zeros.
    ///
    /// # Errors
    /// `Corrupt` where a field is outside of its limits, `Unsupported` where the image is of
    /// another version or needs a feature that is not known here (the text names it).
    pub fn decode(first_cluster: &[u8]) -> Result<Self> {
        Self::decode_for(Demand::Usable, first_cluster)
    }

    /// Decodes the header of an image that is to be checked or repaired: like
    /// [`decode`](Self::decode), but the refcount table may be missing or lie anywhere.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_for_check(first_cluster: &[u8]) -> Result<Self> {
        Self::decode_for(Demand::Checkable, first_cluster)
    }

    fn decode_for(demand: Demand, first_cluster: &[u8]) -> Result<Self> {
        let cluster_bytes = usize::try_from(Self::peek_cluster_bytes(first_cluster)?)
            .map_err(|_| Error::unsupported("First cluster does not fit into memory"))?;
        let cluster = padded(first_cluster, cluster_bytes);
        let (raw, later) = raw_fields(&cluster)?;
        let areas = Areas::decode(&raw, &later, &cluster)?;
        Self::assemble(demand, &raw, &later, areas, &cluster)
    }

    fn assemble(
        demand: Demand,
        raw: &RawHeader,
        later: &RawHeaderV3,
        areas: Areas,
        cluster: &[u8],
    ) -> Result<Self> {
        let extension_area =
            cluster.get(areas.header_bytes..areas.extensions_end).unwrap_or_default();
        let features = later.features();
        features.refuse_unknown(&extension::scan_feature_names(extension_area))?;
        let geometry = raw.geometry(later, &features)?;
        let encryption = raw.encryption()?;
        let around = Surroundings {
            geometry: &geometry,
            encryption,
            bitmaps_valid: features.autoclear.contains(AutoclearFeatures::BITMAPS),
        };
        let header = Self {
            geometry,
            size_bytes: raw.size_bytes.get(),
            encryption,
            l1: raw.l1(),
            refcount_table: raw.refcount_table(),
            snapshots: raw.snapshots(),
            features,
            compression: later.compression(&areas)?,
            unknown_fields: placed::later_fields(cluster, areas.header_bytes).to_vec(),
            extensions: Extensions::decode(extension_area, &around)?,
            backing_name: areas.backing_name,
        };
        header.check(demand)?;
        Ok(header)
    }

    /// Encodes the whole start of the file: header, extensions, end marker and backing file name.
    /// What follows in the first cluster is to be zeros.
    ///
    /// # Errors
    /// `NoSpace` where it does not fit into a cluster, `Corrupt` where a field is outside of its
    /// limits.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.encode_placed().map(|placed| placed.bytes)
    }

    /// As [`encode`](Self::encode), and says where the parts came to lie.
    pub(crate) fn encode_placed(&self) -> Result<Placed> {
        self.check(Demand::Usable)?;
        let mut bytes = Vec::new();
        match self.geometry.version() {
            Version::V2 => bytes.resize(V2_BYTES, 0),
            Version::V3 => {
                bytes.resize(V3_BYTES, 0);
                bytes.extend_from_slice(&self.unknown_fields);
            }
        }
        let header_bytes = bytes.len();
        self.extensions.encode(&mut bytes, &self.geometry);
        let backing_name_offset = bytes.len();
        let backing_name = self.backing_name.as_ref().map(StoredName::as_bytes).unwrap_or_default();
        bytes.extend_from_slice(backing_name);
        self.check_room(bytes.len())?;

        let mut raw = self.raw();
        if !backing_name.is_empty() {
            raw.backing_name_offset = (backing_name_offset as u64).into();
            raw.backing_name_bytes = field(backing_name.len())?;
        }
        let later = self.raw_v3(field(header_bytes)?);
        let start = [raw.as_bytes(), later.as_bytes()].concat();
        for (place, byte) in bytes.iter_mut().take(header_bytes).zip(start) {
            *place = byte;
        }
        let version = self.geometry.version();
        Ok(Placed { bytes, version, extensions_at: header_bytes, name_at: backing_name_offset })
    }

    /// Returns the 8 header bytes with the size of the disk and where they go.
    #[must_use]
    pub fn size_update(size_bytes: u64) -> (HostOffset, [u8; 8]) {
        (HostOffset(24), size_bytes.to_be_bytes())
    }

    /// Says how guest data is encrypted, if it is.
    #[must_use]
    pub const fn encryption(&self) -> Option<Encryption> {
        self.encryption
    }

    /// Says whether guest data lies in another file.
    #[must_use]
    pub const fn has_external_data_file(&self) -> bool {
        self.features.incompatible.contains(IncompatibleFeatures::EXTERNAL_DATA_FILE)
    }

    /// Says whether guest data lies in another file that is a valid raw image by itself.
    #[must_use]
    pub const fn has_raw_external_data(&self) -> bool {
        self.has_external_data_file()
            && self.features.autoclear.contains(AutoclearFeatures::RAW_EXTERNAL_DATA)
    }

    /// Returns where the bitmap directory lies, unless there is none or it is stale because
    /// somebody wrote who knew no bitmaps.
    #[must_use]
    pub fn valid_bitmaps(&self) -> Option<extension::BitmapsExtension> {
        self.extensions
            .bitmaps
            .filter(|_| self.features.autoclear.contains(AutoclearFeatures::BITMAPS))
    }

    /// Has the header say where the bitmap directory lies, or that there is none.
    pub(crate) fn name_bitmaps(&mut self, bitmaps: Option<extension::BitmapsExtension>) {
        self.features.autoclear.set(AutoclearFeatures::BITMAPS, bitmaps.is_some());
        self.extensions.bitmaps = bitmaps;
    }

    fn raw(&self) -> RawHeader {
        let encryption = match self.encryption {
            None => 0,
            Some(Encryption::Aes) => 1,
            Some(Encryption::Luks) => 2,
        };
        let version = match self.geometry.version() {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        RawHeader {
            magic: MAGIC,
            version: U32::new(version),
            backing_name_offset: 0.into(),
            backing_name_bytes: 0.into(),
            cluster_bits: self.geometry.cluster_bits().into(),
            size_bytes: self.size_bytes.into(),
            encryption: U32::new(encryption),
            l1_entries: self.l1.entries.into(),
            l1_offset: self.l1.offset.0.into(),
            refcount_table_offset: self.refcount_table.offset.0.into(),
            refcount_table_clusters: self.refcount_table.clusters.into(),
            snapshot_count: self.snapshots.count.into(),
            snapshots_offset: self.snapshots.offset.0.into(),
        }
    }

    fn raw_v3(&self, header_bytes: U32) -> RawHeaderV3 {
        let mut incompatible = self.features.incompatible;
        incompatible.set(IncompatibleFeatures::EXTENDED_L2, self.geometry.has_subclusters());
        let zstd = self.compression == CompressionType::Zstd;
        incompatible.set(IncompatibleFeatures::COMPRESSION_TYPE, zstd);
        RawHeaderV3 {
            incompatible: incompatible.bits().into(),
            compatible: self.features.compatible.bits().into(),
            autoclear: self.features.autoclear.bits().into(),
            refcount_order: self.geometry.refcount_order().into(),
            header_bytes,
            compression: u8::from(zstd),
            padding: [0; 7],
        }
    }
}

/// The first `len` bytes; what is missing is zeros.
/// Takes the fixed fields from the start of a cluster.
fn raw_fields(cluster: &[u8]) -> Result<(RawHeader, RawHeaderV3)> {
    let is_short = || Error::corrupt("First cluster is shorter than the header");
    let (raw, rest) = RawHeader::read_from_prefix(cluster).map_err(|_| is_short())?;
    let later = match raw.version()? {
        Version::V2 => RawHeaderV3::of_version_2(),
        Version::V3 => RawHeaderV3::read_from_prefix(rest).map_err(|_| is_short())?.0,
    };
    Ok((raw, later))
}

fn padded(bytes: &[u8], len: usize) -> Cow<'_, [u8]> {
    match bytes.get(..len) {
        Some(bytes) => Cow::Borrowed(bytes),
        None => {
            let mut owned = bytes.to_vec();
            owned.resize(len, 0);
            Cow::Owned(owned)
        }
    }
}

fn field(len: usize) -> Result<U32> {
    u32::try_from(len)
        .map(U32::new)
        .map_err(|_| Error::corrupt(format!("A header part of {len} bytes is too long")))
}

fn backing_name_too_long(bytes: u64, most: usize) -> Error {
    Error::corrupt(format!("Backing file name has {bytes} bytes; at most {most} are allowed here"))
}

impl RawHeader {
    fn version(&self) -> Result<Version> {
        match self.version.get() {
            2 => Ok(Version::V2),
            3 => Ok(Version::V3),
            other => Err(Error::unsupported(format!(
                "Image has version {other} of the format; 2 and 3 are supported"
            ))),
        }
    }

    fn geometry(&self, later: &RawHeaderV3, features: &Features) -> Result<Geometry> {
        let width = if features.incompatible.contains(IncompatibleFeatures::EXTENDED_L2) {
            EntryWidth::Extended
        } else {
            EntryWidth::Standard
        };
        let order = later.refcount_order.get();
        Geometry::new(self.version()?, self.cluster_bits.get(), order, width)
    }

    fn encryption(&self) -> Result<Option<Encryption>> {
        match self.encryption.get() {
            0 => Ok(None),
            1 => Ok(Some(Encryption::Aes)),
            2 => Ok(Some(Encryption::Luks)),
            other => Err(Error::unsupported(format!(
                "Encryption method {other} is not known; 0 (none), 1 (AES) and 2 (LUKS) are"
            ))),
        }
    }

    fn l1(&self) -> L1Location {
        L1Location { offset: HostOffset(self.l1_offset.get()), entries: self.l1_entries.get() }
    }

    fn refcount_table(&self) -> RefcountTableLocation {
        RefcountTableLocation {
            offset: HostOffset(self.refcount_table_offset.get()),
            clusters: self.refcount_table_clusters.get(),
        }
    }

    fn snapshots(&self) -> SnapshotTableLocation {
        SnapshotTableLocation {
            offset: HostOffset(self.snapshots_offset.get()),
            count: self.snapshot_count.get(),
        }
    }
}

impl RawHeaderV3 {
    /// What version 2 means without saying it.
    fn of_version_2() -> Self {
        Self {
            incompatible: 0.into(),
            compatible: 0.into(),
            autoclear: 0.into(),
            refcount_order: 4.into(),
            header_bytes: U32::new(72),
            compression: 0,
            padding: [0; 7],
        }
    }

    fn features(&self) -> Features {
        Features {
            incompatible: IncompatibleFeatures::from_bits_retain(self.incompatible.get()),
            compatible: CompatibleFeatures::from_bits_retain(self.compatible.get()),
            autoclear: AutoclearFeatures::from_bits_retain(self.autoclear.get()),
        }
    }

    fn compression(&self, areas: &Areas) -> Result<CompressionType> {
        let stored = if areas.header_bytes > V3_LEAST_BYTES { self.compression } else { 0 };
        let bit = self.features().incompatible.contains(IncompatibleFeatures::COMPRESSION_TYPE);
        match (stored, bit) {
            (0, false) => Ok(CompressionType::Deflate),
            (1, true) => Ok(CompressionType::Zstd),
            (0 | 1, _) => Err(Error::corrupt(format!(
                "Compression type {stored} with incompatible bit 3 {}; the bit must be set for \
                 all types but 0",
                if bit { "set" } else { "clear" }
            ))),
            _ => Err(Error::unsupported(format!(
                "Compression type {stored} is not known; 0 (deflate) and 1 (zstd) are"
            ))),
        }
    }

    fn header_bytes(&self, version: Version, cluster_bytes: usize) -> Result<usize> {
        let found = self.header_bytes.get();
        usize::try_from(found)
            .ok()
            .filter(|bytes| {
                let whole = *bytes >= V3_LEAST_BYTES && bytes.is_multiple_of(8);
                version == Version::V2 || (whole && *bytes <= cluster_bytes)
            })
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "Header length is {found}; a multiple of 8 from {V3_LEAST_BYTES} to the \
                     cluster size {cluster_bytes} would be right"
                ))
            })
    }
}

impl Areas {
    fn decode(raw: &RawHeader, later: &RawHeaderV3, cluster: &[u8]) -> Result<Self> {
        let header_bytes = later.header_bytes(raw.version()?, cluster.len())?;
        let offset = raw.backing_name_offset.get();
        if offset == 0 {
            return Ok(Self { header_bytes, extensions_end: cluster.len(), backing_name: None });
        }
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| (header_bytes..=cluster.len()).contains(start))
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "Backing file name lies at {offset:#x}; between the header and the end of \
                     the first cluster would be right"
                ))
            })?;
        let name = backing_name(raw.backing_name_bytes.get(), cluster.get(start..).unwrap_or(&[]))?;
        let backing_name = Some(name).filter(|name| !name.is_empty());
        Ok(Self { header_bytes, extensions_end: start, backing_name })
    }
}

/// Takes the name from the start of `rest`, the bytes up to the end of the first cluster.
fn backing_name(bytes: u32, rest: &[u8]) -> Result<StoredName> {
    let most = rest.len().min(MAX_BACKING_NAME_BYTES);
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    let name = rest.get(..len).filter(|_| len <= most);
    name.map(StoredName::new).ok_or_else(|| backing_name_too_long(bytes.into(), most))
}
