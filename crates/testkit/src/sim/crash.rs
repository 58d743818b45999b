//! What the medium may hold after a power cut, for every moment of a recorded run.
//!
//! * Always: what a completed flush covered is there.
//! * Any unflushed change, in flight ones included, may be lost, there whole, or torn at 512-byte
//!   sectors. Where several touch one sector, each of their contents (and the one before) may be
//!   the one that is found; applying a subset in order covers that.

use crate::sim::{Effect, Event, SimHost};
use crate::{Random, SparseBytes};

/// Lists up to this long are enumerated whole.
const SHORT_LIST: usize = 5;

/// A change that a power cut may undo.
#[derive(Clone, Debug)]
struct Unflushed {
    call: u64,
    file: usize,
    effect: Effect,
    /// Index of the event by which it took effect; nothing while in flight.
    applied: Option<usize>,
}

/// The medium while a record is played.
#[derive(Clone, Debug)]
struct Medium {
    stable: Vec<SparseBytes>,
    /// Those that took effect, in that order, and then those in flight.
    unflushed: Vec<Unflushed>,
    /// How many took effect.
    applied: usize,
}

impl Medium {
    const fn new(stable: Vec<SparseBytes>) -> Self {
        Self { stable, unflushed: Vec::new(), applied: 0 }
    }

    fn play(&mut self, index: usize, event: &Event) {
        match event {
            Event::Issued { call, file, effect } => self.unflushed.push(Unflushed {
                call: *call,
                file: *file,
                effect: effect.clone(),
                applied: None,
            }),
            Event::Applied { call } => self.apply(*call, index),
            Event::Failed { call, remains } => self.fail(*call, index, remains),
            Event::Flushed { file, since } => {
                for effect in self.take_covered(*file, *since) {
                    effect.apply(&mut self.stable[*file]);
                }
            }
            Event::FlushFailed { file, since, kept } => {
                drop(self.take_covered(*file, *since));
                kept.iter().for_each(|effect| effect.apply(&mut self.stable[*file]));
            }
            Event::Mark(_) => {}
        }
    }

    /// Moves the call behind all that took effect before it.
    fn apply(&mut self, call: u64, index: usize) {
        if let Some(at) = self.in_flight(call) {
            self.unflushed[at].applied = Some(index);
            self.unflushed[self.applied..=at].rotate_right(1);
            self.applied += 1;
        }
    }

    fn fail(&mut self, call: u64, index: usize, remains: &[Effect]) {
        let Some(at) = self.in_flight(call) else { return };
        let Unflushed { file, .. } = self.unflushed.remove(at);
        let (end, applied) = (self.applied, Some(index));
        let parts = remains.iter().map(|effect| (call, effect.clone()));
        let parts = parts.map(|(call, effect)| Unflushed { call, file, effect, applied });
        self.unflushed.splice(end..end, parts);
        self.applied += remains.len();
    }

    fn in_flight(&self, call: u64) -> Option<usize> {
        let mut waiting = self.unflushed[self.applied..].iter();
        waiting.position(|change| change.call == call).map(|at| self.applied + at)
    }

    fn take_covered(&mut self, file: usize, since: usize) -> Vec<Effect> {
        let covered = |change: &mut Unflushed| {
            change.file == file && change.applied.is_some_and(|applied| applied < since)
        };
        let taken = self.unflushed.extract_if(..self.applied, covered);
        let taken: Vec<_> = taken.map(|change| change.effect).collect();
        self.applied -= taken.len();
        taken
    }
}

/// Returns the effects in `file` that a flush issued at event `since` would make durable.
pub(super) fn unflushed(events: &[Event], file: usize, since: usize) -> Vec<Effect> {
    let files = events.iter().filter_map(|event| match event {
        Event::Issued { file, .. } | Event::Flushed { file, .. } => Some(*file + 1),
        _ => None,
    });
    let count = files.max().unwrap_or(0).max(file + 1);
    let mut medium = Medium::new(vec![SparseBytes::default(); count]);
    events.iter().enumerate().for_each(|(index, event)| medium.play(index, event));
    medium.take_covered(file, since)
}

/// Returns a random part of the sectors of `effect`, as effects of their own.
pub(super) fn tear(effect: &Effect, random: &mut Random) -> Vec<Effect> {
    let runs = torn_runs(effect.sectors(), random).into_iter();
    runs.map(|(from, to)| effect.part(from, to)).collect()
}

