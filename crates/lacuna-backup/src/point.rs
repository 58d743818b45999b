//! What is known of a restore point: what it was begun as, and the manifest that makes it count.

use lacuna::Result;
use lacuna::units::{GuestOffset, GuestRange};
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::name::PointName;
use crate::sealed::Sealed;

/// The version of manifests that is written, and the last that is read.
const VERSION: u32 = 1;
/// Longest text of a manifest that nobody chose.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// How the points of a backup keep what they hold.
///
/// ```
/// assert_eq!(lacuna_backup::Form::default(), lacuna_backup::Form::Segments);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Compressed segments.
    #[default]
    Segments,
    /// A qcow2 image for each point, which stands on that of the point below it.
    Qcow2,
}

impl Form {
    /// Returns what it is called in manifests and on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Segments => "segments",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An internal snapshot, told apart from others that have had its name.
///
/// Made from what the image says of it; two are the same snapshot where all fields agree.
///
/// ```
/// use lacuna_backup::SnapshotFacts;
/// let monday = SnapshotFacts { id: "1".into(), name: "monday".into(), ..Default::default() };
/// assert_ne!(monday, SnapshotFacts { seconds: 5, ..monday.clone() });
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotFacts {
    /// Its identifier in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub seconds: u64,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest had run by then.
    pub guest_nanoseconds: u64,
}

/// How it was known what a point has to hold.
///
/// ```
/// use lacuna_backup::Basis;
/// assert!(Basis::Bitmap { name: "b0".into() }.is_incremental());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Basis {
    /// All of the disk.
    Full,
    /// What a dirty bitmap names.
    Bitmap {
        /// What it is called.
        name: String,
    },
    /// What differs from an internal snapshot.
    Snapshot {
        /// The snapshot, which the point below holds.
        since: SnapshotFacts,
    },
    /// What the highest levels of a chain hold; the point below holds the rest of the chain.
    Levels {
        /// How many levels.
        count: u32,
    },
}

impl Basis {
    /// Says whether the point holds only what changed since another.
    #[must_use]
    pub const fn is_incremental(&self) -> bool {
        !matches!(self, Self::Full)
    }
}

/// A restore point as others refer to it.
///
/// ```
/// use lacuna_backup::{Checksum, PointName, PointRef};
/// let name = PointName::new("monday").unwrap();
/// let monday = PointRef { point: name, checksum: Checksum::of(b"its manifest") };
/// assert_eq!(monday.point.as_str(), "monday");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PointRef {
    /// What it is called.
    pub point: PointName,
    /// The checksum of its manifest: another point of that name is another point.
    pub checksum: Checksum,
}

/// What a point is begun as: known before the first byte is copied.
///
/// ```
/// use lacuna_backup::{Basis, PointFacts, PointName};
/// let facts = PointFacts {
///     created: 1_795_758_620,
///     source: "disk.qcow2".into(),
///     ..PointFacts::full(PointName::new("monday").unwrap(), 1 << 30)
/// };
/// assert_eq!(facts.basis, Basis::Full);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PointFacts {
    /// What it is called.
    pub point: PointName,
    /// Its place in the order in which points of its folder were begun; given by the folder.
    pub number: u64,
    /// When it was begun, in seconds since 1970.
    pub created: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// How it was known what to hold.
    pub basis: Basis,
    /// The point that it stands on; an incremental one has one.
    pub stands_on: Option<PointRef>,
    /// The dirty bitmap of the image that names what changed since this point.
    pub begins_bitmap: Option<String>,
    /// The internal snapshot that it is a copy of.
    pub holds_snapshot: Option<SnapshotFacts>,
    /// What was copied, for people.
    pub source: String,
    /// The format that the source has.
    pub source_format: String,
    /// What tells that the source is still what it was, where anything does: a copy that was cut off
    /// goes on only where this is the same.
    pub identity: Option<String>,
}

impl PointFacts {
    /// Describes a full copy of a disk of which nothing else is known.
    #[must_use]
    pub fn full(point: PointName, size: u64) -> Self {
        Self {
            point,
            number: 0,
            created: 0,
            size,
            basis: Basis::Full,
            stands_on: None,
            begins_bitmap: None,
            holds_snapshot: None,
            source: String::new(),
            source_format: "raw".into(),
            identity: None,
        }
    }

    /// Says whether a copy that was begun as `self` is the one that `wanted` describes, and of what
    /// is known to be the same still, or vouched for.
    pub(crate) fn goes_on_as(&self, wanted: &Self, is_unchanged: bool) -> bool {
        let mut wanted = wanted.clone();
        wanted.point.clone_from(&self.point);
        wanted.source.clone_from(&self.source);
        (wanted.number, wanted.created) = (self.number, self.created);
        if is_unchanged {
            wanted.identity.clone_from(&self.identity);
        }
        (is_unchanged || self.identity.is_some()) && *self == wanted
    }

