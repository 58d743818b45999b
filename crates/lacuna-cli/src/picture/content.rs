//! What a run of a disk is to somebody who looks at it, and how much there is of each.

use lacuna::block::{AllocationDepth, ExtentStatus};

/// The independent facts of a run, taken together for the eye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// May hold anything.
    Data,
    /// The same, stored compressed.
    Compressed,
    /// Reads as zeros, and host space is taken for it all the same.
    ReservedZero,
    /// Reads as zeros without host space.
    Zero,
    /// No file says anything.
    Unallocated,
}

impl Content {
    /// All of them, in the order of the legend.
    pub(crate) const ALL: [Self; 5] =
        [Self::Data, Self::Compressed, Self::ReservedZero, Self::Zero, Self::Unallocated];

    /// Takes the facts together. What no file allocates but one keeps room for counts as that.
    pub(crate) fn of(status: &ExtentStatus) -> Self {
        match status {
            _ if status.is_compressed => Self::Compressed,
            _ if status.reads_zero && !status.is_hole => Self::ReservedZero,
            _ if status.depth == AllocationDepth::NOWHERE => Self::Unallocated,
            _ if status.reads_zero => Self::Zero,
            _ => Self::Data,
        }
    }

    /// Says it in a few words.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compressed => "compressed data",
            Self::ReservedZero => "zeros, space reserved",
            Self::Zero => "zeros, no space",
            Self::Unallocated => "unallocated",
        }
    }
}

/// How many bytes of a range are what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shares([u64; Content::ALL.len()]);

impl Shares {
    /// Adds `bytes` of one kind.
    pub(crate) fn add(&mut self, content: Content, bytes: u64) {
        self.0[content as usize] += bytes;
    }

    /// Returns how much there is of one kind.
    pub(crate) const fn bytes(&self, content: Content) -> u64 {
        self.0[content as usize]
    }

    /// Adds another range's.
    pub(crate) fn plus(mut self, other: &Self) -> Self {
        for (sum, bytes) in self.0.iter_mut().zip(other.0) {
            *sum += bytes;
        }
        self
    }

    /// Returns how much there is in all.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_fact_is_taken_for_another() {
        let nowhere = ExtentStatus::UNALLOCATED;
        let zero = ExtentStatus { depth: AllocationDepth::TOP, ..nowhere };
        let data = ExtentStatus { reads_zero: false, is_hole: false, ..zero };
        for (status, content) in [
            (nowhere, Content::Unallocated),
            (ExtentStatus { is_hole: false, ..nowhere }, Content::ReservedZero),
            (zero, Content::Zero),
            (ExtentStatus { is_hole: false, ..zero }, Content::ReservedZero),
            (data, Content::Data),
            (ExtentStatus { is_compressed: true, ..data }, Content::Compressed),
        ] {
            assert_eq!(Content::of(&status), content, "{status:?}");
        }
    }
}