/// Returns random runs of so many sectors, first and end.
pub(super) fn torn_runs(sectors: u64, random: &mut Random) -> Vec<(u64, u64)> {
    if sectors == 1 {
        return if random.one_in(2) { vec![(0, 1)] } else { Vec::new() };
    }
    let mut runs = Vec::new();
    let mut at = 0;
    while at < sectors {
        let end = (at + 1 + random.below(sectors)).min(sectors);
        if random.one_in(2) {
            runs.push((at, end));
        }
        at = end;
    }
    runs
}

/// A moment at which the power may go.
#[derive(Clone, Debug)]
pub struct Crash {
    /// Index of the event that it follows.
    pub event: usize,
    /// The last note that the test made before.
    pub mark: Option<u64>,
    stable: Vec<SparseBytes>,
    unflushed: Vec<Unflushed>,
    /// The change that is new since the moment before; states without it were seen there.
    newest: Option<u64>,
}

/// Returns every moment of `host`'s record at which a crash can leave something new: at the start,
/// after each change that was issued, after each flush, at each note.
///
/// ```
/// use lacuna::{buffer::Buffer, storage::Storage, units::HostOffset};
/// use testkit::sim::{Pace, SimHost, crash};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// let file = host.add_file(b"old"[..].into());
/// let write = file.write_at(HostOffset(0), Buffer::from(&b"new"[..]));
/// assert!(pollster::block_on(write).0.is_ok());
/// let points = crash::points(&host);
/// let mut contents = points[1].states(1, 10).map(|state| state.files[0].to_vec());
/// assert!(contents.any(|content| content == b"new"));
/// ```
#[must_use]
pub fn points(host: &SimHost) -> Vec<Crash> {
    let (initial, events) = host.record();
    points_of(initial, &events)
}

/// Returns the moments of `host`'s record on a medium that ignores some of the flushes, chosen by the
/// index of their event, for a test to see that it notices.
#[must_use]
pub fn points_without_flushes(host: &SimHost, ignored: impl Fn(usize) -> bool) -> Vec<Crash> {
    let (initial, mut events) = host.record();
    for (index, event) in events.iter_mut().enumerate() {
        if matches!(event, Event::Flushed { .. }) && ignored(index) {
            *event = Event::Mark(0);
        }
    }
    points_of(initial, &events)
}

/// Returns some moments of `host`'s record, each right after an event; `moments` rise. Of long records
/// [`points`] would keep too much. Flushes may be ignored, all of them.
///
/// ```
/// use testkit::sim::{Pace, SimHost, crash};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// host.add_file(b"old"[..].into());
/// host.mark(7);
/// assert_eq!(crash::at(&host, &[0], false).next().unwrap().mark, Some(7));
/// ```
pub fn at(host: &SimHost, moments: &[usize], without_flushes: bool) -> impl Iterator<Item = Crash> {
    let (initial, events) = host.record();
    let mut medium = Medium::new(initial);
    let (mut next, mut mark) = (0, None);
    moments.iter().map(move |moment| {
        while next <= *moment {
            match &events[next] {
                Event::Mark(label) => mark = Some(*label),
                Event::Flushed { .. } if without_flushes => {}
                event => medium.play(next, event),
            }
            next += 1;
        }
        Crash::new(*moment, mark, medium.clone(), None)
    })
}

/// Returns how many moments [`points`] returns.
///
/// ```
/// use testkit::sim::{Pace, SimHost, crash};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// host.mark(7);
/// assert_eq!(crash::points_len(&host), crash::points(&host).len());
/// ```
#[must_use]
pub fn points_len(host: &SimHost) -> usize {
    host.with_record(|_, events| 1 + events.iter().filter(|event| is_point(event)).count())
}

