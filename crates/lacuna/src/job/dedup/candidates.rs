//! Which clusters of one image have equal fingerprints; a cluster is a number here, that of the disk or that
//! of the file.
//!
//! * One word of 64 bits for each cluster: above its index, as much of the fingerprint as there is
//!   room for. Of 2^24 clusters (1 TiB in 64 KiB) 40 bits fit: one in 2^16 is taken for equal wrongly,
//!   which costs a comparison.
//! * Where one list would take too much memory, there are several passes, each with its part of the
//!   fingerprints; the bits that choose the pass are not kept.
//! * Groups come in the order of their first clusters: what is copied together stays together.

use super::fingerprint::Fingerprint;

/// Bytes for a cluster: its word, and a part of the list of groups, which have two members or more.
const CLUSTER_BYTES: u64 = 10;
/// Words in one list at most, since groups are remembered by 32 bits.
const MOST_WORDS: u64 = u32::MAX as u64;
/// More passes than these make no sense.
const MOST_PASS_BITS: u32 = 16;

/// How the fingerprints of a disk are cut into passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passes {
    /// How many words a list may have.
    most_words: usize,
    /// Bits of an index.
    cluster_bits: u32,
    /// Bits that choose the pass.
    pass_bits: u32,
}

impl Passes {
    /// Plans for a disk of `all` clusters of which `data` hold data.
    pub(super) fn new(all: u64, data: u64, memory_bytes: u64) -> Self {
        let most = (memory_bytes / CLUSTER_BYTES).clamp(1, MOST_WORDS);
        // Passes are not of one size: a sixteenth of room for chance.
        let room = (most - most / 16).max(1);
        let pass_bits = data.div_ceil(room).max(1).next_power_of_two().trailing_zeros();
        let cluster_bits = u64::BITS - all.max(2).leading_zeros();
        let pass_bits = pass_bits.min(MOST_PASS_BITS);
        Self { most_words: most.min(data.max(1)) as usize, cluster_bits, pass_bits }
    }

    /// Returns how many passes there are.
    pub(super) const fn count(self) -> u64 {
        1 << self.pass_bits
    }

    /// Begins a pass.
    pub(super) fn begin(self, pass: u64) -> Candidates {
        Candidates { passes: self, pass, words: Vec::with_capacity(self.most_words) }
    }
}

/// Clusters met in one pass.
#[derive(Debug)]
pub(super) struct Candidates {
    passes: Passes,
    pass: u64,
    words: Vec<u64>,
}

impl Candidates {
    /// Takes note of a cluster, if its fingerprint belongs to the pass. What has no room, since guests
    /// write meanwhile, is left to another run.
    pub(super) fn note(&mut self, fingerprint: Fingerprint, cluster: u64) {
        let Passes { most_words, cluster_bits, pass_bits } = self.passes;
        let pass = fingerprint.0.checked_shr(u64::BITS - pass_bits).unwrap_or(0);
        let mask = (1 << cluster_bits) - 1;
        if pass == self.pass && self.words.len() < most_words && cluster <= mask {
            self.words.push((fingerprint.0 << pass_bits) & !mask | cluster);
        }
    }

    /// Keeps those that have equals, in groups.
    pub(super) fn into_groups(mut self) -> Groups {
        let mask = (1 << self.passes.cluster_bits) - 1;
        self.words.sort_unstable();
        let (mut kept, mut at, mut starts) = (0, 0, Vec::new());
        while at < self.words.len() {
            let name = self.words[at] & !mask;
            let len = self.words[at..].iter().take_while(|word| **word & !mask == name).count();
            if len > 1 {
                starts.push(kept as u32);
                self.words.copy_within(at..at + len, kept);
                kept += len;
            }
            at += len;
        }
        self.words.truncate(kept);
        starts.sort_unstable_by_key(|start| self.words[*start as usize] & mask);
        Groups { words: self.words, starts, mask, next: 0, within: 0, done: 0 }
    }
}

/// Groups of clusters with equal fingerprints, given out in batches.
#[derive(Debug)]
pub(super) struct Groups {
    words: Vec<u64>,
    /// Where each group begins, in the order of their first clusters.
    starts: Vec<u32>,
    mask: u64,
    /// The group that is next.
    next: usize,
    /// How many of its members were given out.
    within: usize,
    /// How many members of all groups were given out.
    done: usize,
}

impl Groups {
    /// Returns how many members there are, and how many were given out.
    pub(super) const fn members(&self) -> (u64, u64) {
        (self.words.len() as u64, self.done as u64)
    }

