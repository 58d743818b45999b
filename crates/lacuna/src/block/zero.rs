//! Finding zeros in bytes that had to be read anyway.
//!
//! * Always byte-exact: a tail shorter than a word counts (D.1-55).
//! * Never a reason to read: what metadata knows is asked first.

/// Bytes looked at between two early exits: four cache lines, which compilers turn into vectors.
const STRIDE: usize = 256;

/// Says whether all of `bytes` are zero; no byte at all is all zeros.
///
/// ```
/// use lacuna::block::is_zero;
/// assert!(is_zero(&[0; 4097]));
/// assert!(!is_zero(&[0, 0, 1]));
/// ```
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    if bytes.first().is_some_and(|&byte| byte != 0) || bytes.last().is_some_and(|&byte| byte != 0) {
        return false;
    }
    let (strides, rest) = bytes.as_chunks::<STRIDE>();
    strides.iter().all(|stride| union(stride) == 0) && union(rest) == 0
}

/// Returns the place of the first byte that is not zero.
///
/// ```
/// assert_eq!(lacuna::block::first_nonzero(&[0, 0, 7]), Some(2));
/// assert_eq!(lacuna::block::first_nonzero(&[0; 512]), None);
/// ```
#[must_use]
pub fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let zeros = bytes.chunks(STRIDE).take_while(|stride| union(stride) == 0).count() * STRIDE;
    let rest = bytes.get(zeros..)?;
    rest.iter().position(|&byte| byte != 0).map(|place| zeros + place)
}

/// The bits that any byte has set. Without a branch inside, so that it vectorises.
fn union(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |bits, byte| bits | byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_found_at_every_length() {
        for len in (0..600).chain([4095, 4096, 4097]) {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} zeros");
            assert_eq!(first_nonzero(&bytes), None, "{len} zeros");
            for place in 0..len {
                bytes[place] = 0x80;
                assert!(!is_zero(&bytes), "byte {place} of {len}");
                assert_eq!(first_nonzero(&bytes), Some(place), "byte {place} of {len}");
                bytes[place] = 0;
            }
        }
    }

    #[test]
    fn slices_at_any_alignment_are_judged_alike() {
        let mut bytes = vec![0; 2048];
        bytes[1024] = 1;
        for start in 0..64 {
            assert!(is_zero(&bytes[start..1024]));
            assert!(!is_zero(&bytes[start..1025]));
        }
    }
}
