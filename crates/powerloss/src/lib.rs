//! What lacuna's images hold after a power loss.
//!
//! A short run of one way to write an image is recorded. At each change of storage and each flush of it the
//! power goes: every legal subset of what was not flushed is put on the medium, down to sectors where these
//! are few, and a sample where there is too much of it. Each state is opened, compared with what may be seen,
//! written to and checked; one in so many by stock tools as well. States that are the same are looked at once.
//!
//! * `paths/`: the ways to write
//! * `stage.rs`: an image that is written and recorded
//! * `truth.rs`, `versions.rs`: what may be seen
//! * `judge.rs`, `qemu.rs`: looking at a state
//! * `guest.rs`: the same of a disk that a guest writes, for which another boot looks at the states

mod fingerprint;
mod guest;
mod judge;
mod paths;
mod qemu;
mod stage;
mod truth;
mod versions;

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fingerprint::Fingerprints;
pub use guest::{Recording, record};
use judge::Left;
pub use paths::{PATHS, Path};
use stage::Stage;
use testkit::sim::crash::{self, Crash};
use testkit::sim::{Bounds, Choice};

/// What was looked at.
///
/// ```
/// let path = powerloss::Path::named("write").unwrap();
/// let tally = powerloss::explore(&path, 1, &powerloss::Looks::default()).unwrap();
/// assert!(tally.states >= tally.opened);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Recorded runs.
    pub runs: u64,
    /// Moments at which the power went.
    pub moments: u64,
    /// Those at which all subsets were looked at.
    pub exhausted: u64,
    /// Subsets of unflushed changes that were put on the medium.
    pub states: u64,
    /// Those that differ from one another, all of which were opened.
    pub opened: u64,
    /// Those of them that stock tools were shown.
    pub by_qemu: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.runs += other.runs;
        self.moments += other.moments;
        self.exhausted += other.exhausted;
        self.states += other.states;
        self.opened += other.opened;
        self.by_qemu += other.by_qemu;
    }
}

/// How closely is looked.
///
/// ```
/// let looks = powerloss::Looks { qemu_every: Some(1000), ..powerloss::Looks::default() };
/// assert!(looks.bounds.exhaustive > 4);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Looks {
    /// How many states of each moment.
    pub bounds: Bounds,
    /// One in so many states is shown to stock tools; none, if nothing is said.
    pub qemu_every: Option<u64>,
    /// Flushes that do nothing, to see whether that is noticed.
    pub ignored: Ignored,
}

/// Flushes that a medium ignores.
///
/// ```
/// assert_eq!(powerloss::Ignored::default(), powerloss::Ignored::None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ignored {
    /// None of them.
    #[default]
    None,
    /// All of them.
    All,
    /// The last one of each write with FUA.
    OfFua,
}

/// A state that must not be.
///
/// ```
/// fn command(failure: &powerloss::Failure) -> String {
///     format!("cargo xtask crash-explore --path {} --seed {}", failure.path, failure.seed)
/// }
/// # let _ = command;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The way of writing.
    pub path: &'static str,
    /// Makes the same run again.
    pub seed: u64,
    /// What was seen, and where.
    pub error: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, seed, error } = self;
        write!(
            f,
            "{path}, seed {seed}: {error}\ncargo xtask crash-explore --path {path} --seed {seed}"
        )
    }
}

/// Records the run of a seed and looks at what a power loss may leave of it.
///
/// # Errors
/// The first state that must not be.
///
/// ```
/// let path = powerloss::Path::named("snapshot-delete").unwrap();
/// assert!(powerloss::explore(&path, 3, &powerloss::Looks::default()).is_ok());
/// ```
pub fn explore(path: &Path, seed: u64, looks: &Looks) -> Result<Tally, Failure> {
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let (kind, stage) = path.record(seed)?;
        look(&stage, seed, looks).map_err(|error| format!("{kind:?}: {error}"))
    }));
    let done = caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("without a word")))
    });
    done.map_err(|error| Failure { path: path.name(), seed, error })
}

fn look(stage: &Stage, seed: u64, looks: &Looks) -> Result<Tally, String> {
    let mut tally = Tally { runs: 1, ..Tally::default() };
    let (mut known, mut fingerprints) = (HashSet::new(), Fingerprints::default());
    for point in points(stage, looks.ignored) {
        let allowed = stage.truth.at(point.event);
        fingerprints.stand_on(point.flushed());
        tally.moments += 1;
        tally.exhausted += u64::from(point.unflushed_len() <= looks.bounds.exhaustive);
        for choice in point.all_choices(seed, looks.bounds) {
            tally.states += 1;
            let files = point.files_with(&choice);
            if !known.insert((allowed.epoch, fingerprints.of(&files))) {
                continue;
            }
            let left = Left::of(stage, files);
            let number = seed.wrapping_mul(1009).wrapping_add(tally.opened);
            tally.opened += 1;
            judge::judge(stage, &allowed, &left, number)
                .map_err(|error| told(&error, &point, &choice))?;
            let is_sound = point.event >= stage.sound_from.max(stage.made);
            if is_sound && looks.qemu_every.is_some_and(|every| number.is_multiple_of(every.max(1)))
            {
                tally.by_qemu += 1;
                qemu::look(stage, &allowed, &left)
                    .map_err(|error| told(&error, &point, &choice))?;
            }
        }
    }
    Ok(tally)
}

fn points(stage: &Stage, ignored: Ignored) -> Vec<Crash> {
    let host = &stage.host;
    match ignored {
        Ignored::None => crash::points(host),
        Ignored::All => crash::points_without_flushes(host, |_| true),
        Ignored::OfFua => crash::points_without_flushes(host, |at| stage.fua_flushes.contains(&at)),
    }
}

fn told(error: &str, point: &Crash, choice: &Choice) -> String {
    let story = point.story_of(choice).join("\n    ");
    let (event, count) = (point.event, point.unflushed_len());
    format!("{error}\n  after event {event}, of {count} unflushed changes there is:\n    {story}")
}
