//! Words of bitmap tables and of the directory that are to name other places, whose bytes are the same.
//!
//! | step | what is written | what a crash leaves |
//! |---|---|---|
//! | 1 | a copy at a new place, and its refcount | leaks |
//! | 2 | the word that names it, which is never torn | either place is named: both hold the same |
//! | 3 | the refcount of the old place | leaks |
//!
//! * Always: a write-back does the second step, as with pointers of L2 tables.
//! * Always: whoever takes the turn to mark or store bitmaps has words stored first that were left, so
//!   that nobody writes to a place that is given up.

use super::super::image::Image;
use super::super::turn::Taken;
use super::super::write_back::{Piece, Refcounting};
use super::Bitmaps;
use crate::Result;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Words that storage does not have yet.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Moves {
    /// Where each lies, and what it is to be.
    words: Vec<(HostOffset, HostOffset)>,
    /// What only the words before them name.
    replaced: Vec<HostRange>,
}

impl Moves {
    pub(in crate::qcow2) const fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Adds a word at `at` that names `to` from now on, and `old` no more.
    pub(in crate::qcow2) fn add(&mut self, at: HostOffset, to: HostOffset, old: HostRange) {
        self.words.push((at, to));
        self.replaced.push(old);
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.words.extend(more.words);
        self.replaced.extend(more.replaced);
    }
}

impl Bitmaps {
    /// Has the next write-back of refcounts store some words.
    pub(in crate::qcow2) fn add_moves(&mut self, moves: Moves) {
        self.moves.extend(moves);
    }

    /// Hands out the words; [`moves_stored`](Self::moves_stored) or [`redo_moves`](Self::redo_moves)
    /// comes next.
    pub(in crate::qcow2) fn take_moves(&mut self) -> Vec<Piece> {
        self.moves_on_their_way = std::mem::take(&mut self.moves);
        let words = self.moves_on_their_way.words.iter();
        words.map(|(at, to)| Piece { offset: *at, bytes: to.0.to_be_bytes().to_vec() }).collect()
    }

    /// Storage has what was handed out. Returns what nothing names any more.
    pub(in crate::qcow2) fn moves_stored(&mut self) -> Vec<HostRange> {
        let done = std::mem::take(&mut self.moves_on_their_way);
        if !done.is_empty() {
            // What was read of a table before may be somebody else's soon.
            self.generation += 1;
        }
        done.replaced
    }

    pub(in crate::qcow2) fn redo_moves(&mut self) {
        let again = std::mem::take(&mut self.moves_on_their_way);
        self.moves.extend(again);
    }
}

impl<S: Storage> Image<S> {
    /// Waits for the turn to mark, store and move bitmaps.
    pub(in crate::qcow2) async fn take_bitmap_turn(&self) -> Result<Taken<'_>> {
        let turn = self.0.bitmap_turn.take().await;
        let are_left = {
            let bitmaps = &self.0.meta.lock().bitmaps;
            !bitmaps.moves.is_empty() || !bitmaps.moves_on_their_way.is_empty()
        };
        if are_left {
            self.write_back(Refcounting::Written).await?;
        }
        Ok(turn)
    }
}
