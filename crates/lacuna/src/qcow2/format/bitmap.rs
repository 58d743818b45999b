//! Persistent bitmaps (B.10): the directory and the table of each bitmap.
//!
//! | byte | size | field of a directory entry |
//! |---|---|---|
//! | 0, 8 | 8, 4 | bitmap table: offset, entries |
//! | 12 | 4 | flags |
//! | 16, 17 | 1, 1 | type: 1 dirty tracking; binary logarithm of the granularity in bytes |
//! | 18, 20 | 2, 4 | bytes of the name, bytes of extra data |
//! | 24 | | extra data, name, zeros up to a multiple of 8 |
//!
//! * Always: flags, types and extra data that are not known are kept.
//! * Never: a bitmap is used because its entry was decoded: [`BitmapEntry::check`] comes first.

use bitflags::bitflags;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extension::{BitmapsExtension, MAX_BITMAP_DIRECTORY_BYTES};
use super::geometry::Geometry;
use super::l1::OFFSET_MASK;
use super::name::StoredName;
use crate::units::HostOffset;
use crate::{Error, Result};

/// The only type of bitmap there is.
const DIRTY_TRACKING: u8 = 1;
/// Longest name in bytes.
const MAX_NAME_BYTES: usize = 1023;
/// Most entries of a bitmap table.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Most bytes of bitmap data.
const MAX_DATA_BYTES: u64 = 512 << 20;

