//! Header extensions (B.3): u32 magic, u32 length, data, zeros up to a multiple of 8.
//!
//! * Always: an extension that nobody here knows is kept, byte for byte and in its order.
//! * Never: a length is believed before it was compared with the area that is left.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::features::FeatureName;
use super::geometry::Geometry;
use super::header::Encryption;
use super::name::StoredName;
use crate::units::{GuestCluster, HostOffset};
use crate::{Error, Result};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Private, without data: writers that know it keep the places of clusters (`docs/private-bits.md`).
const KEEP_MAPPING: u32 = 0x6c61_6b6d;
/// Private (`docs/private-bits.md`): "lzcl".
const ZERO_CLUSTER: u32 = 0x6c7a_636c;

/// Private (`docs/private-bits.md`): "lbin".
pub(crate) const BITMAP_INTENTS: u32 = 0x6c62_696e;

/// Longest name of a backing format that QEMU takes.
const MAX_FORMAT_BYTES: usize = 15;
/// Most bitmaps in one image that QEMU takes (B.10).
pub(crate) const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory that QEMU takes: 1024 bytes for each bitmap.
pub(crate) const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// QEMU leaves the feature name table out where less room than this is left for it.
const ROOM_FOR_FEATURE_NAMES: usize = 4096;

/// What the header extensions say.
///
/// ```
/// use lacuna::qcow2::format::Extensions;
/// assert!(Extensions::default().unknown.is_empty());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The format of the backing file: `raw`, `qcow2` and so on; at most 15 bytes.
    pub backing_format: Option<StoredName>,
    /// The name of the external data file.
    pub data_file_name: Option<StoredName>,
    /// Where the LUKS header lies.
    pub encryption_header: Option<EncryptionHeader>,
    /// What the image calls its feature bits. Encoding adds the names that QEMU writes and leaves
    /// all of them out where QEMU does.
    pub feature_names: Vec<FeatureName>,
    /// Where the bitmap directory lies. Unchecked and not to be followed where the autoclear bit
    /// [`BITMAPS`](super::AutoclearFeatures::BITMAPS) is not set.
    pub bitmaps: Option<BitmapsExtension>,
    /// A guest cluster beyond the end of the disk whose entry may point to the shared zero cluster.
    /// A hint, to be believed no further than what is found there.
    pub zero_cluster: Option<ZeroClusterHint>,
    /// All others, in their order; private ones among them, which stock tools keep likewise.
    pub unknown: Vec<UnknownExtension>,
}

impl Extensions {
    /// Says whether discards and zeroing are to keep the places of clusters (002-6).
    #[must_use]
    pub fn keep_mapping(&self) -> bool {
        self.unknown.iter().any(|extension| extension.magic == KEEP_MAPPING)
    }

    /// Returns the type of an extension that nobody here knows, which might name a place in the file.
    pub(crate) fn stranger(&self) -> Option<u32> {
        let magics = self.unknown.iter().map(|extension| extension.magic);
        magics.into_iter().find(|magic| ![KEEP_MAPPING, BITMAP_INTENTS].contains(magic))
    }

    /// Returns the regions in which bitmaps may miss changes after a crash, as they are stored.
    pub(crate) fn bitmap_intents(&self) -> Option<&[u8]> {
        let mut all = self.unknown.iter();
        all.find(|extension| extension.magic == BITMAP_INTENTS).map(|it| &it.data[..])
    }

    pub(crate) fn set_bitmap_intents(&mut self, data: Vec<u8>) {
        self.unknown.retain(|extension| extension.magic != BITMAP_INTENTS);
        self.unknown.push(UnknownExtension { magic: BITMAP_INTENTS, data });
    }

    pub(super) fn set_keep_mapping(&mut self) {
        if !self.keep_mapping() {
            self.unknown.push(UnknownExtension { magic: KEEP_MAPPING, data: Vec::new() });
        }
    }
}

/// Where the LUKS header lies in the image file.
///
/// ```
/// use lacuna::qcow2::format::EncryptionHeader;
/// use lacuna::units::HostOffset;
/// let header = EncryptionHeader { offset: HostOffset(0x50000), len_bytes: 2_068_480 };
/// assert_eq!(header.offset.0 % 0x10000, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EncryptionHeader {
    /// Cluster-aligned.
    pub offset: HostOffset,
    /// Its size.
    pub len_bytes: u64,
}

