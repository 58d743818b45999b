//! Offline check of an image, and the way into its repair.
//!
//! The story: `walk` counts in memory how often each host cluster is referenced, `compare`
//! holds the counts against the refcounts on disk, `copied` looks at the copied flags where the
//! first two saw a reason to. What they found is a [`CheckReport`]. With a repair asked for,
//! `repair` puts right what it can, and all is checked again.
//!
//! * Always: exclusive access to the storage; nothing else may write to the image meanwhile.
//! * Always: memory is at most 4 bytes per cluster of the file and 64 MiB, whatever the image
//!   claims.
//! * Never: a check without repair writes.

mod bitmaps;
mod census;
mod claims;
mod compare;
pub(super) mod copied;
mod finding;
mod l1;
pub(super) mod l2;
mod qemu_text;
pub(super) mod read;
pub(super) mod refcounts;
pub(super) mod references;
mod report;
mod snapshots;
mod survey;
pub(super) mod tables;
mod walk;

pub use finding::{Finding, FindingClass, FindingKind, Harm};
pub use report::{CheckReport, MAX_FINDINGS};
pub(crate) use survey::Survey;

use super::repair;
use crate::storage::Storage;
use crate::{Error, Result};

/// What a check may change.
///
/// ```
/// use lacuna::qcow2::check::{CheckOptions, Repair};
/// assert_eq!(CheckOptions::default().repair, Repair::None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Repair {
    /// All that can be repaired.
    All,
    /// Leaked clusters; copied flags too where nothing else is wrong.
    Leaks,
    /// Nothing.
    #[default]
    None,
}

/// What to check for.
///
/// ```
/// use lacuna::qcow2::check::{CheckOptions, Repair};
/// let options = CheckOptions { repair: Repair::Leaks };
/// assert_ne!(options, CheckOptions::default());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CheckOptions {
    /// What may be changed.
    pub repair: Repair,
}

/// A header in which a check finds no way to the tables either.
#[derive(Clone, Copy, Debug)]
pub(super) struct BeyondRepair;

impl BeyondRepair {
    pub(super) fn mark(error: Error) -> Error {
        error.with_detail(Self)
    }
}

/// Says whether an error of opening an image is one at which a check ends as well, so that no repair
/// helps: the header itself is damaged.
///
/// ```
/// use lacuna::qcow2::{check, read_header};
/// let storage = lacuna::storage::MemoryStorage::from(&b"QFI\xfb\0\0\0\x03"[..]);
/// let error = pollster::block_on(read_header(&storage)).unwrap_err();
/// assert!(check::is_beyond_repair(&error));
/// ```
#[must_use]
pub fn is_beyond_repair(error: &Error) -> bool {
    error.detail::<BeyondRepair>().is_some()
}

/// The parts of a check, in order.
///
/// ```
/// assert_ne!(lacuna::qcow2::check::Phase::Walk, lacuna::qcow2::check::Phase::Repair);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Counting references; the unit is an L2 table.
    Walk,
    /// Comparing with the refcounts; the unit is a refcount block.
    Compare,
    /// Looking at copied flags; the unit is an L2 table.
    Copied,
    /// Repairing; afterwards the other phases come again.
    Repair,
}

/// How far a check is.
///
/// ```
/// use lacuna::qcow2::check::{Phase, Progress};
/// let progress = Progress { phase: Phase::Walk, done: 1, total: 2 };
/// assert!(progress.done < progress.total);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Progress {
    /// The part.
    pub phase: Phase,
    /// How much of it is done, in units of the phase.
    pub done: u64,
    /// How much there is.
    pub total: u64,
}

/// Someone who hears how far a check is.
pub(crate) type Listener<'a> = &'a mut (dyn FnMut(Progress) + Send);

/// Checks an image and repairs what `options` allow.
///
/// Nothing else may use the image meanwhile. A repair that returns has flushed; a crash during it
/// leaves the image no worse than it was. Internal snapshots and bitmaps are never dropped for the
/// sake of a clean report.
///
/// ```
/// use lacuna::qcow2::check::{CheckOptions, check};
/// use lacuna::storage::MemoryStorage;
///
/// let nothing = MemoryStorage::new();
/// let result = pollster::block_on(check(&nothing, &CheckOptions::default(), &mut |_| {}));
/// assert_eq!(result.unwrap_err().kind(), lacuna::ErrorKind::Corrupt);
/// ```
///
/// # Errors
/// `Corrupt` or `Unsupported` where the header cannot be used, so that there is nothing to check;
/// `Io` where the repair could not write or flush. What cannot be read is counted in the report.
pub async fn check<S: Storage>(
    storage: &S,
    options: &CheckOptions,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<CheckReport> {
    let survey = Survey::make(storage, progress).await?;
    match options.repair {
        Repair::None => Ok(survey.report),
        wanted => repair::repair(storage, survey, wanted, progress).await,
    }
}
