//! Writes that do not keep to the blocks of a test driver (`align`): what is around them is read first,
//! and whole blocks are written. Its steps are events, as QEMU has them.

use std::ops::Range;

use lacuna::Result;
use lacuna::buffer::Buffer;
use lacuna::storage::{Storage, Transfer};
use lacuna::units::HostOffset;

use super::rules::Rules;
use super::turns::Share;
use crate::nodes::any::AnyStorage;

/// What reading a block is called, before and after.
#[derive(Clone, Copy)]
struct Steps {
    before: &'static [&'static str],
    after: &'static [&'static str],
}

const HEAD: Steps = Steps { before: &["pwritev_rmw_head"], after: &["pwritev_rmw_after_head"] };
const TAIL: Steps = Steps { before: &["pwritev_rmw_tail"], after: &["pwritev_rmw_after_tail"] };
/// Both in one block, which is read once.
const BOTH: Steps = Steps {
    before: &["pwritev_rmw_head", "pwritev_rmw_tail"],
    after: &["pwritev_rmw_after_head", "pwritev_rmw_after_tail"],
};

/// A range of bytes and the blocks that it lies in.
pub(super) struct Blocks {
    pub(super) bytes: Range<u64>,
    pub(super) around: Range<u64>,
    size: u64,
}

impl Blocks {
    /// `size` is a power of two.
    pub(super) const fn around(offset: u64, len: u64, size: u64) -> Self {
        let end = offset.saturating_add(len);
        let (first, last) = (offset & !(size - 1), end.saturating_add(size - 1) & !(size - 1));
        Self { bytes: offset..end, around: first..last, size }
    }

    pub(super) fn share(&self) -> Share {
        if self.bytes == self.around { Share::Whole } else { Share::Part }
    }

    /// Returns the blocks that have to be read, with the steps of that.
    fn edges(&self) -> Vec<(u64, Steps)> {
        let (first, last) = (self.around.start, self.around.end - self.size);
        let has_head = self.bytes.start > self.around.start;
        let has_tail = self.bytes.end < self.around.end;
        if has_head && has_tail && first == last {
            return vec![(first, BOTH)];
        }
        let head = has_head.then_some((first, HEAD));
        head.into_iter().chain(has_tail.then_some((last, TAIL))).collect()
    }
}

/// Writes `bytes` by way of whole blocks that nobody else is in.
pub(super) async fn write_part(
    below: &AnyStorage,
    rules: &Rules,
    blocks: &Blocks,
    mut bytes: Buffer,
) -> Transfer {
    let mut whole = match read_edges(below, rules, blocks).await {
        Ok(whole) => whole,
        Err(error) => return (Err(error), bytes),
    };
    let at = (blocks.bytes.start - blocks.around.start) as usize;
    whole[at..at + bytes.len()].copy_from_slice(&bytes);
    rules.event("pwritev").await;
    if let Err(error) = rules.check("write", blocks.around.start, whole.len() as u64) {
        return (Err(error), bytes);
    }
    whole.set_hold(bytes.take_hold());
    let (result, mut whole) = below.write_at(HostOffset(blocks.around.start), whole).await;
    bytes.set_hold(whole.take_hold());
    rules.event("pwritev_done").await;
    (result, bytes)
}

/// Returns memory for all blocks, with what is there at the edges.
async fn read_edges(below: &AnyStorage, rules: &Rules, blocks: &Blocks) -> Result<Buffer> {
    let mut whole = Buffer::zeroed((blocks.around.end - blocks.around.start) as usize);
    for (block, steps) in blocks.edges() {
        for event in steps.before {
            rules.event(event).await;
        }
        rules.check("read", block, blocks.size)?;
        let buffer = Buffer::new(blocks.size as usize);
        let (result, bytes) = below.read_at(HostOffset(block), buffer).await;
        result?;
        whole[(block - blocks.around.start) as usize..][..bytes.len()].copy_from_slice(&bytes);
        for event in steps.after {
            rules.event(event).await;
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_at_the_edges_are_read_each_once() {
        let read = |offset, len| {
            let blocks = Blocks::around(offset, len, 4096);
            let edges = blocks.edges().into_iter().map(|(at, steps)| (at, steps.before.len()));
            (blocks.around.clone(), edges.collect::<Vec<_>>())
        };
        assert_eq!(read(512, 512), (0..4096, vec![(0, 2)]));
        assert_eq!(read(0, 512), (0..4096, vec![(0, 1)]));
        assert_eq!(read(4608, 8192), (4096..16384, vec![(4096, 1), (12288, 1)]));
        assert_eq!(read(4096, 8192), (4096..12288, vec![]));
        assert_eq!(Blocks::around(4096, 8192, 4096).share(), Share::Whole);
    }
}