/// Where the bitmap directory lies and what it holds (B.10).
///
/// ```
/// use lacuna::qcow2::format::BitmapsExtension;
/// use lacuna::units::HostOffset;
/// let one = BitmapsExtension {
///     count: 1, directory_bytes: 32, directory_offset: HostOffset(0x70000),
/// };
/// assert_eq!(one.count, 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BitmapsExtension {
    /// How many bitmaps: 1 to 65535.
    pub count: u32,
    /// The size of the directory; at most 65535 KiB.
    pub directory_bytes: u64,
    /// Cluster-aligned.
    pub directory_offset: HostOffset,
}

/// Names a guest cluster that shares the cluster of zeros (004-8).
///
/// Private to this engine, and kept by QEMU as it keeps every extension that it does not know. Version 2
/// has no bit that such a writer would clear, so that the name may be out of date.
///
/// ```
/// use lacuna::qcow2::format::ZeroClusterHint;
/// use lacuna::units::GuestCluster;
/// assert_eq!(ZeroClusterHint { cluster: GuestCluster(7) }.cluster.0, 7);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ZeroClusterHint {
    /// The guest cluster, unchecked.
    pub cluster: GuestCluster,
}

/// An extension that is not known here.
///
/// ```
/// use lacuna::qcow2::format::UnknownExtension;
/// let extension = UnknownExtension { magic: 0x1234_5678, data: vec![1, 2, 3] };
/// assert_eq!(extension.data.len(), 3);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnknownExtension {
    /// Its type.
    pub magic: u32,
    /// Its data without padding.
    pub data: Vec<u8>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtensionHead {
    magic: U32,
    len: U32,
}
const _: () = assert!(size_of::<RawExtensionHead>() == 8);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEncryptionHeader {
    offset: U64,
    len: U64,
}
const _: () = assert!(size_of::<RawEncryptionHeader>() == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBitmaps {
    count: U32,
    reserved: U32,
    directory_bytes: U64,
    directory_offset: U64,
}
const _: () = assert!(size_of::<RawBitmaps>() == 24);

/// What decoding an extension needs to know of the header.
pub(crate) struct Surroundings<'a> {
    pub(crate) geometry: &'a Geometry,
    pub(crate) encryption: Option<Encryption>,
    pub(crate) bitmaps_valid: bool,
}

/// One extension as bytes.
struct Chunk<'a> {
    magic: u32,
    data: &'a [u8],
}

/// Walks the extensions; ends at the end marker, at the end of the area or after an error.
struct Chunks<'a> {
    rest: &'a [u8],
}

impl<'a> Chunks<'a> {
    fn step(&mut self) -> Result<Option<Chunk<'a>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (head, rest) = RawExtensionHead::read_from_prefix(self.rest).map_err(|_| {
            Error::corrupt(format!(
                "Header extensions end with {} stray bytes; an end marker of 8 bytes would be right",
                self.rest.len()
            ))
        })?;
        let (magic, len) = (head.magic.get(), head.len.get());
        if magic == END {
            return Ok(None);
        }
        let Some((data, after)) =
            usize::try_from(len).ok().and_then(|len| rest.split_at_checked(len))
        else {
            return Err(Error::corrupt(format!(
                "Header extension {magic:#010x} claims {len} bytes; only {} are left",
                rest.len()
            )));
        };
        self.rest = after.get(padding(data.len())..).unwrap_or_default();
        Ok(Some(Chunk { magic, data }))
    }
}

impl<'a> Iterator for Chunks<'a> {
    type Item = Result<Chunk<'a>>;
    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if !matches!(step, Some(Ok(_))) {
            self.rest = &[];
        }
        step
    }
}

/// How many zero bytes follow `len` bytes of data.
fn padding(len: usize) -> usize {
    len.wrapping_neg() & 7
}

fn set_once<T>(place: &mut Option<T>, value: T, what: &str) -> Result<()> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::corrupt(format!("Header has two {what} extensions; one is allowed"))),
    }
}

/// Finds the feature names in an area that may be wrong otherwise.
pub(crate) fn scan_feature_names(area: &[u8]) -> Vec<FeatureName> {
    Chunks { rest: area }
        .filter_map(Result::ok)
        .filter(|chunk| chunk.magic == FEATURE_NAMES)
        .flat_map(|chunk| FeatureName::decode_table(chunk.data))
        .collect()
}

