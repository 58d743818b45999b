//! What can be wrong with an image, as data; our words for it.

use std::fmt;

use crate::units::{HostCluster, HostOffset};

/// How a finding counts.
///
/// ```
/// assert_ne!(
///     lacuna::qcow2::check::FindingClass::Leak,
///     lacuna::qcow2::check::FindingClass::Corruption
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FindingClass {
    /// The format is violated.
    Corruption,
    /// Something could not be looked at.
    Error,
    /// A cluster has more refcount than references.
    Leak,
}

/// What can come of a finding if the image is used as it is.
///
/// ```
/// use lacuna::qcow2::check::{FindingKind, Harm};
/// use lacuna::units::HostCluster;
/// let leak = FindingKind::RefcountMismatch { cluster: HostCluster(5), refcount: 1, references: 0 };
/// assert_eq!(leak.harm(), Harm::Harmless);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Harm {
    /// Guest data is lost, unreadable, or can be overwritten.
    Harmful,
    /// Space or time is wasted, nothing else.
    Harmless,
}

/// One thing that a check found.
///
/// ```
/// use lacuna::qcow2::check::{Finding, FindingClass, FindingKind};
/// use lacuna::units::HostCluster;
///
/// let kind = FindingKind::RefcountMismatch { cluster: HostCluster(5), refcount: 1, references: 0 };
/// let finding = Finding { kind, occurrences: 1, repaired: false };
/// assert_eq!(finding.class(), FindingClass::Leak);
/// assert_eq!(finding.qemu_text(), "Leaked cluster 5 refcount=1 reference=0");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is; displayed in a sentence.
    pub kind: FindingKind,
    /// How often it counts: a table shared by three snapshots makes three of each.
    pub occurrences: u64,
    /// Whether it was put right.
    pub repaired: bool,
}

impl Finding {
    /// Returns how the finding counts.
    #[must_use]
    pub const fn class(&self) -> FindingClass {
        self.kind.class()
    }

    /// Returns what can come of it.
    #[must_use]
    pub const fn harm(&self) -> Harm {
        self.kind.harm()
    }

    /// Returns where in the image file it is, if it has a place there.
    #[must_use]
    pub const fn location(&self) -> Option<HostOffset> {
        self.kind.location()
    }
}

