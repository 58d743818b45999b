//! What may be seen after a power loss at each moment of a run.
//!
//! * Always: moments are counts of the host's events, and everything said from a moment on holds for a loss
//!   right at it.
//! * What is being done may have happened or not; what a flush (or a change that is durable when it returns)
//!   covered has.

use std::sync::Arc;

use lacuna::units::GuestRange;

use crate::versions::{Disk, SECTOR, Seen, Versions};

/// The record of what was asked and answered.
#[derive(Default)]
pub(crate) struct Truth {
    pub(crate) disk: Versions,
    /// The state of a virtual machine.
    pub(crate) machine: Versions,
    pub(crate) snapshots: Vec<Kept>,
    pub(crate) bitmaps: Vec<Marked>,
}

/// From when to when something may be there, and must.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Life {
    pub(crate) begun: usize,
    pub(crate) made: Option<usize>,
    pub(crate) going: Option<usize>,
    pub(crate) gone: Option<usize>,
}

impl Life {
    pub(crate) const fn since(begun: usize) -> Self {
        Self { begun, made: None, going: None, gone: None }
    }

    fn may_be(&self, moment: usize) -> bool {
        self.begun <= moment && self.gone.is_none_or(|gone| moment < gone)
    }

    fn must_be(&self, moment: usize) -> bool {
        self.made.is_some_and(|made| made <= moment)
            && self.going.is_none_or(|going| moment < going)
    }

    /// Says how many promises there are at a moment.
    fn promises(&self, moment: usize) -> usize {
        [self.made, self.gone].into_iter().flatten().filter(|at| *at <= moment).count()
    }
}

/// An internal snapshot.
#[derive(Clone)]
pub(crate) struct Kept {
    pub(crate) name: String,
    pub(crate) disk: Disk,
    pub(crate) machine: Vec<u8>,
    pub(crate) life: Life,
}

/// A dirty bitmap.
pub(crate) struct Marked {
    pub(crate) name: String,
    pub(crate) life: Life,
    pub(crate) claims: Vec<Claim>,
}

/// What a bitmap has to name while this holds: all that differs between two states of the disk, for each of
/// these pairs. Without a second one it is what is seen.
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) from: usize,
    pub(crate) until: Option<usize>,
    pub(crate) changes: Vec<(Disk, Option<Disk>)>,
}

impl Claim {
    /// What changes from `now` on it need not name.
    pub(crate) fn end(&mut self, now: &Disk) {
        for (_, until) in &mut self.changes {
            until.get_or_insert_with(|| Arc::clone(now));
        }
    }
}

/// What may be seen at one moment.
#[derive(Clone)]
pub(crate) struct Allowed<'a> {
    truth: &'a Truth,
    pub(crate) moment: usize,
    pub(crate) disk: Seen<'a>,
    pub(crate) machine: Seen<'a>,
    /// Grows with each promise: what was right at a moment is right until the next one.
    pub(crate) epoch: usize,
}

impl Truth {
    /// Begins anew with a disk that is durable, and what was made for it so far.
    pub(crate) fn restart(&mut self, disk: Vec<u8>, machine: Vec<u8>) {
        let there = Life { made: Some(0), ..Life::since(0) };
        self.snapshots.retain(|kept| kept.life.going.is_none());
        self.snapshots.iter_mut().for_each(|kept| kept.life = there);
        self.bitmaps.retain(|marked| marked.life.going.is_none());
        for marked in &mut self.bitmaps {
            let last = marked.claims.pop();
            marked.claims = last.map(|claim| Claim { from: 0, ..claim }).into_iter().collect();
            marked.life = there;
        }
        self.disk.restart(disk);
        self.machine.restart(machine);
    }

    pub(crate) fn at(&self, moment: usize) -> Allowed<'_> {
        let (disk, machine) = (self.disk.at(moment), self.machine.at(moment));
        let lives = self.snapshots.iter().map(|kept| &kept.life);
        let lives = lives.chain(self.bitmaps.iter().map(|marked| &marked.life));
        let promises: usize = lives.map(|life| life.promises(moment)).sum();
        let over = |claim: &&Claim| claim.until.is_some_and(|until| until <= moment);
        let claims = self.bitmaps.iter().flat_map(|marked| &marked.claims).filter(over).count();
        let epoch = disk.promises + machine.promises + promises + claims;
        Allowed { truth: self, moment, disk, machine, epoch }
    }
}

impl Allowed<'_> {
    /// The same disk at another moment.
    pub(crate) fn as_if_at(&self, moment: usize) -> Self {
        Self { moment, ..self.clone() }
    }

    /// Says by which names there may be snapshots, with what they hold, and whether each must be there.
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = (&Kept, bool)> {
        let there = self.truth.snapshots.iter().filter(|kept| kept.life.may_be(self.moment));
        there.map(|kept| (kept, kept.life.must_be(self.moment)))
    }

    /// The same of bitmaps.
    pub(crate) fn bitmaps(&self) -> impl Iterator<Item = (&Marked, bool)> {
        let there = self.truth.bitmaps.iter().filter(|marked| marked.life.may_be(self.moment));
        there.map(|marked| (marked, marked.life.must_be(self.moment)))
    }

    /// Returns what a bitmap has to name, and does.
    pub(crate) fn judge_bitmap<'m>(
        &self,
        marked: &'m Marked,
        named: &[GuestRange],
        seen: &[u8],
    ) -> Result<&'m Claim, String> {
        let holds = |claim: &&Claim| {
            claim.from <= self.moment && claim.until.is_none_or(|until| self.moment < until)
        };
        let mut missed = None;
        for claim in marked.claims.iter().filter(holds) {
            match claim.missed(named, seen) {
                None => return Ok(claim),
                Some(at) => missed = missed.or(Some(at)),
            }
        }
        Err(format!("Bitmap {} misses the change of {missed:x?}", marked.name))
    }
}

impl Claim {
    /// Returns the first byte that changed and is not named.
    fn missed(&self, named: &[GuestRange], seen: &[u8]) -> Option<usize> {
        let is_named =
            |at: usize| named.iter().any(|it| (it.start.0..it.end().0).contains(&(at as u64)));
        self.changes.iter().find_map(|(before, after)| {
            let len = before.len().min(seen.len());
            let differs = |at: usize| match after {
                None => before[at] != seen[at],
                // What was lost of it needs no name.
                Some(after) => after.get(at) != Some(&before[at]) && before[at] != seen[at],
            };
            let sectors = (0..len).step_by(SECTOR);
            let changed = sectors.filter(|at| {
                let end = (*at + SECTOR).min(len);
                before[*at..end] != seen[*at..end]
            });
            let mut bytes = changed.flat_map(|at| at..(at + SECTOR).min(len));
            bytes.find(|at| differs(*at) && !is_named(*at))
        })
    }
}
