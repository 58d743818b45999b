//! The bytes of header, index and footer. Pure: no I/O.

use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use lacuna::{Error, Result};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_ENTRIES, MAX_FRAME_BYTES};
use crate::checksum::{CHECKSUM_BYTES, Checksum};

const MAGIC: [u8; 8] = *b"LACUNASG";
const END_MAGIC: [u8; 8] = *b"LACUNAIX";
const VERSION: u32 = 1;

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = size_of::<RawHeader>();
/// Bytes of an index entry.
const ENTRY_BYTES: usize = size_of::<RawEntry>();
/// Bytes of the footer.
pub(crate) const TAIL_BYTES: usize = size_of::<RawFooter>();

#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    begun: [u8; CHECKSUM_BYTES],
}

#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    start: U64,
    len: U64,
    offset: U64,
    stored: U32,
    kind: U32,
    checksum: [u8; CHECKSUM_BYTES],
}

#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    entries: U32,
    reserved: U32,
    from: U64,
    to: U64,
    checksum: [u8; CHECKSUM_BYTES],
}

const _: () = assert!(HEADER_BYTES == 48 && ENTRY_BYTES == 64 && TAIL_BYTES == 64);

/// What a segment begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Checksum of what its point was begun as: segments of another try are none of this one's.
    pub(crate) begun: Checksum,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// `Corrupt` for anything that is none, `Unsupported` for one of a later version.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| no_segment())?;
        match (raw.magic == MAGIC, raw.version.get(), raw.reserved.get()) {
            (true, VERSION, 0) => Ok(Self { begun: Checksum(raw.begun) }),
            (true, version, _) if version > VERSION => Err(Error::unsupported(format!(
                "The segment has version {version}; up to {VERSION} can be read"
            ))),
            _ => Err(no_segment()),
        }
    }

    /// Returns its bytes.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            begun: self.begun.0,
        })
    }
}

fn no_segment() -> Error {
    Error::corrupt("This is no segment of a backup")
}

/// How a range is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// As it is.
    Plain,
    /// Not at all: it reads as zeros.
    Zero,
    /// As one zstd frame.
    Zstd,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Zero, Self::Zstd, Self::Plain];

    fn of(code: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }

    fn code(self) -> u32 {
        match self {
            Self::Zero => 0,
            Self::Zstd => 1,
            Self::Plain => 2,
        }
    }
}

/// A range of the disk and how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Of the disk.
    pub(crate) range: GuestRange,
    /// How it is stored.
    pub(crate) kind: Kind,
    /// Where in the segment; nothing is there of zeros.
    pub(crate) stored: HostRange,
    /// Of the stored bytes.
    pub(crate) checksum: Checksum,
}

impl Entry {
    /// Describes a range of zeros behind frames that end at `offset`.
    pub(crate) fn zeros(range: GuestRange, offset: HostOffset) -> Self {
        let stored = HostRange::new(offset, 0);
        Self { range, kind: Kind::Zero, stored, checksum: Checksum::NONE }
    }

    fn encode(&self) -> RawEntry {
        RawEntry {
            start: self.range.start.0.into(),
            len: self.range.len.into(),
            offset: self.stored.start.0.into(),
            // A frame is at most 1 MiB long, and never stored longer than that.
            stored: (self.stored.len as u32).into(),
            kind: self.kind.code().into(),
            checksum: self.checksum.0,
        }
    }

    /// Reads an entry; `guest` and `host` are what is left of the disk and of the frames.
    fn decode(raw: &RawEntry, guest: GuestRange, host: HostRange) -> Result<Self, &'static str> {
        let (start, len) = (GuestOffset(raw.start.get()), raw.len.get());
        let kind = Kind::of(raw.kind.get()).ok_or("is of an unknown kind")?;
        let end = start.checked_add(len);
        if len == 0 || start < guest.start || end.is_none_or(|end| end > guest.end()) {
            return Err("names a range that is not left of the disk");
        }
        let stored = u64::from(raw.stored.get());
        if raw.offset.get() != host.start.0 || stored > host.len {
            return Err("does not lie right behind the frame before it");
        }
        let is_fine = match kind {
            Kind::Plain => stored == len && len <= MAX_FRAME_BYTES,
            Kind::Zero => stored == 0 && raw.checksum == Checksum::NONE.0,
            Kind::Zstd => (1..len).contains(&stored) && len <= MAX_FRAME_BYTES,
        };
        let (range, stored) = (GuestRange::new(start, len), HostRange::new(host.start, stored));
        let entry = Self { range, kind, stored, checksum: Checksum(raw.checksum) };
        is_fine.then_some(entry).ok_or("has a length that its kind does not allow")
    }
}

/// What a segment ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Entries of the index.
    pub(crate) entries: usize,
    /// Which part of the disk the segment tells of; nothing was recorded where no entry is.
    pub(crate) covers: GuestRange,
    /// Of header, index and the fields above.
    pub(crate) checksum: Checksum,
}

