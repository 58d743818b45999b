//! What a point keeps: which units are saved, and how one is.
//!
//! * Always: a unit counts as saved only when the layer that it went to has all of it.
//! * Always: who finds a unit being saved waits for that; if it was dropped half-way, they save it.
//! * Never: an error stops a guest. What cannot be saved breaks the point.

use std::sync::Arc;

use event_listener::{Event, EventListener};
use parking_lot::Mutex;

use super::super::{Extent, Layer, WriteFlags, is_zero, no_status, step_aside};
use super::units::UnitSet;
use super::{PointOptions, WhenFull};
use crate::buffer::Buffer;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// The smallest unit.
const LEAST_UNIT_BYTES: u64 = 4 << 10;
/// A disk has this many units at most: 32 MiB of bits, where every other one is saved.
const MOST_UNITS: u64 = 1 << 28;
/// What is saved in one go: others who change it wait that long.
const CLAIM_BYTES: u64 = 64 << 20;
/// What is read and written at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// One point, as those see it who change the disk.
pub(super) struct Kept<T> {
    pub(super) size_bytes: u64,
    unit_bytes: u64,
    when_full: WhenFull,
    state: Mutex<State<T>>,
    /// Something was saved, or will not be.
    changed: Event,
    /// There may be space again, or no need of it.
    space: Event,
}

struct State<T> {
    /// Where the saved units are; nothing at the end.
    target: Option<Arc<T>>,
    saved: UnitSet,
    /// What is being saved.
    claims: Vec<GuestRange>,
    saved_bytes: u64,
    space_bytes: u64,
    waiting: u64,
    /// Why there is no point any more.
    end: Option<Error>,
}

/// A part of the disk in one state.
pub(super) struct Part<T> {
    pub(super) range: GuestRange,
    /// Where it is saved, if it is.
    pub(super) saved: Option<Arc<T>>,
}

/// How a point stands.
///
/// Made by [`Point::status`](super::Point::status), with an example there.
#[derive(Clone, Debug)]
pub struct PointStatus {
    /// Bytes that were saved: what was known to be zeros, or was found to be, is not among them.
    pub saved_bytes: u64,
    /// How many changes wait for space.
    pub waiting: u64,
    /// How many may be.
    pub space_bytes: u64,
    /// Why it cannot be read any more, if so.
    pub broken: Option<Error>,
}

/// What is next to be saved of a range.
enum Next {
    Nothing,
    Save(GuestRange),
    /// Others save all that is left.
    Wait(EventListener),
}

/// What came of saving.
enum Saved {
    All,
    /// There is no space; others can be waited for.
    Full(EventListener),
}

impl<T: Layer> Kept<T> {
    pub(super) fn new(size_bytes: u64, target: T, options: PointOptions) -> Self {
        let units = size_bytes.div_ceil(MOST_UNITS).next_power_of_two();
        let state = State {
            target: Some(Arc::new(target)),
            saved: UnitSet::default(),
            claims: Vec::new(),
            saved_bytes: 0,
            space_bytes: options.space_bytes,
            waiting: 0,
            end: None,
        };
        Self {
            size_bytes,
            unit_bytes: units.max(LEAST_UNIT_BYTES),
            when_full: options.when_full,
            state: Mutex::new(state),
            changed: Event::new(),
            space: Event::new(),
        }
    }

    /// Saves what of a range is not saved. Returns what to wait for where there is no space and guests
    /// are to wait.
    pub(super) async fn save<L: Layer>(
        &self,
        below: &L,
        range: GuestRange,
    ) -> Option<EventListener> {
        let whole = GuestRange::new(GuestOffset(0), self.size_bytes);
        let range = range.intersection(&whole)?;
        loop {
            match self.next(range) {
                Next::Nothing => return None,
                Next::Wait(others) => others.await,
                Next::Save(claimed) => match self.save_claimed(below, claimed).await {
                    Ok(Saved::All) => {}
                    Ok(Saved::Full(space)) => return Some(space),
                    Err(error) => self.end(error),
                },
            }
        }
    }

    /// Finds what of a range nobody saves, and claims it.
    fn next(&self, range: GuestRange) -> Next {
        let mut state = self.state.lock();
        if state.end.is_some() {
            return Next::Nothing;
        }
        let (mut unit, end) = self.units(range);
        let mut is_claimed = false;
        while unit < end {
            let run = state.saved.run(unit, end);
            let claim = state.claims.iter().find(|it| it.contains(self.offset(unit)));
            match (run.is_in, claim) {
                (true, _) => unit = run.end,
                (false, Some(claim)) => {
                    unit = claim.end().0.div_ceil(self.unit_bytes);
                    is_claimed = true;
                }
                (false, None) => {
                    let start = self.offset(unit);
                    let others = state.claims.iter().map(|it| it.start).filter(|it| *it > start);
                    let end = others.fold(self.offset(run.end), GuestOffset::min);
                    let most = CLAIM_BYTES.max(self.unit_bytes);
                    let claimed = GuestRange::new(start, (end - start).min(most));
                    state.claims.push(claimed);
                    return Next::Save(claimed);
                }
            }
        }
        match is_claimed {
            true => Next::Wait(self.changed.listen()),
            false => Next::Nothing,
        }
    }

