//! Which units of a disk are saved: a bit each, and no memory for what is all alike.

/// Units of a chunk.
const CHUNK_UNITS: u64 = 1 << 15;
const WORDS: usize = (CHUNK_UNITS / 64) as usize;

/// A set of units, by their index.
#[derive(Debug, Default)]
pub(super) struct UnitSet {
    /// Of whole chunks, as far as any unit was put in.
    chunks: Vec<Chunk>,
}

#[derive(Debug, Default)]
enum Chunk {
    All,
    #[default]
    None,
    Some(Box<[u64; WORDS]>),
}

/// Neighbours that are all in a set, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) is_in: bool,
    /// The first unit behind it.
    pub(super) end: u64,
}

impl UnitSet {
    /// Puts the units from `start` up to `end`, which does not belong to them, into the set.
    pub(super) fn insert(&mut self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let index = (at / CHUNK_UNITS) as usize;
            let first = index as u64 * CHUNK_UNITS;
            let to = end.min(first + CHUNK_UNITS);
            if self.chunks.len() <= index {
                self.chunks.resize_with(index + 1, Chunk::default);
            }
            self.chunks[index].insert(at - first, to - first);
            at = to;
        }
    }

    /// Returns the run that begins at `start`, as far as `end`, which lies behind it.
    pub(super) fn run(&self, start: u64, end: u64) -> Run {
        let is_in = self.contains(start);
        let mut at = start;
        while at < end {
            let index = (at / CHUNK_UNITS) as usize;
            let first = index as u64 * CHUNK_UNITS;
            let to = end.min(first + CHUNK_UNITS);
            let chunk = self.chunks.get(index).unwrap_or(&Chunk::None);
            match chunk.first(!is_in, at - first, to - first) {
                Some(other) => return Run { is_in, end: first + other },
                None => at = to,
            }
        }
        Run { is_in, end }
    }

    fn contains(&self, unit: u64) -> bool {
        let chunk = self.chunks.get((unit / CHUNK_UNITS) as usize).unwrap_or(&Chunk::None);
        chunk.contains(unit % CHUNK_UNITS)
    }
}

impl Chunk {
    fn insert(&mut self, start: u64, end: u64) {
        if end - start == CHUNK_UNITS {
            *self = Self::All;
        }
        if matches!(self, Self::None) {
            *self = Self::Some(Box::new([0; WORDS]));
        }
        let Self::Some(words) = self else { return };
        for word in start / 64..=(end - 1) / 64 {
            let (from, to) =
                (start.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
            words[word as usize] |= mask(from, to);
        }
        if words.iter().all(|word| *word == u64::MAX) {
            *self = Self::All;
        }
    }

    fn contains(&self, unit: u64) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Some(words) => words[(unit / 64) as usize] >> (unit % 64) & 1 == 1,
        }
    }

    /// Returns the first unit of a range that is in, or is not.
    fn first(&self, is_in: bool, start: u64, end: u64) -> Option<u64> {
        let words = match (self, is_in) {
            (Self::All, true) | (Self::None, false) => return Some(start),
            (Self::All, false) | (Self::None, true) => return None,
            (Self::Some(words), _) => words,
        };
        (start / 64..=(end - 1) / 64).find_map(|word| {
            let (from, to) =
                (start.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
            let bits = words[word as usize] ^ if is_in { 0 } else { u64::MAX };
            let found = bits & mask(from, to);
            (found != 0).then(|| word * 64 + u64::from(found.trailing_zeros()))
        })
    }
}

/// Returns bits `from` up to `to`, which lies behind it.
const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (64 - (to - from))) << from
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn runs_are_those_of_a_set_of_numbers() {
        const UNITS: u64 = 3 * CHUNK_UNITS + 77;
        let (mut set, mut model) = (UnitSet::default(), BTreeSet::new());
        let mut number = 7_u64;
        let mut next = |below: u64| {
            number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (number >> 33) % below
        };
        for round in 0..200 {
            let start = next(UNITS);
            let len = match round % 10 {
                0 => next(2 * CHUNK_UNITS),
                1 => 64,
                _ => next(200),
            };
            let end = (start + 1 + len).min(UNITS);
            set.insert(start, end);
            model.extend(start..end);
            let (from, to) = (next(UNITS - 1), UNITS - next(40));
            let to = to.max(from + 1);
            let is_in = model.contains(&from);
            let end = (from..to).find(|unit| model.contains(unit) != is_in).unwrap_or(to);
            assert_eq!(set.run(from, to), Run { is_in, end }, "{from} to {to}");
        }
    }

    #[test]
    fn what_is_all_alike_takes_no_memory() {
        let mut set = UnitSet::default();
        for start in 0..4 * CHUNK_UNITS / 256 {
            set.insert(start * 256, (start + 1) * 256);
        }
        assert!(set.chunks.iter().all(|chunk| matches!(chunk, Chunk::All)));
    }
}
