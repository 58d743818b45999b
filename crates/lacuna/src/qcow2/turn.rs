//! One at a time, of those who wait without a thread.
//!
//! * Always: whoever asks while nobody has it gets it, in whatever order they asked. A future that its task
//!   does not poll holds nobody up, as it would where the turn is handed to the next in a queue.
//! * Never: a clock decides. What a simulation ran once it runs again.

use std::sync::atomic::{AtomicBool, Ordering};

use event_listener::Event;

#[derive(Debug, Default)]
pub(super) struct Turn {
    is_taken: AtomicBool,
    /// Told to all who wait, as any of them may have given up or not be looked at.
    over: Event,
}

/// The turn, until it is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for the turn.
    pub(super) async fn take(&self) -> Taken<'_> {
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            let over = self.over.listen();
            // It may have become free before we listened.
            if let Some(taken) = self.try_take() {
                return taken;
            }
            over.await;
        }
    }

    fn try_take(&self) -> Option<Taken<'_>> {
        let was_taken = self.is_taken.swap(true, Ordering::Acquire);
        (!was_taken).then(|| Taken(self))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.is_taken.store(false, Ordering::Release);
        self.0.over.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn one_at_a_time() {
        let counted = std::sync::Mutex::new(0);
        let turn = Turn::default();
        let add = || {
            for _ in 0..10_000 {
                pollster::block_on(async {
                    let _taken = turn.take().await;
                    let seen = *counted.try_lock().expect("nobody else has the turn");
                    *counted.try_lock().expect("nobody else has the turn") = seen + 1;
                });
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(add))));
        assert_eq!(*counted.lock().unwrap(), 40_000);
    }

    #[test]
    fn who_is_not_polled_holds_nobody_up() {
        let turn = Turn::default();
        let mut context = Context::from_waker(Waker::noop());
        let taken = pollster::block_on(turn.take());
        let mut first = pin!(turn.take());
        let mut second = pin!(turn.take());
        assert!(first.as_mut().poll(&mut context).is_pending());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(taken);
        let Poll::Ready(taken) = second.as_mut().poll(&mut context) else {
            panic!("the first, which is not polled, keeps the second waiting");
        };
        assert!(first.as_mut().poll(&mut context).is_pending());
        drop(taken);
        assert!(first.as_mut().poll(&mut context).is_ready());
    }
}
