//! The snapshot table (B.9): entries of varying length behind each other, each 8-byte aligned.
//!
//! | byte | size | field |
//! |---|---|---|
//! | 0, 8 | 8, 4 | L1 table: offset, entries |
//! | 12, 14 | 2, 2 | bytes of the identifier and of the name |
//! | 16, 20 | 4, 4 | time of creation: seconds, nanoseconds |
//! | 24 | 8 | how long the guest had run, in nanoseconds |
//! | 32 | 4 | bytes of VM state, 0 where they do not fit |
//! | 36 | 4 | bytes of extra data |
//! | 40, 48, 56 | 8, 8, 8 | extra: bytes of VM state, disk size, instruction count (-1: none) |
//! | 64 | | extra data of a later version, kept; then identifier, name, zeros |
//!
//! * Always: one entry takes at most 1 KiB of extra data, the table at most 64 MiB (B.11).
//! * Never: a snapshot's L1 table is trusted because its entry was decoded:
//!   [`Snapshot::check_l1`] comes first.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;
use super::header::{L1Location, MAX_L1_BYTES, SnapshotTableLocation, check_table};
use super::name::StoredName;
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// Most extra data of one entry in bytes.
const MAX_EXTRA_BYTES: u32 = 1024;
/// Largest table in bytes.
const MAX_TABLE_BYTES: u64 = 1024 * 65536;
/// Extra data that QEMU writes.
const KNOWN_EXTRA_BYTES: usize = 24;
/// How much of the table is asked for at a time.
const STEP_BYTES: u64 = 64 << 10;

/// An internal snapshot as the table describes it.
///
/// ```
/// use lacuna::qcow2::format::{L1Location, Snapshot};
/// use lacuna::units::HostOffset;
/// let l1 = L1Location { offset: HostOffset(0x50000), entries: 1 };
/// let snapshot = Snapshot::new("1", "before the upgrade", l1, 1 << 20);
/// assert_eq!(Snapshot::encode_table(&[snapshot], 1 << 20)?.len(), 88);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table, unchecked.
    pub l1: L1Location,
    /// Unique in the table.
    pub id: StoredName,
    /// What people call it.
    pub name: StoredName,
    /// When it was made: seconds since 1970.
    pub created_seconds: u32,
    /// The fraction of that second in nanoseconds.
    pub created_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub guest_clock_nanoseconds: u64,
    /// Size of the VM state in bytes; 0 without one.
    pub vm_state_bytes: u64,
    /// Size of the disk in bytes; version 2 may leave it out.
    pub disk_size_bytes: Option<u64>,
    /// How many instructions the guest had run, where QEMU counted them.
    pub instruction_count: Option<u64>,
    /// Extra data behind what is known.
    pub unknown_extra: Vec<u8>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    l1_offset: U64,
    l1_entries: U32,
    id_bytes: U16,
    name_bytes: U16,
    seconds: U32,
    nanoseconds: U32,
    guest_clock: U64,
    vm_state_bytes: U32,
    extra_bytes: U32,
}
const _: () = assert!(size_of::<RawSnapshot>() == 40);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtra {
    vm_state_bytes: U64,
    disk_size_bytes: U64,
    instruction_count: U64,
}
const _: () = assert!(size_of::<RawExtra>() == KNOWN_EXTRA_BYTES);

impl Snapshot {
    /// Makes a snapshot without VM state, made at second 0.
    #[must_use]
    pub fn new(id: &str, name: &str, l1: L1Location, disk_size_bytes: u64) -> Self {
        Self {
            l1,
            id: id.into(),
            name: name.into(),
            created_seconds: 0,
            created_nanoseconds: 0,
            guest_clock_nanoseconds: 0,
            vm_state_bytes: 0,
            disk_size_bytes: Some(disk_size_bytes),
            instruction_count: None,
            unknown_extra: Vec::new(),
        }
    }

    /// Decodes a table of `count` entries that was read as a whole.
    ///
    /// # Errors
    /// `Corrupt` where the bytes end early or an entry is outside of its limits.
    pub fn decode_table(mut bytes: &[u8], count: u32) -> Result<Vec<Self>> {
        let mut snapshots = Vec::new();
        for index in 0..count {
            let Some((snapshot, len)) = Self::decode(bytes, index)? else {
                return Err(Error::corrupt(format!(
                    "Snapshot table ends within entry {index} of {count}"
                )));
            };
            snapshots.push(snapshot);
            bytes = bytes.get(len..).unwrap_or_default();
        }
        Ok(snapshots)
    }