/// Returns one of the moments that [`points`] returns, without the others.
///
/// ```
/// use testkit::sim::{Pace, SimHost, crash};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// host.mark(7);
/// assert_eq!(crash::point(&host, 1).mark, crash::points(&host)[1].mark);
/// ```
///
/// # Panics
/// If there are not so many.
#[must_use]
pub fn point(host: &SimHost, number: usize) -> Crash {
    host.with_record(|initial, events| {
        let mut medium = Medium::new(initial.to_vec());
        let Some(before) = number.checked_sub(1) else {
            return Crash::new(0, None, medium, None);
        };
        let mut points = (0..events.len()).filter(|index| is_point(&events[*index]));
        let at = points.nth(before).expect("there are so many moments");
        let mut mark = None;
        for (index, event) in events[..=at].iter().enumerate() {
            medium.play(index, event);
            mark = event.mark().or(mark);
        }
        Crash::new(at, mark, medium, events[at].issued())
    })
}

/// Says whether a crash after an event can leave something new.
const fn is_point(event: &Event) -> bool {
    !matches!(event, Event::Applied { .. } | Event::Failed { .. })
}

impl Event {
    const fn mark(&self) -> Option<u64> {
        match self {
            Self::Mark(label) => Some(*label),
            _ => None,
        }
    }

    const fn issued(&self) -> Option<u64> {
        match self {
            Self::Issued { call, .. } => Some(*call),
            _ => None,
        }
    }
}

fn points_of(initial: Vec<SparseBytes>, events: &[Event]) -> Vec<Crash> {
    let mut medium = Medium::new(initial);
    let mut mark = None;
    let start = Crash::new(0, None, medium.clone(), None);
    let mut crashes = vec![start];
    for (index, event) in events.iter().enumerate() {
        medium.play(index, event);
        mark = event.mark().or(mark);
        if is_point(event) {
            crashes.push(Crash::new(index, mark, medium.clone(), event.issued()));
        }
    }
    crashes
}

/// Returns the moment at which `host`'s record ends.
///
/// ```
/// use testkit::sim::{Pace, SimHost, crash};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// host.add_file(b"old"[..].into());
/// let state = crash::now(&host).states(1, 1).next().unwrap();
/// assert_eq!(state.files[0].to_vec(), b"old");
/// ```
#[must_use]
pub fn now(host: &SimHost) -> Crash {
    host.with_record(|initial, events| {
        let mut medium = Medium::new(initial.to_vec());
        events.iter().enumerate().for_each(|(index, event)| medium.play(index, event));
        Crash::new(events.len(), None, medium, None)
    })
}

/// What may be found after a crash.
#[derive(Clone, Debug)]
pub struct CrashState {
    /// The content of each file.
    pub files: Vec<SparseBytes>,
    /// Which unflushed changes got through, for the message of a failing test.
    pub survivors: Vec<String>,
}

/// Which unflushed changes got through: enough to make a [`CrashState`] of.
#[derive(Clone, Debug)]
pub struct Remnant {
    chosen: Vec<usize>,
    /// Says which of their sectors, if not all.
    torn: Option<Random>,
}

impl Crash {
    fn new(event: usize, mark: Option<u64>, medium: Medium, newest: Option<u64>) -> Self {
        let Medium { stable, unflushed, .. } = medium;
        Self { event, mark, stable, unflushed, newest }
    }

    /// Returns the states to look at: all subsets (whole, and once torn) of a short list, else
    /// about `limit`: none, all, each one alone, each one missing, and random ones.
    pub fn states(&self, seed: u64, limit: usize) -> impl Iterator<Item = CrashState> {
        self.remnants(seed, limit).into_iter().map(|remnant| CrashState {
            files: self.files_left(&remnant),
            survivors: self.survivors(&remnant),
        })
    }

    /// Returns what [`states`](Self::states) makes its states of, for those that look at a few.
    ///
    /// ```
    /// use testkit::sim::{Pace, SimHost, crash};
    /// let host = SimHost::new(Pace::AtOnce, 1);
    /// host.add_file(b"old"[..].into());
    /// let crash = crash::now(&host);
    /// let remnants = crash.remnants(1, 10);
    /// assert_eq!(crash.files_left(&remnants[0])[0].to_vec(), b"old");
    /// assert!(crash.survivors(&remnants[0]).is_empty());
    /// ```
    #[must_use]
    pub fn remnants(&self, seed: u64, limit: usize) -> Vec<Remnant> {
        let mut random = Random::new(seed ^ (self.event as u64) << 20);
        let mut choices = self.choices(&mut random, limit);
        choices.dedup();
        let mut remnants = Vec::new();
        for chosen in choices {
            let can_tear = chosen.iter().any(|index| self.unflushed[*index].effect.sectors() > 1);
            let torn = can_tear.then(|| random.split());
            remnants.push(Remnant { chosen, torn: None });
            if torn.is_some() {
                let chosen = remnants[remnants.len() - 1].chosen.clone();
                remnants.push(Remnant { chosen, torn });
            }
        }
        remnants
    }

