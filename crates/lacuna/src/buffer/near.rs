//! Blocks that a thread keeps to itself, the smallest ones of the common pool: what it has just put
//! back it takes next, without a lock, and while its core has the bytes at hand.

use std::cell::RefCell;
use std::sync::Arc;

use super::{ALIGNMENT, Block, COMMON};

/// At most this many for each thread: 256 KiB.
const MOST: usize = 64;

thread_local! {
    #[expect(clippy::vec_box, reason = "parts point at their block, which must not move")]
    static NEAR: RefCell<Vec<Box<Block>>> = const { RefCell::new(Vec::new()) };
}

/// Returns a block for `len` bytes, if this thread keeps one.
pub(super) fn take(len: usize) -> Option<Box<Block>> {
    if len > ALIGNMENT {
        return None;
    }
    // A thread that is ending keeps none.
    NEAR.try_with(|near| near.borrow_mut().pop()).ok().flatten()
}

/// Keeps an unused block, or returns it.
pub(super) fn keep(block: Box<Block>) -> Option<Box<Block>> {
    let is_common = block.pool.as_ref().is_some_and(|pool| Arc::ptr_eq(pool, &COMMON.0));
    if block.capacity != ALIGNMENT || !is_common {
        return Some(block);
    }
    let mut block = Some(block);
    let keeping = NEAR.try_with(|near| {
        let mut near = near.borrow_mut();
        if near.len() < MOST {
            near.extend(block.take());
        }
    });
    // A thread that is ending has nothing to keep it in.
    keeping.unwrap_or_default();
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, BufferPool};

    fn kept() -> usize {
        NEAR.with(|near| near.borrow().len())
    }

    #[test]
    fn a_thread_takes_what_it_put_back_last() {
        let first = Buffer::new(100);
        let at = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::new(4096).as_ptr(), at);
    }

    #[test]
    fn a_thread_keeps_few_and_none_of_other_pools_or_sizes() {
        drop(Vec::from_iter((0..2 * MOST).map(|_| Buffer::new(512))));
        assert_eq!(kept(), MOST);
        let taken: Vec<_> = (0..MOST).map(|_| Buffer::new(512)).collect();
        assert_eq!(kept(), 0);
        drop((BufferPool::new(1 << 20).take(512), Buffer::new(8192)));
        assert_eq!(kept(), 0);
        drop(taken);
    }

    #[test]
    fn parts_come_back_as_one_block() {
        let mut head = Buffer::new(4096);
        let before = kept();
        let tail = head.split_off(1000);
        drop(head);
        assert_eq!(kept(), before);
        drop(tail);
        assert_eq!(kept(), before + 1);
    }
}
