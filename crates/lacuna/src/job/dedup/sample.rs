//! Which fingerprints were met, and in which source last, in bounded memory.
//!
//! * One word of 64 bits for each fingerprint: the upper [`SHARD_BITS`] of a fingerprint choose a
//!   shard and are not kept, and a source number takes their place. A shard is an open table that is
//!   at most 85 % full and grows by a quarter: 9.4 to 11.8 bytes each. While a shard grows it is there
//!   twice, which is a thousandth of the whole.
//! * Where memory does not suffice, [`Sample::thin`] keeps every second fingerprint: those with one
//!   more zero among their lowest bits. Content decides that, not how often or where it is met, so
//!   that the number of different fingerprints is estimated without bias: the number of those kept,
//!   times the thinning (adaptive sampling, after Wegman). Its relative error is about one divided by
//!   the square root of the number kept.

use super::fingerprint::Fingerprint;

/// Upper bits of a fingerprint that choose the shard.
const SHARD_BITS: u32 = 10;
/// Lower bits of a word that name the source; zero is no source, so that no word in use is zero.
const SOURCE_MASK: u64 = (1 << SHARD_BITS) - 1;
/// So many sources can be told apart.
pub(super) const MOST_SOURCES: usize = SOURCE_MASK as usize;
/// Thinned further than this nothing is.
const MOST_LEVEL: u32 = 20;
/// Slots of the smallest shard that holds anything.
const FEWEST_SLOTS: usize = 8;

/// What was known of a fingerprint when it was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Met {
    /// It is new.
    New,
    /// It was met before, but not in this source.
    Elsewhere,
    /// It was met in this source.
    Here,
    /// It is not among those that are looked at.
    Left,
}

/// A set of fingerprints.
#[derive(Debug)]
pub(super) struct Sample {
    shards: Box<[Shard]>,
    level: u32,
    slots: usize,
}

#[derive(Clone, Debug, Default)]
struct Shard {
    words: Box<[u64]>,
    used: usize,
}

impl Default for Sample {
    fn default() -> Self {
        let shards = vec![Shard::default(); 1 << SHARD_BITS].into_boxed_slice();
        Self { shards, level: 0, slots: 0 }
    }
}

impl Sample {
    /// Takes note of a fingerprint met in `source`, which is below [`MOST_SOURCES`]. Sources come one
    /// after the other.
    pub(super) fn meet(&mut self, fingerprint: Fingerprint, source: usize) -> Met {
        if level_of(fingerprint) < self.level {
            return Met::Left;
        }
        let shard = &mut self.shards[(fingerprint.0 >> (u64::BITS - SHARD_BITS)) as usize];
        let before = shard.words.len();
        shard.make_room();
        self.slots += shard.words.len() - before;
        shard.meet(fingerprint.0 << SHARD_BITS | (source as u64 + 1))
    }

    /// Returns the bytes that the words take.
    pub(super) const fn memory_bytes(&self) -> u64 {
        self.slots as u64 * size_of::<u64>() as u64
    }

    /// Keeps every second fingerprint from now on; says whether that was possible.
    pub(super) fn thin(&mut self) -> bool {
        if self.level == MOST_LEVEL {
            return false;
        }
        self.level += 1;
        for shard in &mut self.shards {
            let kept: Vec<u64> =
                shard.in_use().filter(|word| level_in(*word) >= self.level).collect();
            *shard = Shard::of(&kept, slots_for(kept.len()));
        }
        self.slots = self.shards.iter().map(|shard| shard.words.len()).sum();
        true
    }

    /// Returns how often the sample was thinned.
    pub(super) const fn level(&self) -> u32 {
        self.level
    }
}

/// The level up to which a fingerprint stays.
fn level_of(fingerprint: Fingerprint) -> u32 {
    fingerprint.0.trailing_zeros().min(MOST_LEVEL)
}

/// The level of the fingerprint in a word.
const fn level_in(word: u64) -> u32 {
    (word >> SHARD_BITS).trailing_zeros()
}

/// Slots of a table that `used` words fill at most by 85 %.
fn slots_for(used: usize) -> usize {
    if used == 0 { 0 } else { (used * 20).div_ceil(17).max(FEWEST_SLOTS) }
}

impl Shard {
    fn of(words: &[u64], slots: usize) -> Self {
        let mut made = Self { words: vec![0; slots].into_boxed_slice(), used: 0 };
        for word in words {
            made.meet(*word);
        }
        made
    }

