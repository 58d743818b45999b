//! Who changes the disk, and a moment at which nobody does.
//!
//! * Always: who waits for the moment lets no new change begin, so that it comes however constant the
//!   stream of changes.
//! * Always: a change whose buffer a driver still has is not over.

use std::sync::Arc;

use event_listener::{Event, EventListener};
use parking_lot::Mutex;

use crate::buffer::{Hold, Release};

/// Changes pass it; a moment closes it.
pub(super) struct Gate<P> {
    state: Mutex<State<P>>,
    changed: Event,
}

struct State<P> {
    /// Changes that have begun and are not over.
    inside: u64,
    is_closed: bool,
    /// What those have to look at who change something.
    points: Arc<[P]>,
}

/// Leave to change something, until it is dropped.
pub(super) struct Passed<P: Send + Sync> {
    gate: Arc<Gate<P>>,
    /// Nothing where there are none.
    pub(super) points: Option<Arc<[P]>>,
}

impl<P: Send + Sync + 'static> Passed<P> {
    /// Returns one more hold of the change.
    pub(super) fn again(&self) -> Hold {
        self.gate.state.lock().inside += 1;
        Hold::new(Arc::clone(&self.gate) as Arc<dyn Release>, 0)
    }
}

impl<P: Send + Sync> Drop for Passed<P> {
    fn drop(&mut self) {
        self.gate.release(0);
    }
}

impl<P: Send + Sync + 'static> Gate<P> {
    pub(super) fn new() -> Self {
        let state = State { inside: 0, is_closed: false, points: Arc::new([]) };
        Self { state: Mutex::new(state), changed: Event::new() }
    }

    /// Lets a change begin.
    pub(super) async fn pass(self: &Arc<Self>) -> Passed<P> {
        loop {
            match self.try_pass() {
                Ok(passed) => return passed,
                Err(opens) => opens.await,
            }
        }
    }

    fn try_pass(self: &Arc<Self>) -> Result<Passed<P>, EventListener> {
        let mut state = self.state.lock();
        if state.is_closed {
            return Err(self.changed.listen());
        }
        state.inside += 1;
        let points = (!state.points.is_empty()).then(|| Arc::clone(&state.points));
        drop(state);
        Ok(Passed { gate: Arc::clone(self), points })
    }

    /// Waits until no change is under way; none begins while what is returned lives.
    pub(super) async fn close(&self) -> Closed<'_, P> {
        let closed = loop {
            let opens = {
                let mut state = self.state.lock();
                if !state.is_closed {
                    state.is_closed = true;
                    break Closed(self);
                }
                self.changed.listen()
            };
            opens.await;
        };
        loop {
            let over = {
                let state = self.state.lock();
                if state.inside == 0 {
                    return closed;
                }
                self.changed.listen()
            };
            over.await;
        }
    }

    /// Changes which points there are, for changes that begin from now on.
    pub(super) fn change_points(&self, change: impl FnOnce(&[P]) -> Vec<P>) {
        let mut state = self.state.lock();
        state.points = change(&state.points).into();
    }
}

impl<P: Send + Sync> Release for Gate<P> {
    fn release(&self, _: u64) {
        let mut state = self.state.lock();
        state.inside -= 1;
        let is_awaited = state.is_closed && state.inside == 0;
        drop(state);
        if is_awaited {
            self.changed.notify(usize::MAX);
        }
    }
}

/// Nothing changes while this lives.
pub(super) struct Closed<'a, P>(&'a Gate<P>);

impl<P> Drop for Closed<'_, P> {
    fn drop(&mut self) {
        self.0.state.lock().is_closed = false;
        self.0.changed.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn a_moment_comes_when_changes_are_over_and_new_ones_wait_for_its_end() {
        let gate = Arc::new(Gate::<()>::new());
        let mut context = Context::from_waker(Waker::noop());
        let change = pollster::block_on(gate.pass());
        let with_driver = change.again();
        let mut moment = pin!(gate.close());
        assert!(moment.as_mut().poll(&mut context).is_pending());
        let mut next = pin!(gate.pass());
        assert!(next.as_mut().poll(&mut context).is_pending());
        drop(change);
        assert!(moment.as_mut().poll(&mut context).is_pending());
        drop(with_driver);
        let Poll::Ready(closed) = moment.as_mut().poll(&mut context) else {
            panic!("nobody is inside")
        };
        assert!(next.as_mut().poll(&mut context).is_pending());
        drop(closed);
        assert!(next.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn who_waits_no_longer_opens_the_gate_again() {
        let gate = Arc::new(Gate::<()>::new());
        let mut context = Context::from_waker(Waker::noop());
        let change = pollster::block_on(gate.pass());
        {
            let mut moment = pin!(gate.close());
            assert!(moment.as_mut().poll(&mut context).is_pending());
        }
        assert!(gate.try_pass().is_ok());
        drop(change);
    }
}
