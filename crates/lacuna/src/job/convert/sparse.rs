//! Finds the zeros in data that was read.

use super::Rules;
use crate::block::is_zero;
use crate::units::GuestOffset;

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) len: usize,
    pub(super) is_zero: bool,
}

/// Splits what lies at `offset` into runs of zeros and of data.
///
/// Blocks of a power of two, aligned in the guest, are zero or not as a whole; zeros between data
/// count only from the sparse size on.
pub(super) fn runs(bytes: &[u8], offset: GuestOffset, rules: &Rules) -> Vec<Run> {
    let whole = |is_zero| vec![Run { len: bytes.len(), is_zero }];
    match usize::try_from(rules.options.sparse_bytes) {
        Ok(0) => whole(false),
        Ok(sparse) => split(bytes, offset, sparse),
        Err(_) => whole(is_zero(bytes)),
    }
}

fn split(bytes: &[u8], offset: GuestOffset, sparse: usize) -> Vec<Run> {
    let block = 1 << sparse.ilog2();
    let mut runs: Vec<Run> = Vec::new();
    let mut rest = bytes;
    let mut len = block - offset.0 as usize % block;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(len.min(rest.len()));
        push(&mut runs, Run { len: head.len(), is_zero: is_zero(head) }, sparse);
        (rest, len) = (tail, block);
    }
    runs
}

/// Adds `next`; data swallows a run of too few zeros between it and earlier data.
fn push(runs: &mut Vec<Run>, next: Run, sparse: usize) {
    match runs.as_mut_slice() {
        [.., last] if last.is_zero == next.is_zero => last.len += next.len,
        [.., data, zeros] if !next.is_zero && zeros.len < sparse => {
            data.len += zeros.len + next.len;
            runs.pop();
        }
        _ => runs.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter per 512 bytes: `.` zeros, `x` data.
    fn of(picture: &str, offset: u64, sparse: usize) -> String {
        let bytes: Vec<u8> =
            picture.bytes().flat_map(|letter| [u8::from(letter == b'x'); 512]).collect();
        let runs = split(&bytes, GuestOffset(offset), sparse);
        assert_eq!(runs.iter().map(|run| run.len).sum::<usize>(), bytes.len());
        let letter = |run: &Run| if run.is_zero { "." } else { "x" };
        runs.iter().map(|run| letter(run).repeat(run.len / 512)).collect()
    }

    #[test]
    fn blocks_count_as_a_whole_and_by_guest_alignment() {
        assert_eq!(of("x.......", 0, 4096), "xxxxxxxx");
        assert_eq!(of("x.......", 512, 4096), "xxxxxxx.");
        assert_eq!(of("........x.......", 0, 4096), "........xxxxxxxx");
        assert_eq!(of("..x.", 2048, 512), "..x.");
    }

    #[test]
    fn short_zeros_between_data_are_data() {
        assert_eq!(of("x..x...x", 0, 1536), "xxxxxxxx");
        assert_eq!(of("xx....xx", 0, 1536), "xx....xx");
        assert_eq!(of("..xx..", 0, 1536), "..xx..");
    }
}
