//! Collects as many bytes as a message has, however they arrive.

/// Bytes of a message that has not arrived as a whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gather(Vec<u8>);

impl Gather {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Moves bytes from `input` until there are `need`; says whether there are.
    ///
    /// Memory grows with what arrives, never with what was announced.
    pub(crate) fn fill(&mut self, input: &mut &[u8], need: usize) -> bool {
        let missing = need.saturating_sub(self.0.len());
        self.0.extend_from_slice(take(input, missing));
        self.0.len() >= need
    }

    /// Returns what was collected and starts anew.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }

    /// Returns what was collected, which must be `N` bytes, and starts anew, keeping the memory.
    pub(crate) fn array<const N: usize>(&mut self) -> [u8; N] {
        let array = self.0.first_chunk().copied();
        debug_assert!(array.is_some(), "collected before it is taken");
        self.0.clear();
        array.unwrap_or([0; N])
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Takes up to `len` bytes off the front of `input`.
pub(crate) fn take<'a>(input: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(len.min(input.len()));
    *input = rest;
    taken
}

/// Takes off the front of `input` what it has of `remaining` bytes, and counts them off.
pub(crate) fn take_of<'a>(input: &mut &'a [u8], remaining: &mut u64) -> &'a [u8] {
    let taken = take(input, usize::try_from(*remaining).unwrap_or(usize::MAX));
    *remaining = remaining.saturating_sub(taken.len() as u64);
    taken
}