/// Returns how many bytes of `area` the extensions take, their end marker included.
pub(crate) fn bytes_taken(area: &[u8]) -> usize {
    let mut chunks = Chunks { rest: area };
    while let Ok(Some(_)) = chunks.step() {}
    let end = area.len().saturating_sub(chunks.rest.len());
    end.saturating_add(size_of::<RawExtensionHead>()).min(area.len())
}

/// Returns where in `area` the data of the first extension of a type lies.
pub(crate) fn place_of(area: &[u8], magic: u32) -> Option<std::ops::Range<usize>> {
    let mut chunks = Chunks { rest: area };
    loop {
        let head = area.len().checked_sub(chunks.rest.len())?;
        let chunk = chunks.step().ok()??;
        if chunk.magic == magic {
            let start = head.checked_add(size_of::<RawExtensionHead>())?;
            return Some(start..start.checked_add(chunk.data.len())?);
        }
    }
}

impl Extensions {
    /// Decodes the extensions in `area`, the bytes between the header and the backing file name
    /// or the end of the first cluster.
    pub(crate) fn decode(area: &[u8], around: &Surroundings<'_>) -> Result<Self> {
        let mut extensions = Self::default();
        for chunk in (Chunks { rest: area }) {
            extensions.take(&chunk?, around)?;
        }
        Ok(extensions)
    }

    fn take(&mut self, chunk: &Chunk<'_>, around: &Surroundings<'_>) -> Result<()> {
        let data = chunk.data;
        match chunk.magic {
            BACKING_FORMAT => {
                set_once(&mut self.backing_format, decode_format(data)?, "backing format")
            }
            FEATURE_NAMES => {
                self.feature_names.append(&mut FeatureName::decode_table(data));
                Ok(())
            }
            BITMAPS => set_once(&mut self.bitmaps, decode_bitmaps(data, around)?, "bitmaps"),
            ENCRYPTION_HEADER => {
                let header = decode_encryption_header(data, around)?;
                set_once(&mut self.encryption_header, header, "encryption header")
            }
            DATA_FILE => {
                set_once(&mut self.data_file_name, StoredName::new(data), "data file name")
            }
            ZERO_CLUSTER if self.zero_cluster.is_none() && data.len() == 8 => {
                self.zero_cluster = ZeroClusterHint::decode(data);
                Ok(())
            }
            magic => {
                self.unknown.push(UnknownExtension { magic, data: data.to_vec() });
                Ok(())
            }
        }
    }

