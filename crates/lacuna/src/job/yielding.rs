//! Jobs let others run between their steps.

use std::future::poll_fn;
use std::task::Poll;

/// Is pending once, and at once ready again: for jobs, which storage that has all at hand never makes
/// wait. Whoever drives a job can drop it there, and others on the same thread get their turn.
///
/// ```
/// use std::pin::pin;
/// use std::task::{Context, Poll, Waker};
///
/// let mut turn = pin!(lacuna::job::yield_now());
/// let mut context = Context::from_waker(Waker::noop());
/// assert_eq!(turn.as_mut().poll(&mut context), Poll::Pending);
/// assert_eq!(turn.as_mut().poll(&mut context), Poll::Ready(()));
/// ```
pub async fn yield_now() {
    let mut is_over = false;
    poll_fn(|context| {
        if std::mem::replace(&mut is_over, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
