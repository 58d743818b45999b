//! What of a disk is allocated before anything is written to it.

use crate::storage::Reserve;

/// How much of a new or a growing disk is set aside at once.
///
/// ```
/// use lacuna::block::Preallocation;
/// assert_eq!(Preallocation::default(), Preallocation::Off);
/// assert!(Preallocation::Off < Preallocation::Full);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preallocation {
    /// Nothing: space is taken when it is written to.
    #[default]
    Off,
    /// Every cluster is mapped; the host has not been asked for the space. A raw disk has no
    /// metadata and so cannot have this.
    Metadata,
    /// The host has reserved the space, without writing it.
    Falloc,
    /// Every byte is written as zero.
    Full,
}

impl Preallocation {
    /// Returns how firmly the host sets the data aside.
    pub(crate) const fn of_data(self) -> Reserve {
        match self {
            Self::Off | Self::Metadata => Reserve::Hole,
            Self::Falloc => Reserve::Promised,
            Self::Full => Reserve::Written,
        }
    }
}
