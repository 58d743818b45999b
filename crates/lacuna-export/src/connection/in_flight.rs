//! Requests that run.
//!
//! A request is polled once where it arrived. What is answered from memory ends there, and its box
//! serves the next one; only what must wait moves to the set that wakes its members one by one.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::reply::Reply;

/// Boxes kept for the next requests.
const SPARE_BOXES: usize = 16;

type Place<F> = Pin<Box<Option<F>>>;

pub(super) struct InFlight<F> {
    waiting: FuturesUnordered<Waiting<F>>,
    spare: Vec<Place<F>>,
    /// What all that runs weighs, in bytes.
    weight: u64,
}

impl<F: Future<Output = Reply>> InFlight<F> {
    pub(super) fn new() -> Self {
        Self { waiting: FuturesUnordered::new(), spare: Vec::new(), weight: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) const fn weight(&self) -> u64 {
        self.weight
    }

    /// Starts a request of `weight` bytes. Returns the reply where it is there at once.
    pub(super) fn start(&mut self, request: F, weight: u64, cx: &mut Context<'_>) -> Option<Reply> {
        let mut place = self.spare.pop().unwrap_or_else(|| Box::pin(None));
        place.as_mut().set(Some(request));
        match poll_place(&mut place, cx) {
            Poll::Ready(reply) => {
                self.put_back(place);
                Some(reply)
            }
            Poll::Pending => {
                self.weight += weight;
                self.waiting.push(Waiting(Some(place)));
                None
            }
        }
    }

    /// Returns a reply that is there now.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Option<Reply> {
        let Poll::Ready(Some((reply, place))) = self.waiting.poll_next_unpin(cx) else {
            return None;
        };
        self.weight -= reply.weight;
        self.put_back(place);
        Some(reply)
    }

    fn put_back(&mut self, mut place: Place<F>) {
        place.as_mut().set(None);
        if self.spare.len() < SPARE_BOXES {
            self.spare.push(place);
        }
    }

    /// Gives back what an idle connection does not need.
    pub(super) fn shrink(&mut self) {
        self.spare = Vec::new();
    }
}

fn poll_place<F: Future>(place: &mut Place<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    match place.as_mut().as_pin_mut() {
        Some(request) => request.poll(cx),
        None => Poll::Pending,
    }
}

/// A request in its box, both returned at the end.
struct Waiting<F>(Option<Place<F>>);

impl<F: Future> Future for Waiting<F> {
    type Output = (F::Output, Place<F>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(mut place) = self.0.take() else { return Poll::Pending };
        match poll_place(&mut place, cx) {
            Poll::Ready(reply) => Poll::Ready((reply, place)),
            Poll::Pending => {
                self.0 = Some(place);
                Poll::Pending
            }
        }
    }
}
