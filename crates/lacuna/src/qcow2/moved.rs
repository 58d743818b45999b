//! How far the move of a table to another place is.

/// Of a table that storage has whole and that one pointer names. The later a state, the more is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Moved {
    /// Storage names the place where it lies.
    #[default]
    No,
    /// The table is durable at its new place, and storage may name it already: it is written in place, like
    /// one that did not move, once what its entries name is there.
    MayBeNamed,
    /// Storage has nothing of it at its new place, and names the old one.
    Unwritten,
}

impl Moved {
    /// The table was written, and is durable.
    pub(super) fn written(&mut self) {
        *self = (*self).min(Self::MayBeNamed);
    }
}