    fn check(&self) -> Result<(), String> {
        let texts =
            [&self.source, &self.source_format, self.identity.as_ref().unwrap_or(&self.source)];
        if texts.iter().any(|text| text.len() > MAX_TEXT_BYTES) {
            return Err(format!("A text is longer than {MAX_TEXT_BYTES} bytes"));
        }
        match (self.basis.is_incremental(), &self.stands_on) {
            _ if i64::try_from(self.size).is_err() => {
                Err(format!("The disk has {} bytes, more than a disk can have", self.size))
            }
            (true, None) => Err("An incremental point stands on no other".into()),
            (false, Some(_)) => Err("A full point stands on another".into()),
            (_, Some(below)) if below.point == self.point => Err("A point stands on itself".into()),
            _ => Ok(()),
        }
    }
}

/// A point that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begun {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) facts: PointFacts,
}

impl Begun {
    pub(crate) const fn new(facts: PointFacts) -> Self {
        Self { version: VERSION, facts }
    }
}

impl Sealed for Begun {
    const MEMBER: &'static str = "lacuna-begun";

    fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        self.facts.check()
    }
}

fn check_version(version: u32) -> Result<(), String> {
    match version {
        VERSION => Ok(()),
        _ => Err(format!("It has version {version}; {VERSION} can be read")),
    }
}

/// A segment as the manifest knows it. They are numbered in their order.
///
/// Read from a [`Manifest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SegmentFacts {
    /// The first byte of the disk that it tells of.
    pub start: u64,
    /// The byte of the disk behind the last one.
    pub end: u64,
    /// Length of the file.
    pub bytes: u64,
    /// The checksum of its header and index, which hold those of everything else.
    pub checksum: Checksum,
}

impl SegmentFacts {
    /// Returns the part of the disk that it tells of.
    pub(crate) fn covers(&self) -> GuestRange {
        GuestRange::new(GuestOffset(self.start), self.end - self.start)
    }
}

/// Where a point has what it holds.
///
/// Read from a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", tag = "form")]
pub enum Content {
    /// In segments, in guest order. What none of them tells of was not recorded.
    Segments {
        /// All of them.
        segments: Vec<SegmentFacts>,
    },
    /// In a qcow2 image.
    Qcow2 {
        /// Length of the file.
        bytes: u64,
        /// The checksum of the file.
        checksum: Checksum,
    },
}

impl Content {
    /// Returns the form.
    #[must_use]
    pub const fn form(&self) -> Form {
        match self {
            Self::Segments { .. } => Form::Segments,
            Self::Qcow2 { .. } => Form::Qcow2,
        }
    }
}

/// What makes a point count: written last, when all that it names is durable.
///
/// Returned by [`Work::finish`](crate::Work::finish) and [`Folder::points`](crate::Folder::points),
/// which has an example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    version: u32,
    /// What it was begun as.
    #[serde(flatten)]
    pub facts: PointFacts,
    /// Bytes of the disk that it holds as data,
    pub data_bytes: u64,
    /// as zeros that were recorded,
    pub zero_bytes: u64,
    /// and the bytes that all its files take.
    pub stored_bytes: u64,
    /// Where those are.
    pub content: Content,
}

impl Manifest {
    pub(crate) const fn new(facts: PointFacts, totals: Totals, content: Content) -> Self {
        let Totals { data_bytes, zero_bytes, stored_bytes } = totals;
        Self { version: VERSION, facts, data_bytes, zero_bytes, stored_bytes, content }
    }

    /// Reads a manifest from the bytes of its file, whose checksum is returned too.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Checksum)> {
        crate::sealed::decode(bytes)
    }

    /// Returns the bytes of its file.
    ///
    /// # Errors
    /// None for a manifest that was read.
    pub fn encode(&self) -> Result<Vec<u8>> {
        crate::sealed::encode(self).map(|(bytes, _)| bytes)
    }
}

impl Sealed for Manifest {
    const MEMBER: &'static str = "lacuna-point";

    fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        self.facts.check()?;
        let Content::Segments { segments } = &self.content else { return Ok(()) };
        let mut end = 0;
        for segment in segments {
            if segment.start < end || segment.start >= segment.end {
                return Err("Segments are out of order".into());
            }
            end = segment.end;
        }
        match end <= self.facts.size {
            true => Ok(()),
            false => Err("A segment passes the end of the disk".into()),
        }
    }
}

/// What a point adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) stored_bytes: u64,
}
