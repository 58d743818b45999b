//! What somebody does with an image file, and what others may do meanwhile.
//!
//! The words and their order are those of QEMU's image locking: bit *i* of [`Permissions`] is byte
//! `100 + i` of the file where it is held, and byte `200 + i` where others are denied it.

use std::fmt;

/// Ways to use an image file.
///
/// ```
/// use lacuna::storage::Permissions;
/// assert_eq!(Permissions::WRITE.to_string(), "write");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

bitflags::bitflags! {
    impl Permissions: u8 {
        /// Reading content that nobody leaves half changed.
        const CONSISTENT_READ = 1 << 0;
        /// Changing content.
        const WRITE = 1 << 1;
        /// Writing what reads as before, say while copying from below.
        const WRITE_UNCHANGED = 1 << 2;
        /// Changing the length.
        const RESIZE = 1 << 3;
    }
}

impl Permissions {
    /// Changing anything that a reader would notice.
    pub const CHANGE: Self = Self::WRITE.union(Self::RESIZE);

    /// Returns the single permissions with their number, 0 to 3.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "locks are Linux's"))]
    pub(crate) fn numbered(self) -> impl Iterator<Item = (u8, Self)> {
        self.iter().map(|one| (one.bits().trailing_zeros() as u8, one))
    }
}

impl fmt::Display for Permissions {
    /// Writes QEMU's names, with commas between several.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, _)) in self.iter_names().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{}", name.to_ascii_lowercase().replace('_', " "))?;
        }
        Ok(())
    }
}

/// What a holder of a file does with it and lets others do.
///
/// Two holders get along where each shares all that the other holds.
///
/// ```
/// use lacuna::storage::{Claim, Permissions};
/// let claim = Claim::WRITING.holding(Permissions::CONSISTENT_READ);
/// assert!(!claim.shared.contains(Permissions::WRITE));
/// assert!(claim.gets_along_with(Claim::NONE));
/// assert!(!claim.gets_along_with(Claim::READING));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// What the holder does.
    pub held: Permissions,
    /// What others may do at the same time.
    pub shared: Permissions,
}

impl Claim {
    /// Nothing is done, anything is allowed: no byte is locked.
    pub const NONE: Self = Self { held: Permissions::empty(), shared: Permissions::all() };

    /// An image that is read and that nobody may change meanwhile.
    pub const READING: Self =
        Self { held: Permissions::CONSISTENT_READ, shared: Permissions::CHANGE.complement() };

    /// An image that is read and changed, by nobody else.
    pub const WRITING: Self =
        Self { held: Permissions::CONSISTENT_READ.union(Permissions::CHANGE), ..Self::READING };

    /// A file that is being made.
    pub const MAKING: Self =
        Self { held: Permissions::CHANGE, shared: Permissions::RESIZE.complement() };

    /// Adds what the holder does.
    #[must_use]
    pub const fn holding(self, more: Permissions) -> Self {
        Self { held: self.held.union(more), ..self }
    }

    /// Takes away what others may do.
    #[must_use]
    pub const fn denying(self, less: Permissions) -> Self {
        Self { shared: self.shared.difference(less), ..self }
    }

    /// Returns what others may not do.
    #[must_use]
    pub const fn denied(self) -> Permissions {
        self.shared.complement()
    }

    /// Says whether two holders can have the file at once.
    #[must_use]
    pub const fn gets_along_with(self, other: Self) -> bool {
        self.shared.contains(other.held) && other.shared.contains(self.held)
    }
}

/// Whether files are locked against other programs.
///
/// ```
/// assert_eq!(lacuna::storage::Locking::default(), lacuna::storage::Locking::Auto);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Locking {
    /// Locked where the host can; where it cannot, that goes unsaid.
    #[default]
    Auto,
    /// Never locked.
    Off,
    /// Locked, or not opened: [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
    On,
}
