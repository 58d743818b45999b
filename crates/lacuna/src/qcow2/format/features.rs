//! Feature words of the header (B.2) and the names an image may give to their bits (B.3).
//!
//! * Always: bits that nobody here knows are kept as they are; who opens the image decides.
//! * Never: an unknown incompatible bit passes the decoding of a header.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::name::StoredName;
use crate::units::HostOffset;
use crate::{Error, Result};

bitflags! {
    /// Features that a reader must know to make sense of the image (bytes 72 to 79).
    ///
    /// ```
    /// use lacuna::qcow2::format::IncompatibleFeatures;
    /// assert_eq!(IncompatibleFeatures::EXTENDED_L2.bits(), 16);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct IncompatibleFeatures: u64 {
        /// Refcounts may be stale: to be repaired before anything is written.
        const DIRTY = 1;
        /// Metadata is known to be corrupt: nothing is written but by a repair.
        const CORRUPT = 1 << 1;
        /// Guest data lies in another file.
        const EXTERNAL_DATA_FILE = 1 << 2;
        /// Compressed clusters are not deflate; byte 104 says what.
        const COMPRESSION_TYPE = 1 << 3;
        /// L2 entries have 16 bytes and carry subcluster states.
        const EXTENDED_L2 = 1 << 4;
    }
}

bitflags! {
    /// Features that a reader and a writer may ignore (bytes 80 to 87).
    ///
    /// ```
    /// use lacuna::qcow2::format::CompatibleFeatures;
    /// assert_eq!(CompatibleFeatures::LAZY_REFCOUNTS.bits(), 1);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct CompatibleFeatures: u64 {
        /// Refcount updates may be put off while the dirty bit is set.
        const LAZY_REFCOUNTS = 1;
    }
}

bitflags! {
    /// Features whose bit a writer that does not know them clears (bytes 88 to 95).
    ///
    /// ```
    /// use lacuna::qcow2::format::AutoclearFeatures;
    /// let word = AutoclearFeatures::from_bits_retain(1 << 40 | 1);
    /// assert_eq!(word & AutoclearFeatures::all(), AutoclearFeatures::BITMAPS);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct AutoclearFeatures: u64 {
        /// The bitmaps extension is consistent with the guest data.
        const BITMAPS = 1;
        /// The external data file is a valid raw image by itself.
        const RAW_EXTERNAL_DATA = 1 << 1;
        /// Every byte of the disk reads as zero (000-1). Private: see `docs/private-bits.md`.
        const ALL_ZERO = 1 << 2;
        /// No cluster of this image has a mapping (000-3). Private likewise.
        const ALL_UNALLOCATED = 1 << 3;
        /// Every writer so far kept the places of clusters through discards and zeroing (002-6).
        /// Private likewise.
        const MAPPING_KEPT = 1 << 4;
        /// Bitmaps that were left in use name, with the regions in the header, all that changed.
        /// Private likewise.
        const BITMAP_INTENTS = 1 << 5;
    }
}

impl AutoclearFeatures {
    /// Both claims about the whole disk.
    pub const ZERO_CLAIMS: Self = Self::ALL_ZERO.union(Self::ALL_UNALLOCATED);
}

/// All three feature words; a version 2 image has them all zero.
///
/// ```
/// use lacuna::qcow2::format::{Features, IncompatibleFeatures};
/// let dirty = Features { incompatible: IncompatibleFeatures::DIRTY, ..Features::default() };
/// let (at, bytes) = dirty.header_update();
/// assert_eq!((at.0, bytes[7]), (72, 1));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// Must be known to open the image.
    pub incompatible: IncompatibleFeatures,
    /// May be ignored.
    pub compatible: CompatibleFeatures,
    /// Unknown ones are cleared by whoever opens the image for writing.
    pub autoclear: AutoclearFeatures,
}

impl Features {
    /// Returns the 24 header bytes of the three words and where they go (version 3 only).
    #[must_use]
    pub fn header_update(&self) -> (HostOffset, [u8; 24]) {
        let words = [self.incompatible.bits(), self.compatible.bits(), self.autoclear.bits()];
        let mut bytes = [0; 24];
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_be_bytes();
        }
        (HostOffset(72), bytes)
    }

    /// Refuses incompatible bits that are unknown here, calling them what the image calls them.
    pub(crate) fn refuse_unknown(&self, names: &[FeatureName]) -> Result<()> {
        let unknown = self.incompatible.difference(IncompatibleFeatures::all()).bits();
        if unknown == 0 {
            return Ok(());
        }
        let list: Vec<String> = (0..64_u8)
            .filter(|bit| unknown.checked_shr(u32::from(*bit)).unwrap_or(0) & 1 == 1)
            .map(|bit| describe_incompatible(bit, names))
            .collect();
        Err(Error::unsupported(format!(
            "Image needs features that are not known here: {}",
            list.join(", ")
        )))
    }
}

fn describe_incompatible(bit: u8, names: &[FeatureName]) -> String {
    let name = names.iter().find(|name| name.word == FeatureWord::INCOMPATIBLE && name.bit == bit);
    match name {
        Some(name) => format!("incompatible bit {bit} ({})", name.name),
        None => format!("incompatible bit {bit}"),
    }
}

