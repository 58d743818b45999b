//! A set of clusters: one bit for each.

/// Clusters `0..len`, each in the set or not.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    pub(super) fn new(len: u64) -> Self {
        Self { words: vec![0; usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX)] }
    }

    /// Adds a cluster; one past the end is not added.
    pub(super) fn insert(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut((cluster / 64) as usize) {
            *word |= 1 << (cluster % 64);
        }
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut((cluster / 64) as usize) {
            *word &= !(1 << (cluster % 64));
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let word = self.words.get((cluster / 64) as usize);
        word.is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// Returns the first cluster of the set from `from` on.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        let first = (from / 64) as usize;
        let mut word = self.words.get(first)? & (!0 << (from % 64));
        for index in first..self.words.len() {
            if index > first {
                word = self.words[index];
            }
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
        }
        None
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let found = self.next(from)?;
            from = found + 1;
            Some(found)
        })
    }

    /// Returns the runs of neighbours: first cluster and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for cluster in self.iter() {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => runs.push((cluster, 1)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_tells_its_clusters_in_order_and_its_runs() {
        let mut bits = Bits::new(200);
        for cluster in [3, 4, 63, 64, 199, 256, 300] {
            bits.insert(cluster);
        }
        bits.remove(4);
        bits.remove(4000);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [3, 63, 64, 199]);
        assert_eq!(bits.runs(), [(3, 1), (63, 2), (199, 1)]);
        assert_eq!((bits.next(64), bits.next(65), bits.next(200)), (Some(64), Some(199), None));
        assert!(!bits.contains(300) && Bits::default().next(0).is_none());
    }
}
