//! Offsets, indices, counts and ranges as types, so that guest and host cannot be swapped.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl $name {
            /// Returns the value `distance` further on, or nothing where that overflows.
            #[must_use]
            pub fn checked_add(self, distance: u64) -> Option<Self> {
                self.0.checked_add(distance).map(Self)
            }
        }

        impl std::ops::Add<u64> for $name {
            type Output = Self;
            fn add(self, distance: u64) -> Self {
                Self(self.0 + distance)
            }
        }

        impl std::ops::Sub for $name {
            type Output = u64;
            fn sub(self, earlier: Self) -> u64 {
                self.0 - earlier.0
            }
        }
    };
}

unit!(
    /// A byte offset in the virtual disk that the guest sees.
    ///
    /// ```
    /// use lacuna::units::GuestOffset;
    /// assert_eq!((GuestOffset(512) + 512).to_string(), "0x400");
    /// ```
    GuestOffset
);
unit!(
    /// A byte offset in an image file or data file.
    ///
    /// ```
    /// use lacuna::units::HostOffset;
    /// assert_eq!(HostOffset(0x30000) - HostOffset(0x10000), 0x20000);
    /// ```
    HostOffset
);
unit!(
    /// The index of a cluster of the virtual disk: guest offset divided by the cluster size.
    ///
    /// ```
    /// assert!(lacuna::units::GuestCluster(1) < lacuna::units::GuestCluster(2));
    /// ```
    GuestCluster
);
unit!(
    /// The index of a cluster of the image file: host offset divided by the cluster size.
    ///
    /// ```
    /// assert!(lacuna::units::HostCluster(1) < lacuna::units::HostCluster(2));
    /// ```
    HostCluster
);

/// A half-open range of bytes: `start` belongs to it, `end()` no longer does.
///
/// ```
/// use lacuna::units::{GuestOffset, GuestRange};
/// let range = GuestRange::new(GuestOffset(512), 1024);
/// assert_eq!(range.end(), GuestOffset(1536));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange<O> {
    /// The first byte.
    pub start: O,
    /// How many bytes.
    pub len: u64,
}

/// A range of the virtual disk.
pub type GuestRange = ByteRange<GuestOffset>;
/// A range of an image file or data file.
pub type HostRange = ByteRange<HostOffset>;

impl<O> ByteRange<O>
where
    O: Copy + Ord + std::ops::Add<u64, Output = O> + std::ops::Sub<O, Output = u64>,
{
    /// Makes the range of `len` bytes from `start`.
    #[must_use]
    pub const fn new(start: O, len: u64) -> Self {
        Self { start, len }
    }

    /// Returns the first offset past the range.
    #[must_use]
    pub fn end(&self) -> O {
        self.start + self.len
    }

    /// Says whether the range holds no byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says whether `offset` lies in the range.
    #[must_use]
    pub fn contains(&self, offset: O) -> bool {
        self.start <= offset && offset < self.end()
    }

    /// Says whether the two ranges share a byte.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Returns the bytes that both ranges hold, if any.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self { start, len: end - start })
    }
}