impl Footer {
    /// Reads a footer.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(crate) fn decode(bytes: &[u8; TAIL_BYTES]) -> Result<Self> {
        let wrong = |what| Error::corrupt(format!("The footer of the segment {what}"));
        let raw = RawFooter::ref_from_bytes(bytes).map_err(|_| wrong("is none"))?;
        if raw.magic != END_MAGIC || raw.reserved.get() != 0 {
            return Err(wrong("is none: it is not whole"));
        }
        let entries = usize::try_from(raw.entries.get()).unwrap_or(usize::MAX);
        if !(1..=MAX_ENTRIES).contains(&entries) {
            return Err(wrong(&format!("names {entries} entries, of at most {MAX_ENTRIES}")));
        }
        let (from, to) = (raw.from.get(), raw.to.get());
        let len = to.checked_sub(from).filter(|len| *len > 0 && to <= i64::MAX as u64);
        let len = len.ok_or_else(|| wrong("covers no part of a disk"))?;
        let covers = GuestRange::new(GuestOffset(from), len);
        Ok(Self { entries, covers, checksum: Checksum(raw.checksum) })
    }

    fn encode(&self) -> [u8; TAIL_BYTES] {
        zerocopy::transmute!(RawFooter {
            magic: END_MAGIC,
            // At most MAX_ENTRIES.
            entries: (self.entries as u32).into(),
            reserved: 0.into(),
            from: self.covers.start.0.into(),
            to: self.covers.end().0.into(),
            checksum: self.checksum.0,
        })
    }

    /// Bytes of the index in front of it.
    pub(crate) const fn index_bytes(&self) -> usize {
        self.entries * ENTRY_BYTES
    }
}

/// The index of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    /// Which part of the disk the segment tells of.
    pub(crate) covers: GuestRange,
    /// In guest order, which is also that of the frames; at least one.
    pub(crate) entries: Vec<Entry>,
    /// Of header and index.
    pub(crate) checksum: Checksum,
}

/// What of the footer its own checksum covers.
const FOOTER_HEAD: usize = TAIL_BYTES - CHECKSUM_BYTES;

impl Index {
    /// Reads an index, whose bytes lie at `offset` right in front of the footer.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(crate) fn decode(
        header: &[u8; HEADER_BYTES],
        bytes: &[u8],
        footer: &[u8; TAIL_BYTES],
        offset: HostOffset,
    ) -> Result<Self> {
        let tail = Footer::decode(footer)?;
        if bytes.len() != tail.index_bytes() {
            return Err(Error::corrupt("The segment is too short for its index"));
        }
        let found = Checksum::of_pieces(&[header, bytes, &footer[..FOOTER_HEAD]]);
        if found != tail.checksum {
            return Err(Error::corrupt("The index of the segment does not fit its checksum"));
        }
        let raw = <[RawEntry]>::ref_from_bytes(bytes)
            .map_err(|_| Error::corrupt("The index of the segment is cut off"))?;
        let frames = HostOffset(HEADER_BYTES as u64);
        let len = offset.0.checked_sub(frames.0);
        let len = len.ok_or_else(|| Error::corrupt("The segment is too short for its index"))?;
        let entries = entries(raw, tail.covers, HostRange::new(frames, len))?;
        Ok(Self { covers: tail.covers, entries, checksum: tail.checksum })
    }

    /// Returns index and footer as bytes, for a segment that begins with `header`, and the checksum
    /// that they end with.
    pub(crate) fn encode(
        covers: GuestRange,
        entries: &[Entry],
        header: &[u8; HEADER_BYTES],
    ) -> (Vec<u8>, Checksum) {
        assert!((1..=MAX_ENTRIES).contains(&entries.len()), "a segment has entries, and not many");
        let raw: Vec<RawEntry> = entries.iter().map(Entry::encode).collect();
        let mut bytes = raw.as_bytes().to_vec();
        let tail = Footer { entries: entries.len(), covers, checksum: Checksum::NONE };
        let checksum = Checksum::of_pieces(&[header, &bytes, &tail.encode()[..FOOTER_HEAD]]);
        bytes.extend_from_slice(&Footer { checksum, ..tail }.encode());
        (bytes, checksum)
    }

    /// Returns the entry that covers `at` or, where none does, the first one behind it.
    pub(crate) fn at_or_behind(&self, at: GuestOffset) -> Option<&Entry> {
        let index = self.entries.partition_point(|entry| entry.range.end() <= at);
        self.entries.get(index)
    }
}

/// Reads all entries; they fill the frames without gaps, and follow each other on the disk.
fn entries(raw: &[RawEntry], guest: GuestRange, host: HostRange) -> Result<Vec<Entry>> {
    let (mut entries, mut guest, mut host) = (Vec::with_capacity(raw.len()), guest, host);
    for (number, raw) in raw.iter().enumerate() {
        let entry = Entry::decode(raw, guest, host)
            .map_err(|what| Error::corrupt(format!("Entry {number} of the segment {what}")))?;
        let end = entry.range.end();
        guest = GuestRange::new(end, guest.end() - end);
        let end = entry.stored.end();
        host = HostRange::new(end, host.end() - end);
        entries.push(entry);
    }
    match host.is_empty() {
        true => Ok(entries),
        false => Err(Error::corrupt("The segment holds bytes that no entry names")),
    }
}