/// Which feature word a name belongs to: a code of the feature name table.
///
/// ```
/// use lacuna::qcow2::format::FeatureWord;
/// assert_eq!(FeatureWord::AUTOCLEAR.0, 2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FeatureWord(pub u8);

impl FeatureWord {
    /// The incompatible features.
    pub const INCOMPATIBLE: Self = Self(0);
    /// The compatible features.
    pub const COMPATIBLE: Self = Self(1);
    /// The autoclear features.
    pub const AUTOCLEAR: Self = Self(2);
}

/// One row of the feature name table: byte 0 the word, byte 1 the bit, then 46 bytes of name.
///
/// ```
/// use lacuna::qcow2::format::{FeatureName, FeatureWord};
/// let row = FeatureName { word: FeatureWord::AUTOCLEAR, bit: 2, name: "all zero".into() };
/// assert_eq!(row.name.to_string(), "all zero");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FeatureName {
    /// The word.
    pub word: FeatureWord,
    /// The bit in it, 0 to 63.
    pub bit: u8,
    /// What to call it; only the first 46 bytes are stored.
    pub name: StoredName,
}

/// The rows that QEMU 10.0 writes, in its order.
const KNOWN: [(FeatureWord, u8, &[u8]); 8] = [
    (FeatureWord::INCOMPATIBLE, 0, b"dirty bit"),
    (FeatureWord::INCOMPATIBLE, 1, b"corrupt bit"),
    (FeatureWord::INCOMPATIBLE, 2, b"external data file"),
    (FeatureWord::INCOMPATIBLE, 3, b"compression type"),
    (FeatureWord::INCOMPATIBLE, 4, b"extended L2 entries"),
    (FeatureWord::COMPATIBLE, 0, b"lazy refcounts"),
    (FeatureWord::AUTOCLEAR, 0, b"bitmaps"),
    (FeatureWord::AUTOCLEAR, 1, b"raw external data"),
];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFeatureName {
    word: u8,
    bit: u8,
    name: [u8; 46],
}
const _: () = assert!(size_of::<RawFeatureName>() == 48);

impl RawFeatureName {
    fn new(word: FeatureWord, bit: u8, name: &[u8]) -> Self {
        let mut raw = Self { word: word.0, bit, name: [0; 46] };
        for (place, byte) in raw.name.iter_mut().zip(name) {
            *place = *byte;
        }
        raw
    }
}

impl FeatureName {
    /// Returns the names of the private claims; an image that has them wants the claims made.
    #[must_use]
    pub fn zero_claims() -> [Self; 2] {
        [Self::autoclear(2, "all zero"), Self::autoclear(3, "all unallocated")]
    }

    /// Returns the name of [`MAPPING_KEPT`](AutoclearFeatures::MAPPING_KEPT).
    #[must_use]
    pub fn mapping_kept() -> Self {
        Self::autoclear(4, "mapping kept")
    }

    /// Returns the name of [`BITMAP_INTENTS`](AutoclearFeatures::BITMAP_INTENTS).
    #[must_use]
    pub fn bitmap_intents() -> Self {
        Self::autoclear(5, "bitmap intents")
    }

    fn autoclear(bit: u8, name: &str) -> Self {
        Self { word: FeatureWord::AUTOCLEAR, bit, name: StoredName::new(name) }
    }

    /// Decodes a feature name table; what the last row lacks is zeros, as for QEMU.
    pub(crate) fn decode_table(data: &[u8]) -> Vec<Self> {
        let (rows, rest) = data.as_chunks::<48>();
        let mut last = [0; 48];
        last.iter_mut().zip(rest).for_each(|(place, byte)| *place = *byte);
        // Without a name there is nothing to tell.
        let last = (rest.len() > 2).then_some(&last);
        rows.iter().chain(last).map(Self::decode).collect()
    }

    fn decode(row: &[u8; 48]) -> Self {
        let raw: RawFeatureName = zerocopy::transmute!(*row);
        let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Self { word: FeatureWord(raw.word), bit: raw.bit, name: StoredName::new(name) }
    }

    /// Encodes the table that QEMU writes, then those of `names` that it does not have.
    pub(crate) fn encode_table(names: &[Self], room_bytes: usize) -> Vec<u8> {
        let known = KNOWN.iter().map(|(word, bit, name)| RawFeatureName::new(*word, *bit, name));
        let unusual = Self::unusual(names);
        known.chain(unusual).take(room_bytes / 48).flat_map(RawFeatureName::into_bytes).collect()
    }

    /// Encodes those of `names` that QEMU does not write.
    pub(crate) fn encode_unusual(names: &[Self], room_bytes: usize) -> Vec<u8> {
        Self::unusual(names).take(room_bytes / 48).flat_map(RawFeatureName::into_bytes).collect()
    }

    fn unusual(names: &[Self]) -> impl Iterator<Item = RawFeatureName> {
        let is_usual =
            |name: &Self| KNOWN.iter().any(|row| row.0 == name.word && row.1 == name.bit);
        names
            .iter()
            .filter(move |name| !is_usual(name))
            .map(|name| RawFeatureName::new(name.word, name.bit, name.name.as_bytes()))
    }
}

impl RawFeatureName {
    fn into_bytes(self) -> [u8; 48] {
        zerocopy::transmute!(self)
    }
}
