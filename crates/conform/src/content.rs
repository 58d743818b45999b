//! Bytes that tell where they belong.

use std::ops::Range;

use crate::Random;

/// Bytes in a row that are the same.
const SAME: u64 = 16;

/// Returns the bytes that `seed` puts into a range of offsets: never zero, they differ from place to
/// place, compress well, and are the same however the range is cut.
///
/// ```
/// use lacuna_conform::content;
/// assert_eq!(content(1, 0..100)[40..], content(1, 40..100));
/// assert_ne!(content(1, 0..100), content(2, 0..100));
/// ```
#[must_use]
pub fn content(seed: u64, bytes: Range<u64>) -> Vec<u8> {
    let word = |index: u64| (Random::new(seed.wrapping_mul(31) ^ index).next() as u8) | 1;
    let Range { start: mut at, end } = bytes;
    let mut all = Vec::with_capacity(end.saturating_sub(at) as usize);
    while at < end {
        let value = word(at / SAME);
        let len = (SAME - at % SAME).min(end - at) as usize;
        all.extend_from_slice(&[value; SAME as usize][..len]);
        at += len as u64;
    }
    all
}