    async fn save_claimed<L: Layer>(&self, below: &L, claimed: GuestRange) -> Result<Saved> {
        let mut claim = Claim { kept: self, rest: claimed };
        let target = self.target()?;
        let around = self.around(claimed, below);
        let mut at = around.start;
        while at < around.end() {
            let rest = GuestRange::new(at, around.end() - at);
            for extent in below.extents(rest).await? {
                let Some(range) = extent.range.intersection(&rest).filter(|it| it.start == at)
                else {
                    return Err(no_status(rest));
                };
                at = range.end();
                if extent.status.reads_zero {
                    self.saved_zeros(range);
                } else if let Some(data) = range.intersection(&claimed)
                    && let Saved::Full(space) = self.copy(below, &target, data, &mut claim).await?
                {
                    return Ok(Saved::Full(space));
                }
                claim.saved_up_to(at.min(claimed.end()));
            }
            match at {
                _ if at == rest.start => return Err(no_status(rest)),
                _ if at < around.end() => step_aside().await,
                _ => {}
            }
        }
        Ok(Saved::All)
    }

    /// Returns a range with what a change of it may turn from zeros that are known into bytes that happen
    /// to be zeros: the rest of a cluster that is allocated for it.
    fn around<L: Layer>(&self, range: GuestRange, below: &L) -> GuestRange {
        let unit = below.zero_unit_bytes();
        let start = range.start.0 / unit * unit;
        // A disk that was cut since ends before; what it lost is saved.
        let end = self.size_bytes.min(below.size_bytes().max(range.end().0));
        let end = range.end().0.next_multiple_of(unit).min(end);
        GuestRange::new(GuestOffset(start), end - start)
    }

    /// Takes note of zeros, claimed or not: where one of these units was saved meanwhile, it is so already,
    /// and where it was not, nobody has changed it.
    fn saved_zeros(&self, range: GuestRange) {
        let first = range.start.0.div_ceil(self.unit_bytes);
        let (_, end) = match range.end().0 == self.size_bytes {
            true => self.units(range),
            false => (0, range.end().0 / self.unit_bytes),
        };
        let mut state = self.state.lock();
        if first < end && state.end.is_none() {
            state.saved.insert(first, end);
        }
    }

    /// Copies what is not known to be zeros.
    async fn copy<L: Layer>(
        &self,
        below: &L,
        target: &T,
        range: GuestRange,
        claim: &mut Claim<'_, T>,
    ) -> Result<Saved> {
        let mut at = range.start;
        while at < range.end() {
            let len = (range.end() - at).min(PIECE_BYTES);
            let (result, bytes) = below.read(at, Buffer::new(len as usize)).await;
            result.map_err(|error| error.context("Reading what a point is to keep"))?;
            if !is_zero(&bytes)
                && let Saved::Full(space) = self.put(target, at, bytes).await?
            {
                return Ok(Saved::Full(space));
            }
            at = at + len;
            claim.saved_up_to(at);
            if at < range.end() {
                step_aside().await;
            }
        }
        Ok(Saved::All)
    }

    async fn put(&self, target: &T, at: GuestOffset, bytes: Buffer) -> Result<Saved> {
        // Listened to before the look, so that space that comes in between is heard of.
        let space = self.space.listen();
        let result = match self.take_space(bytes.len() as u64) {
            Ok(taken) => {
                let (result, _) = target.write(at, bytes, WriteFlags::empty()).await;
                result.map(|()| taken.keep())
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => Ok(Saved::All),
            Err(error)
                if error.kind() == ErrorKind::NoSpace
                    && self.when_full == WhenFull::Wait
                    // Nobody would ever say that there is space again.
                    && self.state.lock().end.is_none() =>
            {
                Ok(Saved::Full(space))
            }
            Err(error) => Err(error.context("Saving what a point is to keep")),
        }
    }

    fn take_space(&self, len: u64) -> Result<Taken<'_, T>> {
        let mut state = self.state.lock();
        if state.saved_bytes + len > state.space_bytes {
            let text = format!("The point may take {} bytes, and no more", state.space_bytes);
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        state.saved_bytes += len;
        Ok(Taken { kept: self, len })
    }

    pub(super) const fn when_full(&self) -> WhenFull {
        self.when_full
    }

    /// Changes how much may be saved; who waits for space looks again.
    pub(super) fn set_space(&self, space_bytes: u64) {
        self.state.lock().space_bytes = space_bytes;
        self.space.notify(usize::MAX);
    }

    fn target(&self) -> Result<Arc<T>> {
        let state = self.state.lock();
        match (&state.end, &state.target) {
            (Some(error), _) => Err(error.clone()),
            (None, Some(target)) => Ok(Arc::clone(target)),
            (None, None) => Err(Error::invalid("The point has ended")),
        }
    }

    /// Ends the point; its space is given back, and nobody waits for it. What ended it first stays.
    pub(super) fn end(&self, error: Error) {
        let mut state = self.state.lock();
        state.end.get_or_insert(error);
        state.saved = UnitSet::default();
        let target = state.target.take();
        drop(state);
        drop(target);
        self.changed.notify(usize::MAX);
        self.space.notify(usize::MAX);
    }

    /// Counts one more who waits for space, as long as what is returned lives.
    pub(super) fn count_waiting(&self) -> Waiting<'_, T> {
        self.state.lock().waiting += 1;
        Waiting(self)
    }

