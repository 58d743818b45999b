//! Where content was written last, in a table of fixed size that forgets.
//!
//! * A slot of 8 bytes for each cluster: half a fingerprint, and the cluster. The other half of the
//!   fingerprint chooses a set of [`WAYS`] slots.
//! * Never grows: in a full set the newest takes the place of the oldest. What is forgotten is written
//!   once more, and nothing else comes of it; what is stale or a chance match is found by comparing.

use super::fingerprint::Fingerprint;
use crate::units::GuestCluster;

/// Slots of a set, one cache line.
const WAYS: usize = 8;

/// Fingerprints with the clusters that had them.
#[derive(Debug)]
pub(super) struct Index {
    slots: Box<[Slot]>,
}

/// Zero is free: clusters count from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    name: u32,
    cluster: u32,
}

impl Index {
    /// Makes an index for as many clusters as there are, or as memory allows.
    pub(super) fn new(clusters: u64, memory_bytes: u64) -> Self {
        let most = (memory_bytes / size_of::<Slot>() as u64).max(WAYS as u64);
        // Twice as many slots as clusters, so that few sets overflow.
        let sets = clusters.saturating_mul(2).min(most) / WAYS as u64;
        Self { slots: vec![Slot::default(); sets.max(1) as usize * WAYS].into_boxed_slice() }
    }

    /// Returns the bytes that it takes.
    #[cfg(test)]
    pub(super) const fn memory_bytes(&self) -> usize {
        self.slots.len() * size_of::<Slot>()
    }

    /// Returns a cluster that had this fingerprint.
    pub(super) fn find(&self, fingerprint: Fingerprint) -> Option<GuestCluster> {
        let set = &self.slots[self.set(fingerprint)..][..WAYS];
        let found = set.iter().find(|slot| slot.cluster > 0 && slot.name == name(fingerprint))?;
        Some(GuestCluster(u64::from(found.cluster) - 1))
    }

    /// Notes that a cluster has this fingerprint now. Clusters that 32 bits do not count are left out.
    pub(super) fn note(&mut self, fingerprint: Fingerprint, cluster: GuestCluster) {
        let Some(cluster) = cluster.0.checked_add(1).and_then(|one| u32::try_from(one).ok()) else {
            return;
        };
        let at = self.set(fingerprint);
        let set = &mut self.slots[at..at + WAYS];
        let name = name(fingerprint);
        let same = set.iter().position(|slot| slot.cluster > 0 && slot.name == name);
        // The newest stands first.
        set[..=same.unwrap_or(WAYS - 1)].rotate_right(1);
        set[0] = Slot { name, cluster };
    }

    fn set(&self, fingerprint: Fingerprint) -> usize {
        let sets = (self.slots.len() / WAYS) as u64;
        (((fingerprint.0 >> u32::BITS) * sets) >> u32::BITS) as usize * WAYS
    }
}

const fn name(fingerprint: Fingerprint) -> u32 {
    fingerprint.0 as u32
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::fingerprint::Fingerprinter;
    use super::*;

    proptest! {
        /// It may forget; it never makes anything up.
        #[test]
        fn what_is_found_was_noted_last(
            noted in proptest::collection::vec((0..500_u32, 0..1000_u64), 0..2000),
            memory_bytes in 0..8000_u64,
        ) {
            let mut index = Index::new(1000, memory_bytes);
            prop_assert!(index.memory_bytes() as u64 <= memory_bytes.max(64));
            let mut map = HashMap::new();
            for (content, cluster) in noted {
                let fingerprint = Fingerprinter::seeded(1).of(&content.to_le_bytes());
                let found = index.find(fingerprint);
                prop_assert!(found.is_none() || found == map.get(&content).copied());
                index.note(fingerprint, GuestCluster(cluster));
                map.insert(content, GuestCluster(cluster));
                prop_assert_eq!(index.find(fingerprint), Some(GuestCluster(cluster)));
            }
        }
    }

    #[test]
    fn with_memory_enough_nearly_nothing_is_forgotten() {
        let mut index = Index::new(10_000, 1 << 20);
        let of = |index: u64| Fingerprinter::seeded(2).of(&index.to_le_bytes());
        (0..10_000).for_each(|at| index.note(of(at), GuestCluster(at)));
        let found = (0..10_000).filter(|at| index.find(of(*at)) == Some(GuestCluster(*at))).count();
        assert!(found > 9_900, "{found}");
    }

    #[test]
    fn clusters_that_cannot_be_counted_are_left_out() {
        let mut index = Index::new(1 << 40, 4096);
        index.note(Fingerprint(5), GuestCluster(u64::from(u32::MAX)));
        assert_eq!(index.find(Fingerprint(5)), None);
        index.note(Fingerprint(5), GuestCluster(u64::from(u32::MAX) - 1));
        assert_eq!(index.find(Fingerprint(5)), Some(GuestCluster(u64::from(u32::MAX) - 1)));
    }
}
