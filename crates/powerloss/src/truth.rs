//! What may be seen after a power loss at each moment of a run.
//!
//! * Always: moments are counts of the host's events, and everything said from a moment on holds for a loss
//!   right at it.
//! * What is being done may have happened or not; what a flush (or a change that is durable when it returns)
//!   covered has.

use std::sync::Arc;

use lacuna::units::GuestRange;

/// Bytes of a whole disk.
pub(crate) type Disk = Arc<Vec<u8>>;

/// Sectors are compared whole before bytes are looked at.
const SECTOR: usize = 512;

/// The record of what was asked and answered.
#[derive(Default)]
pub(crate) struct Truth {
    versions: Vec<Version>,
    /// From which moment on no version before which one can be seen.
    durable: Vec<(usize, usize)>,
    pub(crate) snapshots: Vec<Kept>,
    pub(crate) bitmaps: Vec<Marked>,
}

struct Version {
    from: usize,
    disk: Disk,
    /// Whether this or another version is seen as a whole, never a mixture.
    is_whole: bool,
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
pub(crate) struct Kept {
    pub(crate) name: String,
    pub(crate) disk: Disk,
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

/// What may be seen at one moment.
pub(crate) struct Allowed<'a> {
    truth: &'a Truth,
    moment: usize,
    versions: Vec<&'a Disk>,
    is_whole: bool,
    /// Grows with each promise: what was right at a moment is right until the next one.
    pub(crate) epoch: usize,
}

impl Truth {
    /// Begins anew with a disk that is durable, and what was made for it so far.
    pub(crate) fn restart(&mut self, disk: Vec<u8>) {
        let there = Life { made: Some(0), ..Life::since(0) };
        self.snapshots.retain(|kept| kept.life.going.is_none());
        self.snapshots.iter_mut().for_each(|kept| kept.life = there);
        self.bitmaps.retain(|marked| marked.life.going.is_none());
        for marked in &mut self.bitmaps {
            let last = marked.claims.pop();
            marked.claims = last.map(|claim| Claim { from: 0, ..claim }).into_iter().collect();
            marked.life = there;
        }
        self.versions.clear();
        self.see(0, disk, false);
        self.durable = vec![(0, 0)];
    }

    /// The disk may look so from a moment on.
    pub(crate) fn see(&mut self, from: usize, disk: Vec<u8>, is_whole: bool) {
        let disk = match self.versions.last() {
            Some(last) if *last.disk == disk => Arc::clone(&last.disk),
            _ => Arc::new(disk),
        };
        self.versions.push(Version { from, disk, is_whole });
    }

    /// From a moment on nothing older than the last version is seen.
    pub(crate) fn flushed(&mut self, moment: usize) {
        self.durable.push((moment, self.versions.len() - 1));
    }

    pub(crate) fn at(&self, moment: usize) -> Allowed<'_> {
        let durable = self.durable.iter().take_while(|(from, _)| *from <= moment);
        let (first, flushes) = durable.fold((0, 0), |(_, count), (_, at)| (*at, count + 1));
        let later = self.versions[first + 1..].iter().take_while(|it| it.from <= moment);
        let seen: Vec<&Version> = std::iter::once(&self.versions[first]).chain(later).collect();
        let is_whole = seen[1..].iter().all(|version| version.is_whole);
        let mut versions: Vec<&Disk> = seen.iter().rev().map(|version| &version.disk).collect();
        versions.dedup_by(|one, other| Arc::ptr_eq(one, other));
        let lives = self.snapshots.iter().map(|kept| &kept.life);
        let lives = lives.chain(self.bitmaps.iter().map(|marked| &marked.life));
        let promises: usize = lives.map(|life| life.promises(moment)).sum();
        let over = |claim: &&Claim| claim.until.is_some_and(|until| until <= moment);
        let claims = self.bitmaps.iter().flat_map(|marked| &marked.claims).filter(over).count();
        Allowed { truth: self, moment, versions, is_whole, epoch: flushes + promises + claims }
    }
}

impl Allowed<'_> {
    /// Compares what a disk reads as.
    pub(crate) fn judge_disk(&self, seen: &[u8]) -> Result<(), String> {
        if self.versions.iter().any(|version| ***version == seen) {
            return Ok(());
        }
        let sizes: Vec<usize> = self.versions.iter().map(|version| version.len()).collect();
        if !sizes.contains(&seen.len()) {
            return Err(format!("The disk has {:#x} bytes, not {sizes:x?}", seen.len()));
        }
        if self.is_whole {
            return Err("The disk is a mixture of what it was and what it was to be".into());
        }
        (0..seen.len()).step_by(SECTOR).try_for_each(|at| self.judge_sector(seen, at))
    }

    fn judge_sector(&self, seen: &[u8], at: usize) -> Result<(), String> {
        let end = (at + SECTOR).min(seen.len());
        let same = |version: &&&Disk| version.get(at..end) == Some(&seen[at..end]);
        if self.versions.iter().any(|version| same(&version)) {
            return Ok(());
        }
        let byte = |version: &Disk, at: usize| version.get(at).copied().unwrap_or(0);
        let wrong = (at..end)
            .find(|at| !self.versions.iter().any(|version| byte(version, *at) == seen[*at]));
        match wrong {
            None => Ok(()),
            Some(at) => {
                let right: Vec<u8> = self.versions.iter().map(|it| byte(it, at)).collect();
                Err(format!("Byte {at:#x} is {:#x}, allowed are {right:x?}", seen[at]))
            }
        }
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

    /// Whether a bitmap names what it has to.
    pub(crate) fn judge_bitmap(
        &self,
        marked: &Marked,
        named: &[GuestRange],
        seen: &[u8],
    ) -> Result<(), String> {
        let holds = |claim: &&Claim| {
            claim.from <= self.moment && claim.until.is_none_or(|until| self.moment < until)
        };
        let mut missed = None;
        for claim in marked.claims.iter().filter(holds) {
            match claim.missed(named, seen) {
                None => return Ok(()),
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