    /// Encodes a table as QEMU does; entries that do not say get `disk_size_bytes` as disk size.
    ///
    /// # Errors
    /// `InvalidRequest` where an entry or the table would be outside of its limits.
    pub fn encode_table(snapshots: &[Self], disk_size_bytes: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for snapshot in snapshots {
            snapshot.encode(&mut bytes, disk_size_bytes)?;
        }
        if bytes.len() as u64 > MAX_TABLE_BYTES {
            return Err(Error::invalid(format!(
                "Snapshot table would have {} bytes; at most {MAX_TABLE_BYTES} are allowed",
                bytes.len()
            )));
        }
        Ok(bytes)
    }

    /// Checks that the L1 table lies where one can lie.
    ///
    /// # Errors
    /// `Corrupt` where it is too large or not cluster-aligned.
    pub fn check_l1(&self, geometry: &Geometry) -> Result<()> {
        let len_bytes = u64::from(self.l1.entries).saturating_mul(8);
        let what = format!("L1 table of snapshot '{}'", self.name);
        check_table(geometry, &what, self.l1.offset, len_bytes, MAX_L1_BYTES)
    }

    /// Decodes the entry at the start of `bytes` with its padded length; nothing where more bytes
    /// are needed.
    fn decode(bytes: &[u8], index: u32) -> Result<Option<(Self, usize)>> {
        let Ok((raw, rest)) = RawSnapshot::read_from_prefix(bytes) else { return Ok(None) };
        if raw.extra_bytes.get() > MAX_EXTRA_BYTES {
            return Err(Error::corrupt(format!(
                "Snapshot table entry {index} has {} bytes of extra data; at most \
                 {MAX_EXTRA_BYTES} are allowed",
                raw.extra_bytes
            )));
        }
        let parts = split(rest, usize::try_from(raw.extra_bytes.get()).unwrap_or(usize::MAX))
            .and_then(|(extra, rest)| {
                let (id, rest) = split(rest, raw.id_bytes.get().into())?;
                let (name, _) = split(rest, raw.name_bytes.get().into())?;
                Some((extra, id, name))
            });
        let Some((extra, id, name)) = parts else { return Ok(None) };
        let lens = [extra.len(), id.len(), name.len()];
        let len = lens.into_iter().fold(size_of::<RawSnapshot>(), usize::saturating_add);
        Ok(Some((raw.assemble(extra, id, name), len.next_multiple_of(8))))
    }

    fn encode(&self, bytes: &mut Vec<u8>, disk_size_bytes: u64) -> Result<()> {
        let extra_bytes = self.unknown_extra.len().saturating_add(KNOWN_EXTRA_BYTES);
        let raw = RawSnapshot {
            l1_offset: self.l1.offset.0.into(),
            l1_entries: self.l1.entries.into(),
            id_bytes: name_field(&self.id)?,
            name_bytes: name_field(&self.name)?,
            seconds: self.created_seconds.into(),
            nanoseconds: self.created_nanoseconds.into(),
            guest_clock: self.guest_clock_nanoseconds.into(),
            vm_state_bytes: u32::try_from(self.vm_state_bytes).unwrap_or(0).into(),
            extra_bytes: extra_field(extra_bytes)?,
        };
        let extra = RawExtra {
            vm_state_bytes: self.vm_state_bytes.into(),
            disk_size_bytes: self.disk_size_bytes.unwrap_or(disk_size_bytes).into(),
            instruction_count: self.instruction_count.unwrap_or(u64::MAX).into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(extra.as_bytes());
        bytes.extend_from_slice(&self.unknown_extra);
        bytes.extend_from_slice(self.id.as_bytes());
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok(())
    }
}

impl RawSnapshot {
    fn assemble(&self, extra: &[u8], id: &[u8], name: &[u8]) -> Snapshot {
        let [large, disk_size, count] = [0, 1, 2].map(|index| extra_word(extra, index));
        Snapshot {
            l1: L1Location {
                offset: HostOffset(self.l1_offset.get()),
                entries: self.l1_entries.get(),
            },
            id: StoredName::new(id),
            name: StoredName::new(name),
            created_seconds: self.seconds.get(),
            created_nanoseconds: self.nanoseconds.get(),
            guest_clock_nanoseconds: self.guest_clock.get(),
            vm_state_bytes: large.unwrap_or_else(|| self.vm_state_bytes.get().into()),
            disk_size_bytes: disk_size,
            instruction_count: count.filter(|count| *count != u64::MAX),
            unknown_extra: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or_default().to_vec(),
        }
    }
}

fn split(bytes: &[u8], at: usize) -> Option<(&[u8], &[u8])> {
    bytes.split_at_checked(at)
}

fn extra_word(extra: &[u8], index: usize) -> Option<u64> {
    extra.as_chunks::<8>().0.get(index).map(|bytes| u64::from_be_bytes(*bytes))
}

fn name_field(name: &StoredName) -> Result<U16> {
    u16::try_from(name.len()).map(U16::new).map_err(|_| {
        Error::invalid(format!(
            "Name or identifier of a snapshot has {} bytes; at most 65535 are allowed",
            name.len()
        ))
    })
}

fn extra_field(bytes: usize) -> Result<U32> {
    u32::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_EXTRA_BYTES).map(U32::new).ok_or_else(
        || {
            Error::invalid(format!(
                "Extra data of a snapshot has {bytes} bytes; at most {MAX_EXTRA_BYTES} are allowed"
            ))
        },
    )
}