/// Everything that can be wrong with an image.
///
/// Entries are given as they are in the file. "Table" is the L2 table that the entry is in.
///
/// ```
/// use lacuna::qcow2::check::FindingKind;
/// use lacuna::units::HostCluster;
/// let kind = FindingKind::RefcountMismatch { cluster: HostCluster(5), refcount: 0, references: 1 };
/// assert_eq!(kind.to_string(), "Cluster 0x5 has refcount 0 but 1 references");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the fields are what the variant's text names")]
pub enum FindingKind {
    /// The bitmap directory or a bitmap table cannot be used; `text` says why.
    BitmapUnusable { at: HostOffset, text: String },
    /// An entry of a bitmap table has reserved bits, or an offset that is not aligned.
    BitmapEntryInvalid { table: HostOffset, index: u64, entry: u64 },
    /// The image claims by private autoclear bit `claim` that its disk is all zeros (2) or that it
    /// maps nothing (3), and this entry of an L2 table contradicts that.
    ClaimWrong { claim: u32, table: HostOffset, index: u64 },
    /// A compressed cluster has the copied flag.
    CompressedCopied { table: HostOffset, index: u64, entry: u64, offset: HostOffset },
    /// A compressed cluster in an image with an external data file.
    CompressedInDataFile { table: HostOffset, index: u64, entry: u64 },
    /// A compressed cluster with a subcluster bitmap.
    CompressedWithSubclusters { table: HostOffset, index: u64, entry: u64 },
    /// The copied flag of an L2 entry contradicts the refcount of its cluster.
    CopiedData { table: HostOffset, index: u64, entry: u64, refcount: u64 },
    /// The copied flag of an active L1 entry contradicts the refcount of its L2 table.
    CopiedTable { index: u64, entry: u64, refcount: u64 },
    /// The offset of a cluster with guest data is not aligned.
    DataUnaligned { table: HostOffset, index: u64, offset: HostOffset },
    /// An L1 entry has bits but no offset.
    L1Headless { index: u64, entry: u64 },
    /// An L1 entry has reserved bits.
    L1Reserved { index: u64, entry: u64 },
    /// The offset of an L2 table is not aligned.
    L1Unaligned { index: u64, offset: HostOffset },
    /// An L2 entry has reserved bits.
    L2Reserved { table: HostOffset, index: u64, entry: u64 },
    /// The table cannot be written because other metadata lies in its place.
    L2Overlaps { table: HostOffset },
    /// The offset of a reserved cluster without guest data is not aligned.
    PreallocatedUnaligned { table: HostOffset, index: u64, offset: HostOffset },
    /// A refcount block lies past the end of the file.
    RefcountBlockOutside { index: u64, offset: HostOffset },
    /// A refcount block is used by something else as well.
    RefcountBlockShared { index: u64, offset: HostOffset, references: u64 },
    /// The offset of a refcount block is not aligned.
    RefcountBlockUnaligned { index: u64, offset: HostOffset },
    /// Refcount and references differ: a leak where the refcount is greater.
    RefcountMismatch { cluster: HostCluster, refcount: u64, references: u64 },
    /// A cluster has more references than a refcount can hold.
    RefcountOverflow { offset: HostOffset },
    /// An entry of the refcount table has reserved bits.
    RefcountTableReserved { index: u64, entry: u64 },
    /// The refcount table is missing, or lies where it cannot.
    RefcountTableUnusable { at: HostOffset, bytes: u64 },
    /// The refcount of a cluster cannot be read.
    RefcountUnreadable { cluster: HostCluster, text: String },
    /// Something lies past the end of the file by a cluster or more.
    ReferencePastEnd { start: HostOffset, len: u64 },
    /// The repair could not be made; `text` says why.
    RepairImpossible { text: String },
    /// The extra data of a snapshot is longer than allowed.
    SnapshotExtraTooLarge { index: u64, bytes: u64 },
    /// A snapshot lacks the extra data that version 3 asks for.
    SnapshotIncomplete { index: u64 },
    /// The L1 table of a snapshot is too large.
    SnapshotL1TooLarge { id: String, name: String, entries: u64 },
    /// The L1 table of a snapshot is not aligned.
    SnapshotL1Unaligned { id: String, name: String, offset: HostOffset },
    /// The snapshot table claims more than the format allows.
    SnapshotsOverhanging { count: u64 },
    /// Snapshots in an image with an external data file.
    SnapshotsWithDataFile { count: u64 },
    /// The snapshot table cannot be used; `text` says why.
    SnapshotTableUnusable { at: HostOffset, text: String },
    /// A subcluster is both data and zeros.
    SubclustersInvalid { table: HostOffset, index: u64, offset: HostOffset },
    /// Most of its entries cannot be entries: a damaged pointer takes something else for a table, and
    /// a repair does not write to it.
    TableDoubtful { table: HostOffset },
    /// An L1 or L2 table could not be read; `text` says why.
    TableUnreadable { at: HostOffset, level: u8, text: String },
    /// More unaligned or overlapping tables than are looked at.
    TooManyTables { at: HostOffset },
    /// Subclusters hold data, but there is no host cluster.
    UnallocatedWithSubclusters { table: HostOffset, index: u64 },
    /// Bit 0 in an image whose version or entries have no zero flag there (001-9).
    ZeroFlagReserved { table: HostOffset, index: u64, entry: u64 },
}

impl FindingKind {
    /// Returns how the finding counts.
    #[must_use]
    pub const fn class(&self) -> FindingClass {
        match self {
            Self::RefcountMismatch { refcount, references, .. } if *refcount > *references => {
                FindingClass::Leak
            }
            Self::BitmapUnusable { .. }
            | Self::L2Overlaps { .. }
            | Self::RefcountUnreadable { .. }
            | Self::RepairImpossible { .. }
            | Self::SnapshotTableUnusable { .. }
            | Self::SnapshotsOverhanging { .. }
            | Self::SnapshotExtraTooLarge { .. }
            | Self::TableDoubtful { .. }
            | Self::TableUnreadable { .. }
            | Self::TooManyTables { .. } => FindingClass::Error,
            _ => FindingClass::Corruption,
        }
    }

