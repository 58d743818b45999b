//! Decides what is read: what changed, cut where the source's own knowledge of zeros changes.

use std::collections::VecDeque;

use lacuna::block::{Extent, Layer};
use lacuna::qcow2::DirtyExtent;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};

use crate::changes::Changes;
use crate::segment::MAX_FRAME_BYTES;

/// A part of the disk that is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// To be read: at most a frame, and not across a multiple of its size.
    Data(GuestRange),
    /// Known to read as zeros.
    Zeros(GuestRange),
}

/// Walks along a disk.
pub(crate) struct Cutter<'a, L, C> {
    source: &'a L,
    changes: &'a C,
    /// Where the walk is.
    at: GuestOffset,
    /// The end of what the changes tell of: behind it the earlier point had no disk.
    known: GuestOffset,
    changed: VecDeque<DirtyExtent>,
    extents: VecDeque<Extent>,
}

impl<'a, L: Layer, C: Changes> Cutter<'a, L, C> {
    /// Walks from `at` on; `changes` are asked up to `known`, and what lies behind that has changed.
    pub(crate) fn new(source: &'a L, changes: &'a C, at: GuestOffset, known: GuestOffset) -> Self {
        let (changed, extents) = (VecDeque::new(), VecDeque::new());
        Self { source, changes, at, known, changed, extents }
    }

    /// Returns the next piece in guest order; nothing at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        let end = GuestOffset(self.source.size_bytes());
        while self.at < end {
            let rest = GuestRange::new(self.at, end - self.at);
            let change = self.change(rest).await?;
            if !change.is_dirty {
                self.at = change.range.end();
                continue;
            }
            let extent = self.extent(change.range).await?;
            let piece = piece(&extent);
            let (Piece::Data(range) | Piece::Zeros(range)) = piece;
            self.at = range.end();
            return Ok(Some(piece));
        }
        Ok(None)
    }

    async fn change(&mut self, rest: GuestRange) -> Result<DirtyExtent> {
        if rest.start >= self.known {
            return Ok(DirtyExtent { range: rest, is_dirty: true });
        }
        while self.changed.front().is_some_and(|run| run.range.end() <= rest.start) {
            self.changed.pop_front();
        }
        if self.changed.is_empty() {
            let asked = GuestRange::new(rest.start, rest.len.min(self.known - rest.start));
            self.changed = self.changes.changes(asked).await?.into();
        }
        let run = self.changed.front().and_then(|run| Some((run, run.range.intersection(&rest)?)));
        match run.filter(|(_, range)| range.start == rest.start) {
            Some((run, range)) => Ok(DirtyExtent { range, is_dirty: run.is_dirty }),
            None => Err(silent("changes", rest)),
        }
    }

    async fn extent(&mut self, rest: GuestRange) -> Result<Extent> {
        while self.extents.front().is_some_and(|run| run.range.end() <= rest.start) {
            self.extents.pop_front();
        }
        if self.extents.front().is_none_or(|run| run.range.start > rest.start) {
            self.extents = self.source.extents(rest).await?.into();
        }
        let run = self.extents.front().and_then(|run| Some((run, run.range.intersection(&rest)?)));
        match run.filter(|(_, range)| range.start == rest.start) {
            Some((run, range)) => Ok(Extent { range, status: run.status }),
            None => Err(silent("block status", rest)),
        }
    }
}

/// Better said than looped over.
fn silent(what: &str, rest: GuestRange) -> Error {
    Error::new(ErrorKind::Io, format!("The source gave no {what} for offset {}", rest.start))
}

fn piece(extent: &Extent) -> Piece {
    let GuestRange { start, len } = extent.range;
    match extent.status.reads_zero {
        true => Piece::Zeros(extent.range),
        false => {
            let most = MAX_FRAME_BYTES - start.0 % MAX_FRAME_BYTES;
            Piece::Data(GuestRange::new(start, len.min(most)))
        }
    }
}
