//! Failures on demand.

use super::host::OperationKind;

/// What Linux calls an error of the medium.
pub(super) const EIO: i32 = 5;

/// What a failing call leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The call changes nothing.
    Clean,
    /// A write or zeroing fails after a part of its sectors got through.
    Short,
    /// The call changes nothing, and says that it went well: to see whether a test notices.
    Silent,
}

/// A failure that was ordered.
///
/// ```
/// use testkit::sim::{Fault, OperationKind};
/// let fault = Fault::no_space(OperationKind::Write, 3).forever();
/// assert_eq!(fault.errno, 28);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which calls count and fail; nothing counts all calls that can change or persist bytes.
    pub kind: Option<OperationKind>,
    /// How many such calls are let through first.
    pub after: usize,
    /// How many fail then.
    pub times: usize,
    /// The host's error number.
    pub errno: i32,
    /// What is left behind.
    pub failure: Failure,
}

impl Fault {
    /// Fails one call of `kind` with EIO, after `after` of them went well.
    #[must_use]
    pub const fn io(kind: OperationKind, after: usize) -> Self {
        Self { kind: Some(kind), after, times: 1, errno: EIO, failure: Failure::Clean }
    }

    /// Fails one call of `kind` with ENOSPC, after `after` of them went well.
    #[must_use]
    pub const fn no_space(kind: OperationKind, after: usize) -> Self {
        Self { errno: 28, ..Self::io(kind, after) }
    }

    /// Fails the n-th call (from 0) of any kind but reads, with EIO.
    #[must_use]
    pub const fn any(after: usize) -> Self {
        Self { kind: None, ..Self::io(OperationKind::Write, after) }
    }

    /// Fails all that follow as well.
    #[must_use]
    pub const fn forever(self) -> Self {
        Self { times: usize::MAX, ..self }
    }

    /// Lets a part of the sectors through.
    #[must_use]
    pub const fn short(self) -> Self {
        Self { failure: Failure::Short, ..self }
    }

    /// Has the calls lost without a word.
    #[must_use]
    pub const fn silent(self) -> Self {
        Self { failure: Failure::Silent, ..self }
    }

    /// Takes note of a call; says whether it is to fail.
    pub(super) fn strikes(&mut self, kind: OperationKind) -> bool {
        let counts = match self.kind {
            Some(wanted) => wanted == kind,
            None => kind != OperationKind::Read,
        };
        if !counts || self.times == 0 {
            return false;
        }
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        self.times = self.times.saturating_sub(1);
        true
    }
}
