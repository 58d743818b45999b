//! Who waits until nobody changes the image goes before those who come later.
//!
//! Requests overlap, and with enough of them there is never a moment without one. So who needs that
//! moment says so first: requests that come from then on wait before they claim anything, those under way
//! end, and the moment is there.
//!
//! * Always: a request gives way at its very beginning. One that has claimed something never waits here, or
//!   both would wait for ever.
//! * Never: a read gives way; it is in nobody's way.

use std::sync::atomic::Ordering;

use super::image::Image;
use crate::Result;
use crate::buffer::Hold;
use crate::storage::Storage;
use crate::units::GuestRange;

/// One who waits for the moment; others give way while it lives.
struct First<'a, S: Storage>(&'a Image<S>);

impl<S: Storage> Image<S> {
    /// Waits while somebody else waits to be alone. For requests that begin.
    pub(super) async fn give_way(&self) {
        if self.0.waiting_to_be_alone.load(Ordering::Acquire) > 0 {
            // Boxed: the futures of requests stay small.
            Box::pin(self.let_first()).await;
        }
    }

    async fn let_first(&self) {
        loop {
            let over = self.0.meta.lock().in_flight.wait();
            if self.0.waiting_to_be_alone.load(Ordering::Acquire) == 0 {
                return;
            }
            over.await;
        }
    }

    /// Waits until nobody changes anything in `range`, before all who come later, and keeps it so while
    /// the hold lives.
    pub(super) async fn be_alone(&self, range: GuestRange) -> Result<Hold> {
        self.0.waiting_to_be_alone.fetch_add(1, Ordering::AcqRel);
        let _first = First(self);
        self.exclude_others(range).await
    }
}

impl<S: Storage> Drop for First<'_, S> {
    fn drop(&mut self) {
        let image = &self.0.0;
        image.waiting_to_be_alone.fetch_sub(1, Ordering::AcqRel);
        image.meta.lock().in_flight.wake_all();
    }
}