    /// Returns what can come of it.
    #[must_use]
    pub const fn harm(&self) -> Harm {
        let harmless = match self {
            Self::RefcountMismatch { refcount, references, .. } => *refcount > *references,
            // Without the flag a cluster that could be written in place is copied first.
            Self::CopiedData { refcount, .. } | Self::CopiedTable { refcount, .. } => {
                *refcount == 1
            }
            Self::L1Headless { .. }
            | Self::PreallocatedUnaligned { .. }
            | Self::SnapshotIncomplete { .. } => true,
            _ => false,
        };
        if harmless { Harm::Harmless } else { Harm::Harmful }
    }

    /// Says whether new refcounts put it right.
    pub(crate) const fn is_of_refcounts(&self) -> bool {
        matches!(
            self,
            Self::RefcountBlockOutside { .. }
                | Self::RefcountBlockShared { .. }
                | Self::RefcountBlockUnaligned { .. }
                | Self::RefcountMismatch { .. }
                | Self::RefcountTableReserved { .. }
                | Self::RefcountTableUnusable { .. }
                | Self::RefcountUnreadable { .. }
        )
    }

    /// Returns where in the image file it is, if it has a place there: the entry or structure.
    #[must_use]
    pub const fn location(&self) -> Option<HostOffset> {
        match self {
            Self::BitmapUnusable { at, .. }
            | Self::RefcountTableUnusable { at, .. }
            | Self::SnapshotTableUnusable { at, .. }
            | Self::TableUnreadable { at, .. }
            | Self::TooManyTables { at } => Some(*at),
            Self::BitmapEntryInvalid { table, .. }
            | Self::CompressedCopied { table, .. }
            | Self::CompressedInDataFile { table, .. }
            | Self::CompressedWithSubclusters { table, .. }
            | Self::CopiedData { table, .. }
            | Self::DataUnaligned { table, .. }
            | Self::L2Reserved { table, .. }
            | Self::ClaimWrong { table, .. }
            | Self::L2Overlaps { table }
            | Self::PreallocatedUnaligned { table, .. }
            | Self::SubclustersInvalid { table, .. }
            | Self::TableDoubtful { table }
            | Self::UnallocatedWithSubclusters { table, .. }
            | Self::ZeroFlagReserved { table, .. } => Some(*table),
            Self::L1Unaligned { offset, .. }
            | Self::RefcountBlockOutside { offset, .. }
            | Self::RefcountBlockShared { offset, .. }
            | Self::RefcountBlockUnaligned { offset, .. }
            | Self::RefcountOverflow { offset }
            | Self::SnapshotL1Unaligned { offset, .. } => Some(*offset),
            Self::ReferencePastEnd { start, .. } => Some(*start),
            _ => None,
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BitmapUnusable { at, text } => {
                write!(f, "Bitmaps at {at} cannot be used: {text}")
            }
            Self::RefcountMismatch { cluster, refcount, references } => {
                write!(f, "Cluster {cluster} has refcount {refcount} but {references} references")
            }
            Self::RefcountOverflow { offset } => {
                write!(f, "Cluster at {offset} has more references than a refcount can hold")
            }
            Self::RefcountUnreadable { cluster, text } => {
                write!(f, "Refcount of cluster {cluster} cannot be read: {text}")
            }
            Self::ReferencePastEnd { start, len } => {
                write!(f, "{len} bytes at {start} are referenced but lie past the end of the file")
            }
            Self::RepairImpossible { text } => write!(f, "Cannot be repaired: {text}"),
            Self::TableUnreadable { at, level, text } => {
                write!(f, "L{level} table at {at} cannot be read: {text}")
            }
            Self::TooManyTables { at } => {
                write!(f, "Table at {at} is skipped: too many are not aligned or overlap")
            }
            _ => self.fmt_entry(f),
        }
    }
}

