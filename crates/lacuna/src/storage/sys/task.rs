//! A value that another thread delivers.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// The receiving end; resolves when the promise is kept.
///
/// Dropping it does not stop the work: the value is dropped where it is made.
pub(crate) struct Task<T>(Arc<Mutex<State<T>>>);

/// The giving end.
pub(crate) struct Promise<T>(Arc<Mutex<State<T>>>);

enum State<T> {
    Waiting(Option<Waker>),
    Kept(T),
    /// The worker panicked, or the value was taken already.
    Gone,
}

/// Makes both ends.
pub(crate) fn promise<T>() -> (Promise<T>, Task<T>) {
    let state = Arc::new(Mutex::new(State::Waiting(None)));
    (Promise(Arc::clone(&state)), Task(state))
}

impl<T> Promise<T> {
    /// Delivers `value` and wakes whoever waits for it.
    pub(crate) fn keep(self, value: T) {
        self.settle(State::Kept(value));
    }

    fn settle(&self, outcome: State<T>) {
        let mut state = self.0.lock();
        let State::Waiting(waker) = &mut *state else { return };
        let waker = waker.take();
        *state = outcome;
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.settle(State::Gone);
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Gone) {
            State::Kept(value) => Poll::Ready(value),
            State::Waiting(_) => {
                *state = State::Waiting(Some(context.waker().clone()));
                Poll::Pending
            }
            State::Gone => panic!("a thread of the pool panicked, or its task was polled again"),
        }
    }
}
