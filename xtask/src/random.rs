//! Moments that come from a seed.

use std::time::Duration;

/// The same numbers for the same seed (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        // Small seeds would begin with small numbers.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a part of `whole`, and sometimes a bit more.
    pub(crate) fn part_of(&mut self, whole: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        whole.mul_f64((self.0 >> 11) as f64 / (1_u64 << 53) as f64 * 1.05)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_the_same_for_the_same_seed_and_end_a_bit_behind_the_end() {
        let moments = |seed| {
            let mut random = Random::new(seed);
            (0..100).map(|_| random.part_of(Duration::from_secs(1))).collect::<Vec<_>>()
        };
        assert_eq!(moments(7), moments(7));
        assert_ne!(moments(7), moments(9));
        assert!(moments(1)[0] > Duration::from_millis(1));
        assert!(moments(7).iter().all(|moment| *moment < Duration::from_millis(1050)));
    }
}
