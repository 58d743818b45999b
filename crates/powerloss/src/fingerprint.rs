//! Fingerprints of what a medium holds, made from what differs from files that are known.
//!
//! * Always: equal files have equal fingerprints, whatever they were compared with.

use testkit::SparseBytes;
use twox_hash::XxHash3_64;

/// Spreads what tells pages of equal content apart.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Files, and their fingerprint: a sum over the pages of each.
#[derive(Default)]
pub(crate) struct Fingerprints {
    files: Vec<SparseBytes>,
    sum: u64,
}

impl Fingerprints {
    /// Knows these files from here on.
    pub(crate) fn stand_on(&mut self, files: &[SparseBytes]) {
        self.sum = self.of(files);
        self.files = files.to_vec();
    }

    /// Returns the fingerprint of files.
    pub(crate) fn of(&self, files: &[SparseBytes]) -> u64 {
        let nothing = SparseBytes::default();
        let mut sum = self.sum;
        for (number, file) in files.iter().enumerate() {
            let known = self.files.get(number).unwrap_or(&nothing);
            sum = sum.wrapping_add(of_len(number, file)).wrapping_sub(of_len(number, known));
            for (index, page, other) in file.pages_beside(known) {
                let of = |page: Option<&[u8]>| page.map_or(0, |page| of_page(number, index, page));
                sum = sum.wrapping_add(of(page)).wrapping_sub(of(other));
            }
        }
        sum
    }
}

fn of_page(file: usize, index: u64, bytes: &[u8]) -> u64 {
    let place = (index << 3 | file as u64).wrapping_add(1).wrapping_mul(SPREAD);
    (XxHash3_64::oneshot(bytes) ^ place).wrapping_mul(SPREAD).rotate_left(29).wrapping_mul(SPREAD)
}

fn of_len(file: usize, bytes: &SparseBytes) -> u64 {
    of_page(file, u64::MAX >> 3, &bytes.len().to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(parts: &[(u64, &[u8])]) -> SparseBytes {
        let mut file = SparseBytes::default();
        parts.iter().for_each(|(at, bytes)| file.write(*at, bytes));
        file
    }

    #[test]
    fn equal_files_have_equal_fingerprints_whatever_they_were_compared_with() {
        let one = [file(&[(0, b"one"), (9000, b"two")]), file(&[(0, b"three")])];
        let same = [file(&[(9000, b"two"), (0, b"one")]), file(&[(0, b"three")])];
        let mut fingerprints = Fingerprints::default();
        let first = fingerprints.of(&one);
        fingerprints.stand_on(&[file(&[(0, b"other"), (70_000, b"page")]), one[0].clone()]);
        assert_eq!(fingerprints.of(&one), first);
        fingerprints.stand_on(&one);
        assert_eq!(fingerprints.of(&one), first);
        assert_eq!(fingerprints.of(&same), first);
    }

    #[test]
    fn other_files_have_other_fingerprints() {
        let page = [7; 4096];
        let mut longer = file(&[(0, &page)]);
        longer.set_len(5000);
        let nothing = SparseBytes::default;
        let files = [
            [file(&[(0, &page)]), nothing()],
            [file(&[(4096, &page)]), nothing()],
            [file(&[(0, &page), (4096, &page)]), nothing()],
            [nothing(), file(&[(0, &page)])],
            [longer, nothing()],
            [file(&[(0, &page[..4095])]), nothing()],
            [nothing(), nothing()],
        ];
        let mut all = std::collections::HashSet::new();
        let fingerprints = Fingerprints::default();
        assert!(files.iter().all(|files| all.insert(fingerprints.of(files))));
    }
}
