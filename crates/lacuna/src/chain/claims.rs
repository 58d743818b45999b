//! What each file of a chain is claimed for: the table of QEMU's tools, found out by watching them.
//!
//! | file | held | denied to others |
//! |---|---|---|
//! | qcow2 image, read | consistent read | write, resize |
//! | qcow2 image, written | consistent read, write, resize | write, resize |
//! | raw image, read | consistent read | – |
//! | raw image, written | consistent read, write | – |
//! | data file, read | consistent read | resize |
//! | data file, written | consistent read, write, resize | resize |
//! | backing file | as one that is read | |
//! | any that is described only | – | as for its format |
//!
//! Nothing is denied with [`Sharing::All`]; write and resize always with [`Sharing::Readers`]; resizing
//! the top with [`Sharing::SameSize`].

use super::policy::Format;
use crate::qcow2::Access;
use crate::storage::{Claim, Permissions};
use crate::{Error, Result};

/// What others may do with the images of a chain while it is open.
///
/// ```
/// assert_eq!(lacuna::chain::Sharing::default(), lacuna::chain::Sharing::Format);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// What the formats bear: read all, and write raw disks, on which no tables can go astray.
    #[default]
    Format,
    /// As `Format`, but the top keeps its size. For a disk that is served, to clients who learned its
    /// size when they came.
    SameSize,
    /// Read only. For a disk whose content has to hold still, and for one that a machine owns.
    Readers,
    /// Anything, also while an image is written by somebody. What is read then may be half
    /// changed, and look damaged. Only for reading: QEMU's `force-share`.
    All,
}

/// What a file of a chain is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Guest data lies in it, but no tables.
    Data(Access),
    /// It is looked at, but not at what guests see.
    Description(Format),
    /// An image.
    Image(Format, Access),
}

impl Sharing {
    /// Refuses to write what others may write as well.
    pub(super) fn check(self, access: Access) -> Result<()> {
        match (self, access) {
            (Self::All, Access::ReadWrite) => Err(Error::invalid(
                "An image that others may change at the same time can be opened for reading only",
            )),
            _ => Ok(()),
        }
    }

    /// Returns what others may do with the backing files of an image.
    pub(super) const fn below(self) -> Self {
        match self {
            Self::SameSize => Self::Format,
            other => other,
        }
    }

    /// Returns the claim on the file of an image, for those who open one without its chain.
    ///
    /// ```
    /// use lacuna::chain::{Format, Sharing};
    /// use lacuna::qcow2::Access;
    /// use lacuna::storage::Claim;
    /// let claim = Sharing::Format.image_claim(Format::Qcow2, Access::ReadOnly);
    /// assert_eq!(claim, Claim::READING);
    /// ```
    #[must_use]
    pub fn image_claim(self, format: Format, access: Access) -> Claim {
        self.claim(Purpose::Image(format, access))
    }

    /// Returns the claim on a file.
    pub(super) fn claim(self, purpose: Purpose) -> Claim {
        let claim = Claim { held: held(purpose), ..Claim::NONE };
        match self {
            Self::All => claim,
            _ if denies_nothing(purpose) => claim,
            Self::Format => claim.denying(denied(purpose)),
            Self::SameSize => claim.denying(denied(purpose) | Permissions::RESIZE),
            Self::Readers => claim.denying(Permissions::CHANGE),
        }
    }
}

fn held(purpose: Purpose) -> Permissions {
    let read = Permissions::CONSISTENT_READ;
    match purpose {
        Purpose::Description(_) => Permissions::empty(),
        Purpose::Image(Format::Raw, Access::ReadWrite) => read | Permissions::WRITE,
        Purpose::Image(Format::Qcow2, Access::ReadWrite) | Purpose::Data(Access::ReadWrite) => {
            read | Permissions::CHANGE
        }
        Purpose::Image(_, Access::ReadOnly) | Purpose::Data(Access::ReadOnly) => read,
    }
}

/// A raw disk has nothing to describe that could be caught half changed.
fn denies_nothing(purpose: Purpose) -> bool {
    purpose == Purpose::Description(Format::Raw)
}

/// What the format does not bear from others.
fn denied(purpose: Purpose) -> Permissions {
    match purpose {
        Purpose::Data(_) => Permissions::RESIZE,
        Purpose::Image(Format::Raw, _) | Purpose::Description(Format::Raw) => Permissions::empty(),
        Purpose::Image(Format::Qcow2, _) | Purpose::Description(Format::Qcow2) => {
            Permissions::CHANGE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_writers_share_raw_disks_and_never_qcow2_images() {
        let both = |sharing: Sharing, format| {
            let claim = sharing.claim(Purpose::Image(format, Access::ReadWrite));
            claim.gets_along_with(claim)
        };
        assert!(both(Sharing::Format, Format::Raw));
        assert!(!both(Sharing::Readers, Format::Raw));
        assert!(!both(Sharing::Format, Format::Qcow2));
        assert!(!both(Sharing::Readers, Format::Qcow2));
    }

    #[test]
    fn the_top_of_a_served_chain_keeps_its_size() {
        let resizing = Claim { held: Permissions::RESIZE, ..Claim::NONE };
        let raw = Purpose::Image(Format::Raw, Access::ReadWrite);
        for (sharing, is_shared) in
            [(Sharing::Format, true), (Sharing::SameSize, false), (Sharing::SameSize.below(), true)]
        {
            assert_eq!(sharing.claim(raw).gets_along_with(resizing), is_shared, "{sharing:?}");
        }
        let served = Sharing::SameSize.claim(raw);
        assert!(served.gets_along_with(Sharing::Format.claim(raw)), "others may still write");
    }

    #[test]
    fn whoever_shares_all_is_kept_out_by_nobody() {
        for format in [Format::Raw, Format::Qcow2] {
            let claim = Sharing::All.claim(Purpose::Image(format, Access::ReadOnly));
            assert!(claim.gets_along_with(Claim::WRITING), "{format}");
        }
        assert!(Sharing::All.check(Access::ReadWrite).is_err());
    }
}
