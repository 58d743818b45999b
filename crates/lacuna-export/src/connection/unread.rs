//! What was received and not looked at yet, since the limits were reached.

/// Bytes that stay where they are while they are taken piece by piece: a client may send thousands
/// of requests at once.
#[derive(Debug, Default)]
pub(super) struct Unread {
    bytes: Vec<u8>,
    /// How many of them were taken.
    taken: usize,
}

impl Unread {
    pub(super) const fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, taken: 0 }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    /// Forgets the first `len` bytes, and the memory with the last one.
    pub(super) fn took(&mut self, len: usize) {
        self.taken += len;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_copied_where_little_is_taken_at_a_time() {
        let mut unread = Unread::new(vec![7; 300_000]);
        let start = unread.rest().as_ptr().addr();
        for taken in (0..300_000).step_by(28).skip(1) {
            unread.took(28);
            assert_eq!(unread.rest().as_ptr().addr() - start, taken);
        }
        assert_eq!(unread.rest().len(), 8);
        unread.took(8);
        assert!(unread.is_empty() && unread.bytes.capacity() == 0);
    }
}