bitflags! {
    /// Flags of a bitmap.
    ///
    /// ```
    /// use lacuna::qcow2::format::BitmapFlags;
    /// assert_eq!(BitmapFlags::AUTO.bits(), 2);
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct BitmapFlags: u32 {
        /// Somebody had the bitmap in memory and did not store it: its content means nothing.
        const IN_USE = 1;
        /// Every write must be recorded.
        const AUTO = 1 << 1;
        /// Extra data that is not known does not forbid using the bitmap.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// An entry of the bitmap directory.
///
/// ```
/// use lacuna::qcow2::format::{BitmapEntry, BitmapFlags};
/// use lacuna::units::HostOffset;
/// let entry = BitmapEntry::new("backup", HostOffset(0x40000), 1, 16);
/// assert_eq!(entry.flags, BitmapFlags::AUTO);
/// assert_eq!(BitmapEntry::encode_directory(&[entry])?.len(), 32);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table lies.
    pub table_offset: HostOffset,
    /// How many entries it has, one per cluster of bitmap data.
    pub table_entries: u32,
    /// Its flags; unknown ones kept.
    pub flags: BitmapFlags,
    /// What the bits mean: 1 is dirty tracking, and there is nothing else.
    pub kind: u8,
    /// The binary logarithm of the guest bytes per bit: 9 to 31.
    pub granularity_bits: u8,
    /// What people call it: unique, not empty, at most 1023 bytes.
    pub name: StoredName,
    /// Data of a later version of the format.
    pub extra_data: Vec<u8>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBitmapEntry {
    table_offset: U64,
    table_entries: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    name_bytes: U16,
    extra_bytes: U32,
}
const _: () = assert!(size_of::<RawBitmapEntry>() == 24);

impl BitmapEntry {
    /// Makes the entry of an enabled dirty-tracking bitmap.
    #[must_use]
    pub fn new(
        name: &str,
        table_offset: HostOffset,
        table_entries: u32,
        granularity_bits: u8,
    ) -> Self {
        Self {
            table_offset,
            table_entries,
            flags: BitmapFlags::AUTO,
            kind: DIRTY_TRACKING,
            granularity_bits,
            name: name.into(),
            extra_data: Vec::new(),
        }
    }

    /// Decodes a directory of exactly the size and number of entries that `extension` gives.
    ///
    /// # Errors
    /// `Corrupt` where entries reach past the end or there are more or fewer of them.
    pub fn decode_directory(mut bytes: &[u8], extension: &BitmapsExtension) -> Result<Vec<Self>> {
        if bytes.len() as u64 != extension.directory_bytes {
            return Err(Error::corrupt(format!(
                "Bitmap directory ends after {} of {} bytes",
                bytes.len(),
                extension.directory_bytes
            )));
        }
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            let (entry, len) =
                Self::decode(bytes).ok_or_else(|| broken_directory(entries.len(), bytes.len()))?;
            bytes = bytes.get(len..).ok_or_else(|| broken_directory(entries.len(), bytes.len()))?;
            entries.push(entry);
        }
        if entries.len() as u64 != u64::from(extension.count) {
            return Err(Error::corrupt(format!(
                "Bitmap directory has {} entries; the header says {}",
                entries.len(),
                extension.count
            )));
        }
        Ok(entries)
    }

    /// Returns how many entries can be read at the start of a directory, at most `at_most`, and how
    /// many bytes they take.
    pub(crate) fn readable(bytes: &[u8], at_most: u32) -> (u32, u64) {
        let mut rest = bytes;
        for count in 0..at_most {
            let behind = Self::decode(rest).and_then(|(_, len)| rest.get(len..));
            match behind {
                Some(behind) => rest = behind,
                None => return (count, bytes.len().abs_diff(rest.len()) as u64),
            }
        }
        (at_most, bytes.len().abs_diff(rest.len()) as u64)
    }

    /// Encodes a directory.
    ///
    /// # Errors
    /// `InvalidRequest` where a name, extra data or the whole is too long.
    pub fn encode_directory(entries: &[Self]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for entry in entries {
            entry.encode(&mut bytes)?;
        }
        if bytes.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Error::invalid(format!(
                "Bitmap directory would have {} bytes; at most {MAX_BITMAP_DIRECTORY_BYTES} are \
                 allowed",
                bytes.len()
            )));
        }
        Ok(bytes)
    }

    /// Checks everything that decides whether the bitmap may be used with a disk of this size.
    /// A bitmap in use passes: it is consistent in form, not in content.
    ///
    /// # Errors
    /// `Corrupt` where a field is outside of its limits; `Unsupported` for unknown flags, types
    /// and extra data.
    pub fn check(&self, geometry: &Geometry, disk_size_bytes: u64) -> Result<()> {
        self.check_known().map_err(|error| error.context(format!("Bitmap '{}'", self.name)))?;
        self.check_limits(geometry)
            .and_then(|()| self.check_coverage(geometry, disk_size_bytes))
            .map_err(|error| error.context(format!("Bitmap '{}'", self.name)))
    }

    fn check_known(&self) -> Result<()> {
        let unknown = self.flags.difference(BitmapFlags::all()).bits();
        if unknown != 0 {
            return Err(Error::unsupported(format!("Flags {unknown:#x} are not known")));
        }
        if self.kind != DIRTY_TRACKING {
            return Err(Error::unsupported(format!(
                "Type {} is not known; {DIRTY_TRACKING} (dirty tracking) is",
                self.kind
            )));
        }
        if !self.extra_data.is_empty() {
            return Err(Error::unsupported(format!(
                "Its {} bytes of extra data are not known",
                self.extra_data.len()
            )));
        }
        Ok(())
    }

    fn check_limits(&self, geometry: &Geometry) -> Result<()> {
        if self.table_offset.0 == 0 || !geometry.is_aligned(self.table_offset.0) {
            return Err(Error::corrupt(format!(
                "Bitmap table offset {} is not a multiple of the cluster size past the header",
                self.table_offset
            )));
        }
        if !(1..=MAX_TABLE_ENTRIES).contains(&self.table_entries) {
            return Err(Error::corrupt(format!(
                "Bitmap table has {} entries; 1 to {MAX_TABLE_ENTRIES} are allowed",
                self.table_entries
            )));
        }
        if !(9..=31).contains(&self.granularity_bits) {
            return Err(Error::corrupt(format!(
                "Granularity is 2^{} bytes; 2^9 to 2^31 are allowed",
                self.granularity_bits
            )));
        }
        if !(1..=MAX_NAME_BYTES).contains(&self.name.len()) {
            return Err(Error::corrupt(format!(
                "Name has {} bytes; 1 to {MAX_NAME_BYTES} are allowed",
                self.name.len()
            )));
        }
        Ok(())
    }

    fn check_coverage(&self, geometry: &Geometry, disk_size_bytes: u64) -> Result<()> {
        let data_bytes = u64::from(self.table_entries).saturating_mul(geometry.cluster_bytes());
        if data_bytes > MAX_DATA_BYTES {
            return Err(Error::corrupt(format!(
                "Bitmap has {data_bytes} bytes; at most {MAX_DATA_BYTES} are allowed"
            )));
        }
        // At most 2^32 bits of 2^31 bytes each.
        let covered_bytes = data_bytes
            .saturating_mul(8)
            .checked_shl(self.granularity_bits.into())
            .unwrap_or(u64::MAX);
        let covered = covered_bytes >= disk_size_bytes;
        if !covered && !self.flags.contains(BitmapFlags::IN_USE) {
            return Err(Error::corrupt(format!(
                "Bitmap of {data_bytes} bytes does not cover a disk of {disk_size_bytes} bytes"
            )));
        }
        Ok(())
    }

    /// Decodes the entry at the start of `bytes` with its padded length.
    fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let (raw, rest) = RawBitmapEntry::read_from_prefix(bytes).ok()?;
        let (extra, rest) = rest.split_at_checked(usize::try_from(raw.extra_bytes.get()).ok()?)?;
        let (name, _) = rest.split_at_checked(raw.name_bytes.get().into())?;
        let len = size_of::<RawBitmapEntry>()
            .checked_add(extra.len())?
            .checked_add(name.len())?
            .checked_next_multiple_of(8)?;
        let entry = Self {
            table_offset: HostOffset(raw.table_offset.get()),
            table_entries: raw.table_entries.get(),
            flags: BitmapFlags::from_bits_retain(raw.flags.get()),
            kind: raw.kind,
            granularity_bits: raw.granularity_bits,
            name: StoredName::new(name),
            extra_data: extra.to_vec(),
        };
        Some((entry, len))
    }

    fn encode(&self, bytes: &mut Vec<u8>) -> Result<()> {
        let name_bytes = u16::try_from(self.name.len());
        let extra_bytes = u32::try_from(self.extra_data.len());
        let (Ok(name_bytes), Ok(extra_bytes)) = (name_bytes, extra_bytes) else {
            return Err(Error::invalid(format!(
                "Bitmap has a name of {} bytes; at most {MAX_NAME_BYTES} are allowed",
                self.name.len()
            )));
        };
        let raw = RawBitmapEntry {
            table_offset: self.table_offset.0.into(),
            table_entries: self.table_entries.into(),
            flags: self.flags.bits().into(),
            kind: self.kind,
            granularity_bits: self.granularity_bits,
            name_bytes: name_bytes.into(),
            extra_bytes: extra_bytes.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&self.extra_data);
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok(())
    }
}