    /// Appends the extensions and the end marker to `header`, in QEMU's order.
    pub(crate) fn encode(&self, header: &mut Vec<u8>, geometry: &Geometry) {
        if let Some(format) = &self.backing_format {
            push(header, BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file_name {
            push(header, DATA_FILE, name.as_bytes());
        }
        if let Some(encryption) = &self.encryption_header {
            push(header, ENCRYPTION_HEADER, encryption.encode().as_bytes());
        }
        self.encode_feature_names(header, geometry);
        if let Some(bitmaps) = &self.bitmaps {
            push(header, BITMAPS, bitmaps.encode().as_bytes());
        }
        if let Some(hint) = self.zero_cluster {
            push(header, ZERO_CLUSTER, &hint.cluster.0.to_be_bytes());
        }
        for extension in &self.unknown {
            push(header, extension.magic, &extension.data);
        }
        push(header, END, &[]);
    }

    fn encode_feature_names(&self, header: &mut Vec<u8>, geometry: &Geometry) {
        let cluster = usize::try_from(geometry.cluster_bytes()).unwrap_or(usize::MAX);
        let room = cluster.saturating_sub(header.len());
        if geometry.version() < super::Version::V3 {
            return;
        }
        // Half of the room: names of features must not crowd out what has a meaning.
        let table = match room >= ROOM_FOR_FEATURE_NAMES {
            true => FeatureName::encode_table(&self.feature_names, room / 2),
            // Nobody else knows these; what QEMU would write can be left out, as QEMU does.
            false => FeatureName::encode_unusual(&self.feature_names, room / 2),
        };
        if !table.is_empty() {
            push(header, FEATURE_NAMES, &table);
        }
    }
}

fn push(header: &mut Vec<u8>, magic: u32, data: &[u8]) {
    // More than 4 GiB cannot come from an image, and does not pass the check for the cluster.
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let head = RawExtensionHead { magic: magic.into(), len: len.into() };
    header.extend_from_slice(head.as_bytes());
    header.extend_from_slice(data);
    header.extend(std::iter::repeat_n(0, padding(data.len())));
}

pub(crate) fn check_format_bytes(bytes: usize) -> Result<()> {
    if bytes > MAX_FORMAT_BYTES {
        return Err(Error::corrupt(format!(
            "Name of the backing format has {bytes} bytes; at most {MAX_FORMAT_BYTES} are allowed"
        )));
    }
    Ok(())
}

fn decode_format(data: &[u8]) -> Result<StoredName> {
    check_format_bytes(data.len())?;
    Ok(StoredName::new(data))
}

fn wrong_len(what: &str, found: usize, right: usize) -> Error {
    Error::corrupt(format!("{what} extension has {found} bytes; {right} would be right"))
}

fn decode_encryption_header(data: &[u8], around: &Surroundings<'_>) -> Result<EncryptionHeader> {
    if around.encryption != Some(Encryption::Luks) {
        return Err(Error::corrupt(
            "Encryption header extension in an image that is not encrypted with LUKS",
        ));
    }
    let raw = RawEncryptionHeader::read_from_bytes(data)
        .map_err(|_| wrong_len("Encryption header", data.len(), 16))?;
    let header =
        EncryptionHeader { offset: HostOffset(raw.offset.get()), len_bytes: raw.len.get() };
    if !around.geometry.is_aligned(header.offset.0) {
        return Err(Error::corrupt(format!(
            "Encryption header offset {} is not a multiple of the cluster size",
            header.offset
        )));
    }
    Ok(header)
}

fn decode_bitmaps(data: &[u8], around: &Surroundings<'_>) -> Result<BitmapsExtension> {
    let raw =
        RawBitmaps::read_from_bytes(data).map_err(|_| wrong_len("Bitmaps", data.len(), 24))?;
    let bitmaps = BitmapsExtension {
        count: raw.count.get(),
        directory_bytes: raw.directory_bytes.get(),
        directory_offset: HostOffset(raw.directory_offset.get()),
    };
    // Without the bit somebody wrote who knew no bitmaps: stale, so its values mean nothing.
    if around.bitmaps_valid {
        if raw.reserved.get() != 0 {
            return Err(Error::corrupt(format!(
                "Reserved field of the bitmaps extension is {:#x}; 0 would be right",
                raw.reserved
            )));
        }
        bitmaps.check(around.geometry)?;
    }
    Ok(bitmaps)
}

impl BitmapsExtension {
    pub(crate) fn check(&self, geometry: &Geometry) -> Result<()> {
        if !(1..=MAX_BITMAPS).contains(&self.count) {
            return Err(Error::corrupt(format!(
                "Bitmaps extension claims {} bitmaps; 1 to {MAX_BITMAPS} are allowed",
                self.count
            )));
        }
        if !geometry.is_aligned(self.directory_offset.0) || self.directory_offset.0 == 0 {
            return Err(Error::corrupt(format!(
                "Bitmap directory offset {} is not a multiple of the cluster size past the header",
                self.directory_offset
            )));
        }
        if self.directory_bytes > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Error::corrupt(format!(
                "Bitmap directory has {} bytes; at most {MAX_BITMAP_DIRECTORY_BYTES} are allowed",
                self.directory_bytes
            )));
        }
        Ok(())
    }

    fn encode(&self) -> RawBitmaps {
        RawBitmaps {
            count: self.count.into(),
            reserved: 0.into(),
            directory_bytes: self.directory_bytes.into(),
            directory_offset: self.directory_offset.0.into(),
        }
    }
}

impl ZeroClusterHint {
    fn decode(data: &[u8]) -> Option<Self> {
        let bytes = data.first_chunk::<8>()?;
        Some(Self { cluster: GuestCluster(u64::from_be_bytes(*bytes)) })
    }
}

impl EncryptionHeader {
    fn encode(&self) -> RawEncryptionHeader {
        RawEncryptionHeader { offset: self.offset.0.into(), len: self.len_bytes.into() }
    }
}