/// Decodes a snapshot table of unknown length piece by piece, in bounded memory.
///
/// ```
/// use lacuna::qcow2::format::{SnapshotTableDecoder, SnapshotTableLocation};
/// use lacuna::units::HostOffset;
///
/// let file = vec![0; 0x20000];
/// let place = SnapshotTableLocation { offset: HostOffset(0x10000), count: 1 };
/// let mut decoder = SnapshotTableDecoder::new(place);
/// while let Some(range) = decoder.wanted() {
///     decoder.feed(&file[range.start.0 as usize..range.end().0 as usize])?;
/// }
/// assert_eq!(decoder.table_bytes(), 40);
/// assert_eq!(decoder.into_snapshots().len(), 1);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Debug)]
pub struct SnapshotTableDecoder {
    location: SnapshotTableLocation,
    decoded: Vec<Snapshot>,
    /// Where in the table each entry begins.
    starts: Vec<u64>,
    table_bytes: u64,
    /// Bytes behind the last decoded entry.
    pending: Vec<u8>,
}

impl SnapshotTableDecoder {
    /// Starts to decode the table at `location`.
    #[must_use]
    pub const fn new(location: SnapshotTableLocation) -> Self {
        Self {
            location,
            decoded: Vec::new(),
            starts: Vec::new(),
            table_bytes: 0,
            pending: Vec::new(),
        }
    }

    /// Returns the bytes to feed next, or nothing once the table is complete. What lies past the
    /// end of the file counts as zeros.
    #[must_use]
    pub fn wanted(&self) -> Option<HostRange> {
        let missing = u64::from(self.location.count) > self.decoded.len() as u64;
        let fed = self.table_bytes.saturating_add(self.pending.len() as u64);
        let start = self.location.offset.0.saturating_add(fed);
        missing.then_some(HostRange { start: HostOffset(start), len: STEP_BYTES })
    }

    /// Takes the bytes that were wanted.
    ///
    /// # Errors
    /// `Corrupt` where an entry or the table is outside of its limits.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(bytes);
        let mut taken = 0;
        while u64::from(self.location.count) > self.decoded.len() as u64 {
            let index = u32::try_from(self.decoded.len()).unwrap_or(u32::MAX);
            let rest = self.pending.get(taken..).unwrap_or_default();
            let Some((snapshot, len)) = Snapshot::decode(rest, index)? else { break };
            self.decoded.push(snapshot);
            self.starts.push(self.table_bytes);
            taken = taken.saturating_add(len);
            self.table_bytes = self.table_bytes.saturating_add(len as u64);
            if self.table_bytes > MAX_TABLE_BYTES {
                return Err(Error::corrupt(format!(
                    "Snapshot table has more than {MAX_TABLE_BYTES} bytes, which is the limit"
                )));
            }
        }
        self.pending.drain(..taken.min(self.pending.len()));
        Ok(())
    }

    /// Returns the size in bytes of the entries so far: of the table, once it is complete.
    #[must_use]
    pub const fn table_bytes(&self) -> u64 {
        self.table_bytes
    }

    /// Returns where in the table each entry begins, in bytes.
    #[must_use]
    pub(crate) fn starts(&self) -> &[u64] {
        &self.starts
    }

    /// Returns what was decoded, in the order of the table.
    #[must_use]
    pub fn into_snapshots(self) -> Vec<Snapshot> {
        self.decoded
    }
}
