//! Short names of content.

use std::hash::{BuildHasher, Hasher, RandomState};

use twox_hash::XxHash3_64;

/// 64 bits that equal content has in common. Different content may have them in common as well, by
/// chance, or because a guest made it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Fingerprint(pub(super) u64);

impl Fingerprint {
    /// Returns the name of the same content as something that equals no other kind.
    pub(super) const fn other(self) -> Self {
        Self(!self.0)
    }
}

/// Makes fingerprints that can be compared with each other, and with no other job's.
///
/// Unless a caller gives one, the seed is drawn anew for each job: no guest can prepare content for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fingerprinter {
    seed: u64,
}

impl Fingerprinter {
    /// Draws a seed if there is none.
    pub(super) fn new(seed: Option<u64>) -> Self {
        Self::seeded(seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()))
    }

    pub(super) const fn seeded(seed: u64) -> Self {
        Self { seed }
    }

    /// Returns the fingerprint of some bytes.
    pub(super) fn of(self, bytes: &[u8]) -> Fingerprint {
        Fingerprint(XxHash3_64::oneshot_with_seed(self.seed, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_and_seed_decide() {
        let (one, other) = (Fingerprinter::seeded(1), Fingerprinter::seeded(2));
        assert_eq!(one.of(&[7; 4096]), one.of(&[7; 4096]));
        assert_ne!(one.of(&[7; 4096]), one.of(&[8; 4096]));
        assert_ne!(one.of(&[7; 4096]), other.of(&[7; 4096]));
    }
}
