//! What planning can come back with instead of a plan.

use event_listener::EventListener;

use super::format::AutoclearFeatures;
use crate::Error;
use crate::units::HostOffset;

/// Something that must happen outside the lock before planning can go on.
#[derive(Debug)]
pub(super) enum Need {
    /// This slice of an L2 table is not in memory.
    L2Slice(HostOffset),
    /// No slice may be missing of this L2 table (its content is about to be copied).
    L2Table(HostOffset),
    /// This slice of a refcount block is not in memory.
    RefcountSlice(HostOffset),
    /// No slice may be missing of this refcount block (its content is about to be copied).
    RefcountBlock(HostOffset),
    /// Storage must name a refcount block before it names what that counts.
    StoredRefcounts,
    /// Another request is in the way.
    Turn(EventListener),
    /// Too much is dirty: write it first.
    WriteBack,
    /// These claims about the whole disk must be off before a change makes them lies.
    DropClaims(AutoclearFeatures),
    /// There is no cluster of zeros that could be shared once more.
    ZeroCluster,
    /// The dirty bit must be durable before refcounts go stale.
    DirtyBit,
    /// A crash would hide from bitmaps what is about to change.
    BitmapIntent,
    /// Unknown or outdated autoclear claims and bitmaps must be marked before the first change.
    FirstChange,
}

/// Why there is no plan.
#[derive(Debug)]
pub(super) enum Stop {
    /// Plan again after this.
    Need(Need),
    /// The request is refused; nothing was changed.
    Fail(Error),
    /// The image contradicts itself so badly that no writer may go on: mark it corrupt.
    Corrupt(Error),
}

/// A plan, or what stops it.
pub(super) type Planned<T> = Result<T, Stop>;

impl Stop {
    /// Says what was being allocated when the contradiction was found.
    pub(super) fn context(self, what: &str) -> Self {
        match self {
            Self::Corrupt(error) => Self::Corrupt(error.context(format!("Allocating: {what}"))),
            other => other,
        }
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Fail(error)
    }
}

impl From<Need> for Stop {
    fn from(need: Need) -> Self {
        Self::Need(need)
    }
}
