//! What a case is: an image, requests, and what they must leave.

use std::fmt;

use crate::Layout;
use crate::protocol::{Mode, Need};

/// A case of the suite.
///
/// ```
/// let cases = lacuna_conform::suite::all(1);
/// let case = cases.iter().find(|case| case.name == "sharing/snapshot-tables").unwrap();
/// assert!(case.proves.contains("snapshot"));
/// ```
#[derive(Clone)]
pub struct Case {
    /// Its name: a group, a slash, and what it is about.
    pub name: String,
    /// What an engine that passes has shown, as a sentence.
    pub proves: String,
    /// Where the format demands it: a section of the specification of qcow2.
    pub section: &'static str,
    /// What an engine must be able to do for this.
    pub needs: Vec<Need>,
    /// The image and what is in it.
    pub layout: Layout,
    /// What is asked of the driver, in order.
    pub steps: Vec<Step>,
    /// How it must end.
    pub expect: Expect,
    /// What must hold of the files afterwards, beside what always must.
    pub facts: Vec<Fact>,
}

impl Case {
    /// Starts a case; what it needs follows from its image and what is asked.
    pub(crate) fn new(
        name: impl Into<String>,
        proves: impl Into<String>,
        section: &'static str,
        layout: Layout,
        steps: impl IntoIterator<Item = Step>,
    ) -> Self {
        let steps: Vec<Step> = steps.into_iter().collect();
        let mut needs = layout.needs().clone();
        needs.extend(steps.iter().filter_map(Step::need));
        let facts = layout.has_shared().then_some(Fact::CopiedMayMiss).into_iter().collect();
        Self {
            name: name.into(),
            proves: proves.into(),
            section,
            needs: needs.into_iter().collect(),
            layout,
            steps,
            expect: Expect::Works,
            facts,
        }
    }

    pub(crate) fn fact(mut self, fact: Fact) -> Self {
        self.facts.push(fact);
        self
    }

    pub(crate) fn refuses(self) -> Self {
        Self { expect: Expect::Refuses, ..self }
    }

    pub(crate) fn survives(self, clusters: &[u64]) -> Self {
        Self { expect: Expect::Survives(clusters.into()), ..self }
    }
}

/// What is asked of the driver.
///
/// ```
/// use lacuna_conform::Step;
/// assert_eq!(Step::Write { at: 512, len: 1024, seed: 3 }.to_string(), "write 512 1024 (seed 3)");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Opens the image.
    Open(Mode),
    /// Writes [`content`](crate::content).
    Write {
        /// Offset on the disk.
        at: u64,
        /// How many bytes.
        len: u64,
        /// Which bytes.
        seed: u64,
    },
    /// Zeroes a range.
    Zero {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
    /// Discards a range.
    Discard {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
    },
    /// Reads a range and compares it.
    Read {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
    },
    /// Reads the whole disk, a large one at the edges of clusters, and compares it.
    Verify,
    /// Asks for extents, where the engine has them, and compares what is called zero.
    Extents,
    /// Flushes.
    Flush,
    /// Ends the driver at once, and starts another.
    Kill,
    /// Closes the image.
    Close,
}

impl Step {
    const fn need(&self) -> Option<Need> {
        match self {
            Self::Open(Mode::Write) | Self::Write { .. } => Some(Need::Write),
            Self::Zero { .. } => Some(Need::Zero),
            Self::Discard { .. } => Some(Need::Discard),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(Mode::Read) => f.write_str("open ro"),
            Self::Open(Mode::Write) => f.write_str("open rw"),
            Self::Write { at, len, seed } => write!(f, "write {at} {len} (seed {seed})"),
            Self::Zero { at, len, unmap: false } => write!(f, "zero {at} {len}"),
            Self::Zero { at, len, unmap: true } => write!(f, "zero {at} {len} unmap"),
            Self::Discard { at, len } => write!(f, "discard {at} {len}"),
            Self::Read { at, len } => write!(f, "read {at} {len}"),
            Self::Verify => f.write_str("read and compare all"),
            Self::Extents => f.write_str("extents of all"),
            Self::Flush => f.write_str("flush"),
            Self::Kill => f.write_str("kill"),
            Self::Close => f.write_str("close"),
        }
    }
}

/// How a case must end.
///
/// ```
/// assert_ne!(lacuna_conform::Expect::Works, lacuna_conform::Expect::Refuses);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Every request succeeds; the image is sound afterwards.
    Works,
    /// Opening fails, and no file was changed.
    Refuses,
    /// The image is damaged: any request may fail, each is answered in time, what was read where
    /// nothing is damaged is right, and these clusters of the disk can be read as before
    /// afterwards.
    Survives(Vec<u64>),
}

/// What must hold of the files afterwards.
///
/// ```
/// assert_ne!(lacuna_conform::Fact::MayLeak, lacuna_conform::Fact::Unchanged);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// These autoclear bits are not set.
    AutoclearGone(u64),
    /// These compatible bits are set.
    CompatibleKept(u64),
    /// There is a header extension with this magic and these bytes.
    ExtensionKept(u32, Vec<u8>),
    /// The dirty bit is not set, or a check is what it asks for.
    DirtySettled,
    /// The copied flag may be missing of a cluster that is used once: of several entries that shared
    /// it one is left, and no engine keeps a list of which.
    CopiedMayMiss,
    /// Leaks are no fault: the engine was ended by force.
    MayLeak,
    /// The header still says that the bitmap is up to date only if it has the range marked, or is
    /// in use.
    BitmapTrue {
        /// Offset of what was written.
        at: u64,
    },
    /// If the header says so, the data file holds the bytes of the disk.
    RawDataFile,
    /// The image is byte for byte as it was.
    Unchanged,
}
