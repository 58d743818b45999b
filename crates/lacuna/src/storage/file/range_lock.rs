//! Who touches which bytes of the file.
//!
//! * Always: first come, first served; a request waits for every earlier one it conflicts with,
//!   granted or not, so nobody starves and nobody who holds one lock only can block for ever.
//! * Always: the lock is a [`Hold`], so it can ride with a request into the kernel.
//! * Never: one request holds two.

use std::ops::Range;
use std::sync::Arc;

use event_listener::Event;
use parking_lot::Mutex;

use crate::buffer::{Hold, Release};

/// Stands for the length of the file: a lock up to here keeps the length from changing.
pub(super) const LENGTH: u64 = u64::MAX;

/// Whether holders of overlapping ranges get along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// With other shared holders.
    Shared,
    /// With nobody.
    Exclusive,
}

/// The requests in flight, in the order they came.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    queue: Mutex<Queue>,
    released: Event,
}

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    exclusive: usize,
    /// In ascending order of ids.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    start: u64,
    end: u64,
    mode: Mode,
}

impl RangeLock {
    /// Waits until no earlier conflicting request is left.
    pub(super) async fn lock(self: &Arc<Self>, range: Range<u64>, mode: Mode) -> Hold {
        let (id, granted) = self.queue.lock().enter(range, mode);
        // From here on dropping the future takes the entry out again.
        let hold = Hold::new(Arc::clone(self) as Arc<dyn Release>, id);
        if granted {
            return hold;
        }
        loop {
            let released = self.released.listen();
            if self.queue.lock().is_granted(id) {
                return hold;
            }
            released.await;
        }
    }
}

impl Release for RangeLock {
    fn release(&self, id: u64) {
        self.queue.lock().leave(id);
        self.released.notify(usize::MAX);
    }
}

impl Queue {
    fn enter(&mut self, range: Range<u64>, mode: Mode) -> (u64, bool) {
        let id = self.next_id;
        self.next_id += 1;
        self.entries.push(Entry { id, start: range.start, end: range.end, mode });
        self.exclusive += usize::from(mode == Mode::Exclusive);
        (id, self.is_granted(id))
    }

    fn leave(&mut self, id: u64) {
        if let Ok(index) = self.entries.binary_search_by_key(&id, |entry| entry.id) {
            let entry = self.entries.remove(index);
            self.exclusive -= usize::from(entry.mode == Mode::Exclusive);
        }
    }

    fn is_granted(&self, id: u64) -> bool {
        // The usual case, without a look at the others.
        if self.exclusive == 0 {
            return true;
        }
        let Ok(index) = self.entries.binary_search_by_key(&id, |entry| entry.id) else {
            return false;
        };
        let (earlier, rest) = self.entries.split_at(index);
        !earlier.iter().any(|entry| entry.conflicts_with(&rest[0]))
    }
}

impl Entry {
    fn conflicts_with(&self, other: &Self) -> bool {
        let exclusive = self.mode == Mode::Exclusive || other.mode == Mode::Exclusive;
        exclusive && self.start < other.end && other.start < self.end
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn try_lock(locks: &Arc<RangeLock>, range: Range<u64>, mode: Mode) -> Option<Hold> {
        let mut context = Context::from_waker(Waker::noop());
        match pin!(locks.lock(range, mode)).poll(&mut context) {
            Poll::Ready(hold) => Some(hold),
            Poll::Pending => None,
        }
    }

    #[test]
    fn shared_holders_get_along_and_exclusive_ones_wait() {
        let locks = Arc::new(RangeLock::default());
        let first = try_lock(&locks, 0..10, Mode::Shared);
        let second = try_lock(&locks, 5..15, Mode::Shared);
        assert!(first.is_some() && second.is_some());
        assert!(try_lock(&locks, 9..10, Mode::Exclusive).is_none());
        assert!(try_lock(&locks, 15..16, Mode::Exclusive).is_some());
        drop((first, second));
        assert!(try_lock(&locks, 9..10, Mode::Exclusive).is_some());
    }

    #[test]
    fn a_waiting_exclusive_request_is_not_overtaken() {
        let locks = Arc::new(RangeLock::default());
        let held = try_lock(&locks, 0..10, Mode::Shared);
        let mut context = Context::from_waker(Waker::noop());
        let mut waiting = pin!(locks.lock(0..10, Mode::Exclusive));
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        assert!(try_lock(&locks, 0..10, Mode::Shared).is_none());
        drop(held);
        assert!(waiting.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn a_dropped_waiter_blocks_nobody() {
        let locks = Arc::new(RangeLock::default());
        let held = try_lock(&locks, 0..10, Mode::Shared);
        assert!(try_lock(&locks, 0..LENGTH, Mode::Exclusive).is_none());
        assert!(try_lock(&locks, 3..4, Mode::Shared).is_some());
        drop(held);
        assert!(locks.queue.lock().entries.is_empty());
    }
}
