//! The queue of what a client has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use smallvec::SmallVec;
use tokio::io::AsyncWrite;

use super::reply::Part;
use crate::stream::Stream;

/// How many pieces of memory go out with one call.
const PIECES_AT_ONCE: usize = 64;
/// Parts for which a queue that is empty keeps room.
const SPARE_PARTS: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Output {
    parts: VecDeque<Part>,
    /// How much of the first part is out.
    sent: usize,
    bytes: u64,
    /// How much memory the parts take.
    memory_bytes: u64,
}

impl Output {
    pub(super) fn push(&mut self, part: Part) {
        self.bytes += part.len() as u64;
        self.memory_bytes += part.memory_bytes();
        self.parts.push_back(part);
    }

    /// Returns how many bytes wait.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns how many bytes of memory what waits takes: a short reply takes more than it has.
    pub(super) const fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Gives back what an idle connection does not need.
    pub(super) fn shrink(&mut self) {
        self.parts.shrink_to(SPARE_PARTS);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Sends until all is out or the client takes no more.
    pub(super) fn poll_send(
        &mut self,
        stream: &mut Stream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.parts.is_empty() {
            let sent = {
                let pieces = self.pieces();
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &pieces))?
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent);
        }
        Pin::new(stream).poll_flush(cx)
    }

    fn pieces(&self) -> SmallVec<[IoSlice<'_>; PIECES_AT_ONCE]> {
        let mut skipped = self.sent;
        let pieces = self.parts.iter().flat_map(Part::pieces).filter_map(|piece| {
            let rest = piece.get(skipped..).unwrap_or_default();
            skipped = skipped.saturating_sub(piece.len());
            (!rest.is_empty()).then(|| IoSlice::new(rest))
        });
        pieces.take(PIECES_AT_ONCE).collect()
    }

    fn advance(&mut self, sent: usize) {
        self.bytes -= sent as u64;
        self.sent += sent;
        while let Some(first) = self.parts.front().filter(|first| self.sent >= first.len()) {
            self.sent -= first.len();
            self.memory_bytes -= first.memory_bytes();
            self.parts.pop_front();
        }
    }
}