    /// Returns the content of each file.
    #[must_use]
    pub fn files_left(&self, remnant: &Remnant) -> Vec<SparseBytes> {
        let mut files = self.stable.clone();
        self.each_part(remnant, |change, part| part.apply(&mut files[change.file]));
        files
    }

    /// Returns which unflushed changes got through, for the message of a failing test.
    #[must_use]
    pub fn survivors(&self, remnant: &Remnant) -> Vec<String> {
        let mut survivors = Vec::new();
        self.each_part(remnant, |Unflushed { call, file, .. }, part| {
            survivors.push(format!("call {call} file {file}: {}", describe(part)));
        });
        survivors
    }

    /// Returns how many changes a crash here may undo.
    #[must_use]
    pub const fn unflushed_len(&self) -> usize {
        self.unflushed.len()
    }

    /// Returns what was durable.
    #[must_use]
    pub fn flushed(&self) -> &[SparseBytes] {
        &self.stable
    }

    /// Returns what a crash here may undo.
    pub(super) fn changes(&self) -> impl Iterator<Item = &Effect> {
        self.unflushed.iter().map(|change| &change.effect)
    }

    /// Returns a change that a crash here may undo, and its file.
    pub(super) fn change(&self, index: usize) -> (usize, &Effect) {
        (self.unflushed[index].file, &self.unflushed[index].effect)
    }

    /// Returns the index of the change that is new since the moment before.
    pub(super) fn newest_change(&self) -> Option<usize> {
        self.unflushed.iter().position(|change| Some(change.call) == self.newest)
    }

    /// Lists the indices that survive, for each state to look at.
    pub(super) fn choices(&self, random: &mut Random, limit: usize) -> Vec<Vec<usize>> {
        let len = self.unflushed.len();
        let newest = self.newest_change();
        let is_new = |chosen: &Vec<usize>| newest.is_none_or(|newest| chosen.contains(&newest));
        if len <= SHORT_LIST {
            let subsets = (0..1_u32 << len).map(|mask| subset(len, |i| mask >> i & 1 == 1));
            return subsets.filter(is_new).collect();
        }
        let mut choices = vec![Vec::new(), (0..len).collect()];
        choices.extend((0..len).map(|one| vec![one]));
        choices.extend((0..len).map(|one| subset(len, |i| i != one)));
        if let Some(newest) = newest {
            choices.extend((0..len).map(|one| subset(len, |i| i == one || i == newest)));
        }
        choices.retain(is_new);
        while choices.len() > limit.max(4) {
            choices.swap_remove(random.index(choices.len()));
        }
        while choices.len() < limit {
            let chosen = subset(len, |i| Some(i) == newest || random.one_in(2));
            choices.push(chosen);
        }
        choices
    }

    fn each_part(&self, remnant: &Remnant, mut visit: impl FnMut(&Unflushed, &Effect)) {
        let mut torn = remnant.torn.clone();
        for change in remnant.chosen.iter().map(|index| &self.unflushed[*index]) {
            match &mut torn {
                Some(random) => {
                    tear(&change.effect, random).iter().for_each(|part| visit(change, part));
                }
                None => visit(change, &change.effect),
            }
        }
    }
}

fn subset(len: usize, mut contains: impl FnMut(usize) -> bool) -> Vec<usize> {
    (0..len).filter(|index| contains(*index)).collect()
}

/// Says what a change does, without its bytes.
#[must_use]
pub fn describe(effect: &Effect) -> String {
    let (start, end) = effect.span();
    match effect {
        Effect::Write { .. } => format!("write {start:#x}..{end:#x}"),
        Effect::Zero { mode, .. } => format!("zero {start:#x}..{end:#x} {mode:?}"),
        Effect::Punch { .. } => format!("punch {start:#x}..{end:#x}"),
        Effect::Allocate { .. } => format!("allocate {start:#x}..{end:#x}"),
        Effect::SetLen { len } => format!("set length {len:#x}"),
    }
}
