//! Requests that wait for their replies, and what each is owed.
//!
//! A cookie is a place in a list and how often that place was used before: a reply to a request
//! that was answered, or never made, is found out.

use smallvec::SmallVec;

use super::coverage::Coverage;
use crate::wire::{CommandFlags, ErrorCode};
use crate::{ByteRange, Command, ContextId, Cookie, Error, Result};

/// How a request failed, in the words of the server.
///
/// ```
/// use lacuna_nbd::client::Failure;
/// fn is_full(failure: &Failure) -> bool {
///     failure.code == lacuna_nbd::wire::ErrorCode::ENOSPC
/// }
/// # let _ = is_full;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The error; what the protocol does not have counts as `EINVAL`.
    pub code: ErrorCode,
    /// What the server says, escaped and cut; may be empty.
    pub message: String,
    /// Where it happened, if the server says.
    pub offset: Option<u64>,
}

/// A request that is not answered.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) range: ByteRange,
    /// For a read: what has arrived, and in how many chunks.
    pub(super) coverage: Coverage,
    pub(super) has_content: bool,
    /// For a block status: the contexts that are still owed.
    pub(super) owed: SmallVec<[ContextId; 4]>,
    /// The first error.
    pub(super) failure: Option<Box<Failure>>,
    /// How many there were.
    pub(super) failures: u32,
}

#[derive(Debug, Default)]
pub(super) struct InFlight {
    places: Vec<Place>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Place {
    uses: u32,
    pending: Option<Pending>,
}

impl InFlight {
    /// Takes a request in and names it.
    pub(super) fn insert(&mut self, pending: Pending) -> Cookie {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { uses: 0, pending: None });
            u32::try_from(self.places.len().saturating_sub(1)).unwrap_or(u32::MAX)
        });
        let uses = self.places.get_mut(index as usize).map_or(0, |place| {
            place.uses = place.uses.wrapping_add(1);
            place.pending = Some(pending);
            place.uses
        });
        Cookie(u64::from(uses) << 32 | u64::from(index))
    }

    /// Returns the request of that name.
    pub(super) fn find(&mut self, cookie: Cookie) -> Result<&mut Pending> {
        let place = self.place(cookie);
        place.and_then(|place| place.pending.as_mut()).ok_or_else(|| unknown(cookie))
    }

    /// Takes out the request of that name.
    pub(super) fn remove(&mut self, cookie: Cookie) -> Result<Pending> {
        let pending = self.place(cookie).and_then(|place| place.pending.take());
        let pending = pending.ok_or_else(|| unknown(cookie))?;
        self.free.push(index(cookie));
        Ok(pending)
    }

    pub(super) const fn len(&self) -> usize {
        self.places.len().saturating_sub(self.free.len())
    }

    fn place(&mut self, cookie: Cookie) -> Option<&mut Place> {
        let place = self.places.get_mut(index(cookie) as usize)?;
        (u64::from(place.uses) == cookie.0 >> 32).then_some(place)
    }
}

fn index(cookie: Cookie) -> u32 {
    u32::try_from(cookie.0 & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

fn unknown(cookie: Cookie) -> Error {
    Error::violation(format!("The server answers request {:#x}, which is not open", cookie.0))
}
