//! Long work on a thread that has other work.

use std::future::poll_fn;
use std::task::Poll;

/// Is pending once, whatever executor runs it: other futures of the thread have their turn.
pub(crate) async fn step_aside() {
    let mut was_asked = false;
    poll_fn(|context| {
        if was_asked {
            return Poll::Ready(());
        }
        was_asked = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
