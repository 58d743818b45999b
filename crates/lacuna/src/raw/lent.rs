//! What drivers have of a disk that keeps no record of its requests, those of dropped ones among it.
//!
//! Memory: 8 bytes and what a tree takes for each request that is under way.

use std::collections::BTreeSet;
use std::sync::Arc;

use event_listener::Event;
use parking_lot::Mutex;

use crate::buffer::{Hold, Release};

/// Changes that are with a driver.
#[derive(Debug, Default)]
pub(super) struct Lent {
    state: Mutex<State>,
    over: Event,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    out: BTreeSet<u64>,
}

impl Lent {
    /// Counts a change until the driver lets go of what is returned.
    pub(super) fn hold(self: &Arc<Self>) -> Hold {
        let mut state = self.state.lock();
        let token = state.next;
        state.next += 1;
        state.out.insert(token);
        drop(state);
        Hold::new(Arc::clone(self) as Arc<dyn Release>, token)
    }

    /// Returns when all changes are over that began before.
    pub(super) async fn settled(&self) {
        let now = self.state.lock().next;
        loop {
            let over = self.over.listen();
            if self.state.lock().out.first().is_none_or(|first| *first >= now) {
                return;
            }
            over.await;
        }
    }
}

impl Release for Lent {
    fn release(&self, token: u64) {
        self.state.lock().out.remove(&token);
        self.over.notify(usize::MAX);
    }
}