impl FindingKind {
    fn fmt_entry(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (table, index, what) = match self {
            Self::BitmapEntryInvalid { table, index, entry } => (
                table,
                index,
                format!("{entry:#018x} of a bitmap table has reserved bits or a bad offset"),
            ),
            Self::CompressedCopied { table, index, entry, .. } => {
                (table, index, format!("{entry:#018x} is compressed and has the copied flag"))
            }
            Self::CompressedInDataFile { table, index, entry } => {
                (table, index, format!("{entry:#018x} is compressed beside an external data file"))
            }
            Self::CompressedWithSubclusters { table, index, entry } => {
                (table, index, format!("{entry:#018x} is compressed and has a subcluster bitmap"))
            }
            Self::CopiedData { table, index, entry, refcount } => (
                table,
                index,
                format!("{entry:#018x}: its copied flag contradicts refcount {refcount}"),
            ),
            Self::DataUnaligned { table, index, offset } => {
                (table, index, format!("points to {offset}, which is not the start of a cluster"))
            }
            Self::L2Reserved { table, index, entry } => {
                (table, index, format!("{entry:#018x} has reserved bits"))
            }
            Self::PreallocatedUnaligned { table, index, offset } => {
                (table, index, format!("reserves {offset}, which is not the start of a cluster"))
            }
            Self::SubclustersInvalid { table, index, .. } => {
                (table, index, "has subclusters that are both data and zeros".to_owned())
            }
            Self::UnallocatedWithSubclusters { table, index } => {
                (table, index, "has subclusters with data but no host cluster".to_owned())
            }
            Self::ZeroFlagReserved { table, index, entry } => {
                (table, index, format!("{entry:#018x} has bit 0, which has no meaning here"))
            }
            _ => return self.fmt_structure(f),
        };
        write!(f, "Entry {index} of the table at {table}: {what}")
    }

    fn fmt_structure(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CopiedTable { index, entry, refcount } => write!(
                f,
                "L1 entry {index} ({entry:#018x}): its copied flag contradicts refcount {refcount}"
            ),
            Self::L1Headless { index, entry } => {
                write!(f, "L1 entry {index} ({entry:#018x}) has bits set but points nowhere")
            }
            Self::L1Reserved { index, entry } => {
                write!(f, "L1 entry {index} ({entry:#018x}) has reserved bits")
            }
            Self::L1Unaligned { index, offset } => write!(
                f,
                "L1 entry {index} points to {offset}, which is not the start of a cluster"
            ),
            Self::ClaimWrong { claim, table, index } => write!(
                f,
                "Autoclear bit {claim} claims that the image {}, but entry {index} of the L2 table \
                 at {table} contradicts it",
                if *claim == 2 { "is all zeros" } else { "maps nothing" },
            ),
            Self::L2Overlaps { table } => {
                write!(f, "L2 table at {table} is not written: other metadata lies there")
            }
            Self::TableDoubtful { table } => write!(
                f,
                "Table at {table} is not written: most of it makes no sense as a table, it may be \
                 something else"
            ),
            Self::RefcountBlockOutside { index, offset } => {
                write!(f, "Refcount block {index} at {offset} lies past the end of the file")
            }
            Self::RefcountBlockShared { index, offset, references } => write!(
                f,
                "Refcount block {index} at {offset} is referenced {references} times; once is right"
            ),
            Self::RefcountBlockUnaligned { index, offset } => {
                write!(f, "Refcount block {index} at {offset} is not at the start of a cluster")
            }
            Self::RefcountTableReserved { index, entry } => {
                write!(f, "Entry {index} of the refcount table ({entry:#018x}) has reserved bits")
            }
            Self::RefcountTableUnusable { at, bytes } => {
                write!(f, "Refcount table of {bytes} bytes at {at} cannot be used")
            }
            _ => self.fmt_snapshot(f),
        }
    }

    fn fmt_snapshot(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotExtraTooLarge { index, bytes } => {
                write!(f, "Snapshot {index} has {bytes} bytes of extra data; 1024 are allowed")
            }
            Self::SnapshotIncomplete { index } => {
                write!(f, "Snapshot {index} lacks its 64-bit VM state size and disk size")
            }
            Self::SnapshotL1TooLarge { id, name, entries } => write!(
                f,
                "Snapshot {} ({}): L1 table with {entries} entries is too large",
                id.escape_debug(),
                name.escape_debug()
            ),
            Self::SnapshotL1Unaligned { id, name, offset } => write!(
                f,
                "Snapshot {} ({}): L1 table at {offset} is not at the start of a cluster",
                id.escape_debug(),
                name.escape_debug()
            ),
            Self::SnapshotsOverhanging { count } => {
                write!(f, "Snapshot table has {count} snapshots more than the format allows")
            }
            Self::SnapshotsWithDataFile { count } => {
                write!(f, "{count} snapshots in an image with an external data file")
            }
            Self::SnapshotTableUnusable { at, text } => {
                write!(f, "Snapshot table at {at} cannot be used: {text}")
            }
            _ => Ok(()),
        }
    }
}