fn broken_directory(index: usize, left: usize) -> Error {
    Error::corrupt(format!(
        "Bitmap directory entry {index} reaches past the {left} bytes that are left"
    ))
}

/// What an entry of a bitmap table stands for.
///
/// ```
/// use lacuna::qcow2::format::{BitmapCluster, BitmapTableEntry};
/// assert_eq!(BitmapTableEntry(1).cluster(), BitmapCluster::AllOnes);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BitmapCluster {
    /// No cluster: every bit is set.
    AllOnes,
    /// No cluster: every bit is clear.
    AllZeros,
    /// The bits lie in a cluster, lowest bit of a byte first.
    Data(HostOffset),
}

/// An entry of a bitmap table: bits 9 to 55 a cluster; without one, bit 0 is the value of all bits.
///
/// ```
/// use lacuna::qcow2::format::{BitmapCluster, BitmapTableEntry};
/// use lacuna::units::HostOffset;
/// let entry = BitmapTableEntry::new(BitmapCluster::Data(HostOffset(0x60000)));
/// assert_eq!(entry.0, 0x60000);
/// assert!(!entry.has_reserved_bits());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BitmapTableEntry(pub u64);

impl BitmapTableEntry {
    /// Makes an entry.
    #[must_use]
    pub const fn new(cluster: BitmapCluster) -> Self {
        match cluster {
            BitmapCluster::AllOnes => Self(1),
            BitmapCluster::AllZeros => Self(0),
            BitmapCluster::Data(offset) => Self(offset.0 & OFFSET_MASK),
        }
    }

    /// Returns what the entry stands for. The offset is not checked against the cluster size.
    #[must_use]
    pub const fn cluster(self) -> BitmapCluster {
        match (self.0 & OFFSET_MASK, self.0 & 1) {
            (0, 0) => BitmapCluster::AllZeros,
            (0, _) => BitmapCluster::AllOnes,
            (offset, _) => BitmapCluster::Data(HostOffset(offset)),
        }
    }

    /// Says whether the entry names a cluster that lies in the file, or none, and nothing else.
    pub(crate) fn is_sound(self, geometry: &Geometry, file_bytes: u64) -> bool {
        let is_inside = |offset: HostOffset| {
            let end = offset.0.checked_add(geometry.cluster_bytes());
            geometry.is_aligned(offset.0) && end.is_some_and(|end| end <= file_bytes)
        };
        match self.cluster() {
            _ if self.has_reserved_bits() => false,
            BitmapCluster::Data(offset) => is_inside(offset),
            BitmapCluster::AllOnes | BitmapCluster::AllZeros => true,
        }
    }

    /// Says whether a bit is set that the format reserves.
    #[must_use]
    pub const fn has_reserved_bits(self) -> bool {
        let value_bit = if self.0 & OFFSET_MASK == 0 { 1 } else { 0 };
        self.0 & !(OFFSET_MASK | value_bit) != 0
    }
}
