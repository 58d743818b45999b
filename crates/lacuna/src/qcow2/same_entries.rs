//! How far a run of L2 entries goes, many entries at a time: tables hold millions.

/// Entries that are compared without a branch between them.
const GROUP: usize = 8;

/// Entries of `WORDS` words that say the same for one cluster further on each: word 0 grows by
/// `step`, any other stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct SameEntries<const WORDS: usize> {
    pub(super) first: [u64; WORDS],
    pub(super) step: u64,
}

impl<const WORDS: usize> SameEntries<WORDS> {
    /// Counts the entries at the start of `table` that go on behind `first`, `at_most` so many.
    pub(super) fn count(&self, table: &[u8], at_most: u64) -> u64 {
        let (words, _) = table.as_chunks::<8>();
        let (entries, _) = words.as_chunks::<WORDS>();
        let at_most = usize::try_from(at_most).unwrap_or(usize::MAX);
        let entries = &entries[..entries.len().min(at_most)];
        let (groups, _) = entries.as_chunks::<GROUP>();
        let differs = |(index, group): (usize, &_)| !self.is_group(index * GROUP, group);
        let same = groups.iter().enumerate().position(differs).unwrap_or(groups.len()) * GROUP;
        let differs = |(index, entry): (usize, &[[u8; 8]; WORDS])| {
            entry.map(u64::from_be_bytes) != self.entry(same + index)
        };
        let rest = entries[same..].iter().enumerate().position(differs);
        (same + rest.unwrap_or(entries.len() - same)) as u64
    }

    /// Returns the entry that is expected at `index` behind `first`.
    fn entry(&self, index: usize) -> [u64; WORDS] {
        let mut entry = self.first;
        entry[0] = entry[0].wrapping_add(self.step.wrapping_mul(index as u64 + 1));
        entry
    }

    /// Compares the words as they lie in the file, unless the sum carries from byte to byte: turning
    /// every word round would cost more than all the rest.
    fn is_group(&self, at: usize, group: &[[[u8; 8]; WORDS]; GROUP]) -> bool {
        let stored = self.entry(at).map(u64::to_be);
        let step = self.step.to_be();
        let expected = |index: usize| stored[0].wrapping_add(step.wrapping_mul(index as u64));
        if expected(GROUP - 1) != self.entry(at + GROUP - 1)[0].to_be() {
            let is_same = |(index, entry): (usize, &[[u8; 8]; WORDS])| {
                entry.map(u64::from_be_bytes) == self.entry(at + index)
            };
            return group.iter().enumerate().all(is_same);
        }
        let mut differing = 0;
        for (index, entry) in group.iter().enumerate() {
            let words = entry.map(u64::from_ne_bytes);
            differing |= words[0] ^ expected(index);
            for (word, stored) in words.iter().zip(stored).skip(1) {
                differing |= word ^ stored;
            }
        }
        differing == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table<const WORDS: usize>(entries: &[[u64; WORDS]]) -> Vec<u8> {
        entries.iter().flatten().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// Every length, every place where a run ends, and sums that carry into each byte.
    fn check<const WORDS: usize>(step: u64, starts: &[u64]) {
        for &start in starts {
            let mut first = [0xffff_ffff_0000_0000; WORDS];
            first[0] = start;
            let same = SameEntries { first, step };
            let run: Vec<_> = (0..40).map(|index| same.entry(index)).collect();
            for len in 0..40 {
                assert_eq!(same.count(&table(&run[..len]), u64::MAX), len as u64, "{start:#x}");
                assert_eq!(same.count(&table(&run), len as u64), len as u64, "{start:#x}");
                for word in 0..WORDS {
                    let mut broken = run.clone();
                    broken[len][word] ^= 1 << (len % 64);
                    assert_eq!(same.count(&table(&broken), u64::MAX), len as u64, "{start:#x}");
                }
            }
        }
    }

    #[test]
    fn a_run_ends_at_the_first_entry_that_differs() {
        for bits in [9, 16, 21] {
            let step = 1 << bits;
            let starts = [0, 1 << 63, (1 << 63) | (step * 250), (1 << 55) - step * 9, step * 65530];
            check::<1>(step, &starts);
            check::<2>(step, &starts);
        }
        check::<1>(0, &[0, 1]);
        check::<2>(0, &[0]);
    }
}
