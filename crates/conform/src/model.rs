//! What the disk must hold while requests change it.

use crate::content;
use crate::image::SparseBytes;

/// The disk as it should be.
#[derive(Clone)]
pub(crate) struct Model {
    bytes: SparseBytes,
    /// Ranges that an answer left open: half-done requests that failed.
    unsure: Vec<(u64, u64)>,
}

/// Where bytes are not what they should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) at: u64,
    pub(crate) expected: u8,
    pub(crate) got: u8,
    pub(crate) count: u64,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { at, expected, got, count } = self;
        write!(f, "{count} bytes differ, the first at {at}: {got:#04x} instead of {expected:#04x}")
    }
}

impl Model {
    pub(crate) fn new(content: &SparseBytes) -> Self {
        Self { bytes: content.clone(), unsure: Vec::new() }
    }

    pub(crate) const fn size(&self) -> u64 {
        self.bytes.len()
    }

    pub(crate) const fn content(&self) -> &SparseBytes {
        &self.bytes
    }

    pub(crate) fn write(&mut self, at: u64, len: u64, seed: u64) {
        self.bytes.write(at, &content(seed, at..at + len));
    }

    pub(crate) fn zero(&mut self, at: u64, len: u64) {
        self.bytes.punch(at, at + len);
    }

    /// Nobody knows any more what a range holds.
    pub(crate) fn forget(&mut self, at: u64, len: u64) {
        self.unsure.push((at, at + len));
    }

    /// Takes over what a discard left: each byte as before, or zero.
    pub(crate) fn settle_discard(&mut self, at: u64, got: &[u8]) -> Option<Difference> {
        let before = self.bytes.read_vec(at, got.len());
        let is_wrong = |(expected, got): (&u8, &u8)| *got != 0 && got != expected;
        let difference = self.difference_by(at, &before, got, is_wrong);
        self.bytes.write(at, got);
        difference
    }

    /// Compares what was read.
    pub(crate) fn difference(&self, at: u64, got: &[u8]) -> Option<Difference> {
        let expected = self.bytes.read_vec(at, got.len());
        self.difference_by(at, &expected, got, |(expected, got)| expected != got)
    }

    fn difference_by(
        &self,
        at: u64,
        expected: &[u8],
        got: &[u8],
        is_wrong: impl Fn((&u8, &u8)) -> bool,
    ) -> Option<Difference> {
        let is_sure =
            |offset: u64| !self.unsure.iter().any(|(start, end)| (*start..*end).contains(&offset));
        let pairs = (at..).zip(expected.iter().zip(got));
        let mut wrong = pairs.filter(|(offset, pair)| is_wrong(*pair) && is_sure(*offset));
        let (at, (expected, got)) = wrong.next()?;
        let count = 1 + wrong.count() as u64;
        Some(Difference { at, expected: *expected, got: *got, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        let mut content = SparseBytes::default();
        content.write(0, &[7; 1024]);
        Model::new(&content)
    }

    #[test]
    fn differences_are_counted_and_named() {
        let mut got = [7; 1024];
        assert_eq!(model().difference(0, &got), None);
        (got[100], got[300]) = (1, 2);
        let found = model().difference(0, &got).unwrap();
        assert_eq!(found, Difference { at: 100, expected: 7, got: 1, count: 2 });
        let mut unsure = model();
        unsure.forget(50, 100);
        assert_eq!(unsure.difference(0, &got).unwrap().at, 300);
    }

    #[test]
    fn a_discard_leaves_the_old_bytes_or_zeros_and_nothing_else() {
        let mut model = model();
        assert_eq!(model.settle_discard(0, &[0; 512]), None);
        assert_eq!(model.settle_discard(512, &[7; 512]), None);
        assert_eq!(model.difference(0, &[[0; 512], [7; 512]].concat()), None);
        assert_eq!(model.settle_discard(1000, &[9; 4]).unwrap().at, 1000);
    }
}
