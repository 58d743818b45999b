//! Who waits for whom, where requests change parts of blocks: such a request reads whole blocks, changes
//! a part and writes them back, and nobody else may be in there meanwhile.
//!
//! * A request waits for those that run, not for those that wait: so nobody waits for itself.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Whether a request keeps to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// Whole blocks: others that do so may be in there too.
    Whole,
    /// A part of one: others keep out.
    Part,
}

/// The requests that run.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    running: Vec<(u64, Range<u64>, Share)>,
    waiting: Vec<Waker>,
}

/// A request that runs, until this is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    id: u64,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing that runs is in the way.
    pub(super) async fn enter(&self, blocks: Range<u64>, share: Share) -> Turn<'_> {
        poll_fn(|context| {
            let mut state = self.state();
            let is_in_the_way = |(_, other, its): &(u64, Range<u64>, Share)| {
                let overlaps = other.start < blocks.end && blocks.start < other.end;
                overlaps && (share == Share::Part || *its == Share::Part)
            };
            if state.running.iter().any(is_in_the_way) {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            let id = state.next_id;
            state.next_id += 1;
            state.running.push((id, blocks.clone(), share));
            Poll::Ready(Turn { turns: self, id })
        })
        .await
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.turns.state();
            state.running.retain(|(id, ..)| *id != self.id);
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[test]
    fn a_part_keeps_others_out_of_its_blocks_and_whole_blocks_do_not() {
        let turns = Turns::default();
        let enter = |blocks, share| turns.enter(blocks, share).now_or_never();
        let first = enter(0..4, Share::Whole).unwrap();
        let second = enter(2..6, Share::Whole).unwrap();
        assert!(enter(5..8, Share::Part).is_none());
        drop(second);
        let part = enter(5..8, Share::Part).unwrap();
        assert!(enter(7..9, Share::Whole).is_none());
        assert!(enter(8..9, Share::Whole).is_some());
        drop((first, part));
        assert!(enter(0..9, Share::Part).is_some());
    }

    #[test]
    fn who_waits_is_in_nobodys_way_and_goes_on_when_it_may() {
        let turns = Turns::default();
        let first = turns.enter(0..2, Share::Part).now_or_never().unwrap();
        let mut second = Box::pin(turns.enter(1..4, Share::Part));
        assert!(second.as_mut().now_or_never().is_none());
        let third = turns.enter(3..4, Share::Part).now_or_never().unwrap();
        drop(first);
        assert!(second.as_mut().now_or_never().is_none());
        drop(third);
        assert!(second.now_or_never().is_some());
    }
}