    /// Returns groups that have about `most` members together, none at the end. A group that is cut
    /// goes on with its last member once more, so that the rest finds what that shares.
    pub(super) fn next_batch(&mut self, most: usize) -> Vec<Vec<u64>> {
        let (mut batch, mut room) = (Vec::new(), most.max(2));
        while room > 1
            && let Some(&start) = self.starts.get(self.next)
        {
            let group = self.group(start as usize);
            let from = self.within.saturating_sub(1);
            let to = group.len().min(from + room);
            let cluster = |word: &u64| word & self.mask;
            batch.push(group[from..to].iter().map(cluster).collect());
            room -= to - from;
            let is_whole = to == group.len();
            self.done += to - self.within;
            (self.next, self.within) = if is_whole { (self.next + 1, 0) } else { (self.next, to) };
        }
        batch
    }

    /// Returns all groups, whatever was given out.
    pub(super) fn all(&self) -> impl Iterator<Item = Vec<u64>> + Send + '_ {
        let cluster = |word: &u64| word & self.mask;
        self.starts
            .iter()
            .map(move |start| self.group(*start as usize).iter().map(cluster).collect())
    }

    /// Leaves none.
    pub(super) fn none(self) -> Self {
        Self { words: Vec::new(), starts: Vec::new(), ..self }
    }

    fn group(&self, start: usize) -> &[u64] {
        let name = self.words[start] & !self.mask;
        let rest = &self.words[start..];
        &rest[..rest.iter().take_while(|word| **word & !self.mask == name).count()]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::fingerprint::Fingerprinter;
    use super::*;

    /// All groups, put together from batches of any size, over all passes.
    fn grouped(contents: &[u8], passes: Passes, most: usize) -> Vec<Vec<u64>> {
        let mut found: Vec<Vec<u64>> = Vec::new();
        for pass in 0..passes.count() {
            let mut candidates = passes.begin(pass);
            for (index, content) in contents.iter().enumerate() {
                let fingerprint = Fingerprinter::seeded(3).of(&[*content]);
                candidates.note(fingerprint, index as u64);
            }
            let mut groups = candidates.into_groups();
            loop {
                let batch = groups.next_batch(most);
                if batch.is_empty() {
                    break;
                }
                assert!(batch.iter().map(Vec::len).sum::<usize>() <= most.max(2));
                for group in batch {
                    assert!(group.len() > 1);
                    match found.last_mut() {
                        Some(last) if last.last() == group.first() => last.extend(&group[1..]),
                        _ => found.push(group),
                    }
                }
            }
            let (all, done) = groups.members();
            assert_eq!(all, done);
        }
        found
    }

    proptest! {
        #[test]
        fn groups_are_those_of_a_map(
            contents in proptest::collection::vec(0..60_u8, 0..300),
            most in 0..40_usize,
            pass_bits in 0..4_u32,
        ) {
            let passes = Passes { most_words: 1000, cluster_bits: 9, pass_bits };
            let mut map = BTreeMap::<u8, Vec<u64>>::new();
            for (index, content) in contents.iter().enumerate() {
                map.entry(*content).or_default().push(index as u64);
            }
            let mut expected: Vec<Vec<u64>> =
                map.into_values().filter(|group| group.len() > 1).collect();
            let mut found = grouped(&contents, passes, most);
            // In one pass they come by their first members.
            expected.sort();
            if pass_bits > 0 {
                found.sort();
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn passes_keep_to_the_memory() {
        for (data, memory) in [(1000, 1 << 20), (1 << 24, 64 << 20), (1 << 32, 256 << 20)] {
            let passes = Passes::new(data * 2, data, memory);
            assert!(passes.most_words as u64 * CLUSTER_BYTES <= memory, "{passes:?}");
            assert!(passes.count() * passes.most_words as u64 >= data, "{passes:?}");
        }
        assert_eq!(Passes::new(1 << 20, 1 << 20, 256 << 20).count(), 1);
        assert_eq!(Passes::new(0, 0, 0).count(), 1);
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        let mut candidates = Passes { most_words: 3, cluster_bits: 4, pass_bits: 0 }.begin(0);
        (0..20).for_each(|index| candidates.note(Fingerprint(7 << 40), index));
        assert_eq!(candidates.into_groups().members(), (3, 0));
        let mut candidates = Passes { most_words: 9, cluster_bits: 4, pass_bits: 0 }.begin(0);
        (15..20).for_each(|index| candidates.note(Fingerprint(7 << 40), index));
        assert_eq!(candidates.into_groups().members(), (0, 0));
    }
}
