//! Where a copy failed.

use crate::Error;
use crate::units::GuestOffset;

/// What of a copy failed.
///
/// ```
/// assert_ne!(lacuna::job::CopyStep::Read, lacuna::job::CopyStep::Write);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyStep {
    /// Asking the source what it holds.
    Map,
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

/// Where a copy failed, as the error of [`convert`](super::convert) knows it.
///
/// ```
/// use lacuna::job::CopyFailure;
/// assert!(CopyFailure::of(&lacuna::Error::corrupt("Not about a copy")).is_none());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyFailure {
    /// What was done.
    pub step: CopyStep,
    /// Where the request began that failed.
    pub offset: GuestOffset,
}

impl CopyFailure {
    /// Returns the place that an error of a copy is about, where it is about one.
    #[must_use]
    pub fn of(error: &Error) -> Option<&Self> {
        error.detail()
    }

    /// Says in `error` where it happened.
    pub(super) fn at(step: CopyStep, offset: GuestOffset, error: Error) -> Error {
        let doing = match step {
            CopyStep::Map => "Asking for the block status of the source at guest offset",
            CopyStep::Read => "Reading the source at guest offset",
            CopyStep::Write => "Writing the target at guest offset",
        };
        error.context(format!("{doing} {offset}")).with_detail(Self { step, offset })
    }
}
