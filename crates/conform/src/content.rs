//! Bytes that tell where they belong.

use std::ops::Range;

use crate::Random;

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
    let (mut last, mut value) = (u64::MAX, 0);
    let byte = bytes.map(|offset| {
        if offset / 16 != last {
            last = offset / 16;
            value = word(last);
        }
        value
    });
    byte.collect()
}