    pub(super) fn status(&self) -> PointStatus {
        let state = self.state.lock();
        PointStatus {
            saved_bytes: state.saved_bytes,
            space_bytes: state.space_bytes,
            waiting: state.waiting,
            broken: state.end.clone(),
        }
    }

    /// Returns the leading part of a range within the disk that is all saved, or not at all.
    pub(super) fn part(&self, range: GuestRange) -> Result<Part<T>> {
        let state = self.state.lock();
        if let Some(error) = &state.end {
            // Of whatever kind it is: the reader did nothing wrong, and can do nothing about it.
            return Err(Error::new(ErrorKind::Io, format!("The point has ended: {error}")));
        }
        let (unit, end) = self.units(range);
        let run = state.saved.run(unit, end);
        let end = self.offset(run.end).min(range.end());
        let saved = state.target.as_ref().filter(|_| run.is_in).map(Arc::clone);
        Ok(Part { range: GuestRange::new(range.start, end - range.start), saved })
    }

    /// Returns the units that a range touches: the first, and the one behind them.
    const fn units(&self, range: GuestRange) -> (u64, u64) {
        let end = range.start.0 + range.len;
        (range.start.0 / self.unit_bytes, end.div_ceil(self.unit_bytes))
    }

    /// Returns where a unit begins.
    fn offset(&self, unit: u64) -> GuestOffset {
        GuestOffset((unit * self.unit_bytes).min(self.size_bytes))
    }
}

/// Space for what is being saved, given back unless it is kept.
struct Taken<'a, T> {
    kept: &'a Kept<T>,
    len: u64,
}

impl<T> Taken<'_, T> {
    fn keep(mut self) {
        self.len = 0;
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        self.kept.state.lock().saved_bytes -= self.len;
    }
}

/// One who waits for space.
pub(super) struct Waiting<'a, T>(&'a Kept<T>);

impl<T> Drop for Waiting<'_, T> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

/// What somebody saves; nobody else does meanwhile.
struct Claim<'a, T: Layer> {
    kept: &'a Kept<T>,
    rest: GuestRange,
}

impl<T: Layer> Claim<'_, T> {
    /// Takes note that all before `at` is saved; whole units of it count from here on.
    fn saved_up_to(&mut self, at: GuestOffset) {
        let (kept, mut state) = (self.kept, self.kept.state.lock());
        let first = self.rest.start.0 / kept.unit_bytes;
        let end = match at == self.rest.end() {
            true => at.0.div_ceil(kept.unit_bytes),
            false => at.0 / kept.unit_bytes,
        };
        if end <= first {
            return;
        }
        if state.end.is_none() {
            state.saved.insert(first, end);
        }
        let rest = GuestRange::new(kept.offset(end), self.rest.end() - kept.offset(end));
        self.replace(&mut state, rest);
        drop(state);
        kept.changed.notify(usize::MAX);
    }

    fn replace(&mut self, state: &mut State<T>, rest: GuestRange) {
        let own = state.claims.iter().position(|it| *it == self.rest);
        match (own, rest.is_empty()) {
            (Some(own), true) => drop(state.claims.swap_remove(own)),
            (Some(own), false) => state.claims[own] = rest,
            (None, _) => {}
        }
        self.rest = rest;
    }
}

impl<T: Layer> Drop for Claim<'_, T> {
    fn drop(&mut self) {
        if self.rest.is_empty() {
            return;
        }
        let kept = self.kept;
        self.replace(&mut kept.state.lock(), GuestRange::new(self.rest.end(), 0));
        kept.changed.notify(usize::MAX);
    }
}

/// Returns an extent as a point has it: what it saved is its own, all else lies below it, and nobody
/// may look into either.
pub(super) fn seen(extent: Extent, range: GuestRange, is_saved: bool) -> Extent {
    let depth = if is_saved { super::AllocationDepth::TOP } else { extent.status.depth.below() };
    Extent { range, status: super::ExtentStatus { depth, host: None, ..extent.status } }
}