    /// Grows where one more word would fill the table by more than 85 %.
    fn make_room(&mut self) {
        if slots_for(self.used + 1) <= self.words.len() {
            return;
        }
        let slots = (self.words.len() + self.words.len() / 4).max(FEWEST_SLOTS);
        let words: Vec<u64> = self.in_use().collect();
        *self = Self::of(&words, slots);
    }

    fn in_use(&self) -> impl Iterator<Item = u64> {
        self.words.iter().copied().filter(|word| *word != 0)
    }

    /// Finds the word of the same fingerprint, or places it.
    fn meet(&mut self, word: u64) -> Met {
        let slots = self.words.len();
        // Bits that the level says nothing of.
        let mut at = (((word >> u32::BITS) * slots as u64) >> u32::BITS) as usize;
        loop {
            let found = self.words[at];
            if found == 0 {
                self.words[at] = word;
                self.used += 1;
                return Met::New;
            }
            if found == word {
                return Met::Here;
            }
            if found & !SOURCE_MASK == word & !SOURCE_MASK {
                self.words[at] = word;
                return Met::Elsewhere;
            }
            at = if at + 1 == slots { 0 } else { at + 1 };
        }
    }
}

/// Counts fingerprints by the level up to which they stay, so that thinning corrects what was
/// counted before it.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally([u64; MOST_LEVEL as usize + 1]);

impl Tally {
    /// Counts one.
    pub(super) fn add(&mut self, fingerprint: Fingerprint) {
        self.0[level_of(fingerprint) as usize] += 1;
    }

    /// Returns how many there would have been without thinning.
    pub(super) fn estimate(&self, level: u32) -> u64 {
        self.0[level as usize..].iter().sum::<u64>() << level
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::fingerprint::Fingerprinter;
    use super::*;

    proptest! {
        /// Against a map: what was met where, whatever was thinned between.
        #[test]
        fn tells_what_a_map_would_tell(
            met in proptest::collection::vec((0..400_u64, 0..3_usize, 0..200_u8), 0..3000),
        ) {
            let (mut sample, mut map) = (Sample::default(), HashMap::new());
            for (key, source, chance) in met {
                // Few shards, many collisions, all levels.
                let fingerprint = Fingerprint((key << 61) | (key * 0x1234_5678_9abc));
                if chance == 0 && sample.level() < 3 {
                    prop_assert!(sample.thin());
                }
                let before = map.insert(fingerprint, source);
                let expected = match before {
                    _ if level_of(fingerprint) < sample.level() => Met::Left,
                    None => Met::New,
                    Some(last) if last == source => Met::Here,
                    Some(_) => Met::Elsewhere,
                };
                prop_assert_eq!(sample.meet(fingerprint, source), expected);
            }
        }
    }

    fn filled(count: u64) -> (Sample, Tally) {
        let (mut sample, mut tally) = (Sample::default(), Tally::default());
        for index in 0..count {
            let fingerprint = Fingerprinter::seeded(5).of(&index.to_le_bytes());
            assert_eq!(sample.meet(fingerprint, 0), Met::New);
            tally.add(fingerprint);
        }
        (sample, tally)
    }

    #[test]
    fn a_fingerprint_takes_at_most_twelve_bytes() {
        for count in [100_000, 130_000, 170_000, 220_000] {
            let (sample, _) = filled(count);
            let each = sample.memory_bytes() as f64 / count as f64;
            assert!((9.4..12.0).contains(&each), "{each} bytes each of {count}");
        }
    }

    #[test]
    fn thinning_halves_the_memory_and_keeps_the_estimate() {
        let (mut sample, tally) = filled(200_000);
        let before = sample.memory_bytes();
        for level in 1..=4 {
            assert!(sample.thin());
            assert!(sample.memory_bytes() <= (before >> level) * 11 / 10);
            let estimate = tally.estimate(level) as f64;
            // Five standard deviations.
            let most = 5.0 / (200_000_f64 / f64::from(1 << level)).sqrt();
            assert!((estimate / 200_000.0 - 1.0).abs() < most, "{estimate} at {level}");
        }
    }

    #[test]
    fn thinning_ends() {
        let mut sample = Sample::default();
        (0..MOST_LEVEL).for_each(|_| assert!(sample.thin()));
        assert!(!sample.thin());
        assert_eq!(sample.meet(Fingerprint(0), 0), Met::New);
        assert_eq!(sample.meet(Fingerprint(1), 0), Met::Left);
    }
}
