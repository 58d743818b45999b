//! Bytes taken for choices, so that a fuzzer that changes a byte changes one decision.

/// Choices that bytes make; where the bytes end, every further one is the first there is.
pub(super) struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) const fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number of two bytes below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        (u64::from(self.byte()) | u64::from(self.byte()) << 8) % limit
    }

    /// One in `n`, which is at most 256.
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        u64::from(self.byte()) % n == n - 1
    }

    pub(super) fn pick<'b, T>(&mut self, choices: &'b [T]) -> &'b T {
        &choices[usize::from(self.byte()) % choices.len()]
    }

    /// Eight bytes.
    pub(super) fn word(&mut self) -> u64 {
        (0..8).fold(0, |word, _| word << 8 | u64::from(self.byte()))
    }
}
