//! Whole scenarios of lacuna, on storage, sockets, time and order that are simulated, each from a seed.
//!
//! A scenario is an image of some kind, on its own or on others, and a few phases. In each, guests write through the library and
//! through the NBD server, jobs compact, deduplicate, sweep and take snapshots, storage calls end in any
//! order and some fail; then all is flushed and compared, or the power goes. The seed decides everything,
//! so that a failure can be had again, and made smaller.
//!
//! * `scenario`: what happens, made before anything runs
//! * `world`, `scene.rs`: phases, rests and crashes; on what, `files.rs`
//! * `workplace.rs`: work between phases: commit, rebase, stream, resize, amend, compact
//! * `cast.rs`: who acts: `guest.rs`, `nbd.rs` and `remote.rs` over `wire.rs`, `jobs.rs`, `points.rs`; on what, `front.rs`; `clock.rs`
//! * `backup`: instead of all that, restore points in a folder
//! * `history.rs`: what may be seen
//! * `minimise.rs`: the smallest run that fails in the same way, by `kind.rs`

mod backup;
mod cast;
mod clock;
mod files;
mod front;
mod guest;
mod history;
mod jobs;
mod kind;
mod minimise;
mod nbd;
mod points;
mod qemu;
mod remote;
mod scenario;
mod scene;
mod wire;
mod workplace;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clock::Clock;
use scenario::Scenario;
use world::World;

/// What was done.
///
/// ```
/// let tally = simulate::simulate(1, &simulate::Looks::default()).unwrap();
/// assert_eq!(tally.runs, 1);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Scenarios.
    pub runs: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Calls that storage got while guests and jobs were at work.
    pub calls: u64,
    /// Pieces of work between phases that were not cut off,
    pub chores: u64,
    /// and those of them that were not for such an image.
    pub declined: u64,
    /// Crashes.
    pub crashes: u64,
    /// States of the medium after crashes that were opened and compared.
    pub states: u64,
    /// Those of them that the stock tool checked and read, too.
    pub by_qemu: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.runs += other.runs;
        self.requests += other.requests;
        self.calls += other.calls;
        self.chores += other.chores;
        self.declined += other.declined;
        self.crashes += other.crashes;
        self.states += other.states;
        self.by_qemu += other.by_qemu;
    }
}

/// How closely crashes are looked at.
///
/// ```
/// let looks = simulate::Looks { states: 20, ..simulate::Looks::default() };
/// let tally = simulate::simulate(3, &looks).unwrap();
/// assert!(tally.states >= tally.crashes);
/// ```
#[derive(Clone, Debug)]
pub struct Looks {
    /// States of the medium after each crash, at most. The run goes on with one of them.
    pub states: usize,
    /// One in so many states is shown to the stock tool, too; none, if nothing is said.
    pub qemu_every: Option<u64>,
    /// Storage that lies, to see whether that is noticed.
    pub lie: Option<Lie>,
    /// States that there were so far.
    pub counter: Arc<AtomicU64>,
}

impl Default for Looks {
    fn default() -> Self {
        Self { states: 1, qemu_every: None, lie: None, counter: Arc::default() }
    }
}

impl Looks {
    /// Says whether the next state is one for the stock tool.
    fn is_for_qemu(&self) -> bool {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.qemu_every.is_some_and(|every| number.is_multiple_of(every.max(1)))
    }
}

/// What somebody says was done, or is so, and is not.
///
/// ```
/// assert_ne!(simulate::Lie::Flushes, simulate::Lie::Write);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Every flush.
    Flushes,
    /// That the image in between has nothing, by a rebase onto the base.
    Shared,
    /// That a wire carries what was sent: one byte of a large piece is another.
    Wire,
    /// One write in each phase.
    Write,
}

/// A run that showed what must not be.
///
/// ```
/// fn command(failure: &simulate::Failure) -> String {
///     format!("cargo xtask simulate --seed {}", failure.seed)
/// }
/// # let _ = command;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Makes the same run again.
    pub seed: u64,
    /// What was seen, and where.
    pub error: String,
    /// What is needed for it, and what happens with that alone; nothing where nobody has looked yet.
    pub least: Option<Least>,
}

/// The smallest run found that fails.
///
/// ```
/// # fn show(failure: &simulate::Failure) {
/// if let Some(least) = &failure.least {
///     println!("{} parts are enough: {}", least.parts.len(), least.error);
/// }
/// # }
/// # let _ = show;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Least {
    /// The numbers of its requests, jobs and faults.
    pub parts: Vec<usize>,
    /// How it fails.
    pub error: String,
    /// What happens in it.
    pub story: String,
}

/// Runs the scenario of a seed.
///
/// # Errors
/// What went wrong.
///
/// ```
/// assert!(simulate::simulate(2, &simulate::Looks::default()).is_ok());
/// ```
pub fn simulate(seed: u64, looks: &Looks) -> Result<Tally, Failure> {
    run(&Scenario::new(seed), looks).map_err(|error| Failure { seed, error, least: None })
}

/// Runs a part of the scenario of a seed, by the numbers that [`Least`] gives.
///
/// # Errors
/// What went wrong.
///
/// ```
/// let looks = simulate::Looks::default();
/// assert!(simulate::simulate_parts(2, &[0, 1], &looks).is_ok());
/// ```
pub fn simulate_parts(seed: u64, parts: &[usize], looks: &Looks) -> Result<(), Failure> {
    let done = minimise::only(&Scenario::new(seed), parts, looks);
    done.map_err(|error| Failure { seed, error, least: None })
}

/// Finds the smallest run that fails as this one did: by the same checker.
///
/// ```
/// # fn smaller(failure: simulate::Failure) -> simulate::Failure {
/// simulate::shrink(failure, &simulate::Looks::default())
/// # }
/// # let _ = smaller;
/// ```
#[must_use]
pub fn shrink(failure: Failure, looks: &Looks) -> Failure {
    let mut scenario = Scenario::new(failure.seed);
    let (parts, error) = minimise::minimise(&scenario, failure.error.clone(), looks);
    scenario.retain(&|number| parts.binary_search(&number).is_ok());
    let least = Least { parts, error, story: scenario.to_string() };
    Failure { least: Some(least), ..failure }
}

fn run(scenario: &Scenario, looks: &Looks) -> Result<Tally, String> {
    let clock = Clock::new().map_err(|error| format!("no clock: {error}"))?;
    let _entered = clock.runtime().enter();
    let world = || match &scenario.backups {
        Some(backups) => backup::run(backups, looks),
        None => World::new(scenario, looks, clock.clone())?.run(),
    };
    let caught = catch_unwind(AssertUnwindSafe(world));
    caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("without a word")))
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.error)?;
        let Some(least) = &self.least else { return Ok(()) };
        let parts: Vec<String> = least.parts.iter().map(ToString::to_string).collect();
        writeln!(f, "{}", least.story)?;
        writeln!(f, "With these parts alone: {}", least.error)?;
        write!(f, "cargo xtask simulate --seed {} --parts {}", self.seed, parts.join(","))
    }
}
