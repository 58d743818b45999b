//! What happens in a run, made from a seed before anything runs: so a part can be left out.
//!
//! * `image.rs`: the images that there are
//! * `requests.rs`: guests, and what they ask
//! * `chores.rs`: work on an image that no guest uses
//! * `backup.rs`: a folder of restore points instead of all that

mod backup;
mod chores;
mod image;
mod requests;

use std::fmt;
use std::time::Duration;

use lacuna::block::{PointOptions, WhenFull, ZeroDetection};
use testkit::Random;
use testkit::sim::{Failure, Fault, OperationKind};

pub(crate) use self::backup::{Backups, Round};
pub(crate) use self::chores::{Chore, ChoreKind};
pub(crate) use self::image::{BelowForm, BelowSpec, DataSpec, DiskSpec, ImageSpec};
use self::requests::Areas;
pub(crate) use self::requests::{Guest, NbdForm, Remote, Request, Way, What};

/// A whole run.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) image: ImageSpec,
    pub(crate) phases: Vec<Phase>,
    /// What happens instead of phases.
    pub(crate) backups: Option<Backups>,
}

/// What happens between two moments at which nothing is in flight.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    /// Seed of the order in which things happen.
    pub(crate) order: u64,
    /// Bitmaps that are made at its start.
    pub(crate) bitmaps: usize,
    pub(crate) front: Front,
    pub(crate) guests: Vec<Guest>,
    pub(crate) jobs: Vec<Job>,
    pub(crate) faults: Vec<Fault>,
    /// How far time goes on while there is still something to do.
    pub(crate) jumps: Vec<Duration>,
    pub(crate) end: End,
    /// What is done before the next one.
    pub(crate) chore: Option<Chore>,
}

/// What guests write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Image,
    DetectsZeroes(ZeroDetection),
    SharesOnline,
    KeepsPoints,
}

/// Work on the whole image beside the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    Compact,
    Dedup,
    DropSnapshot,
    DropUnusedPins,
    /// A point in time is made, read so often, and ended.
    Point {
        options: PointOptions,
        reads: usize,
    },
    /// The disk gets another size; guests keep away from what comes and goes.
    Resize {
        size_bytes: u64,
        /// The form of NBD in which it is asked for; nothing: by the library.
        by: Option<NbdForm>,
    },
    /// A client that says nothing, or not enough, and has to be shown out.
    Silent {
        /// How many bytes it says.
        words: usize,
    },
    Snapshot,
    Sweep,
}

/// How a phase ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All is flushed and looked at; the image stays open.
    Rest,
    /// The image is closed, checked, and opened again.
    Close,
    /// The power goes after so many steps of the executor.
    Crash(usize),
}

impl Job {
    /// Returns the size that it gives the disk, if it does.
    pub(crate) const fn size_bytes(&self) -> Option<u64> {
        match self {
            Self::Resize { size_bytes, .. } => Some(*size_bytes),
            _ => None,
        }
    }
}

impl Scenario {
    /// Makes the run of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5ce0_a210);
        let image = ImageSpec::new(&mut random);
        let backups = random.one_in(12).then(|| Backups::new(&mut random));
        let count = if backups.is_some() { 0 } else { 1 + random.below(4) };
        let mut size_bytes = image.size_bytes;
        let phases = (0..count)
            .map(|_| {
                let phase = Phase::new(&image, size_bytes, &mut random);
                size_bytes = phase.least_size(size_bytes);
                phase
            })
            .collect();
        Self { seed, image, phases, backups }
    }

    /// Leaves out the parts that are not wanted; they are numbered as [`parts`](Self::parts) counts.
    pub(crate) fn retain(&mut self, wanted: &dyn Fn(usize) -> bool) {
        let mut number = 0;
        let mut keep = || {
            number += 1;
            wanted(number - 1)
        };
        for phase in &mut self.phases {
            for burst in phase.guests.iter_mut().flat_map(|guest| &mut guest.bursts) {
                burst.retain(|_| keep());
            }
            phase.jobs.retain(|_| keep());
            phase.faults.retain(|_| keep());
            phase.jumps.retain(|_| keep());
            if let Some(chore) = &mut phase.chore {
                chore.faults.retain(|_| keep());
            }
            phase.chore.take_if(|_| !keep());
        }
        if let Some(backups) = &mut self.backups {
            backups.rounds.retain(|_| keep());
        }
    }

    /// Returns how many requests, jobs, faults and so on there are.
    pub(crate) fn parts(&self) -> usize {
        let rounds = self.backups.as_ref().map_or(0, |backups| backups.rounds.len());
        rounds + self.phases.iter().map(Phase::parts).sum::<usize>()
    }
}

impl fmt::Display for Scenario {
    /// What is left of it, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(backups) = &self.backups {
            writeln!(f, "backups in {}, of {} bytes", backups.form.name(), backups.size_bytes)?;
            return backups.rounds.iter().try_for_each(|round| writeln!(f, "  {round:?}"));
        }
        writeln!(f, "{:?}", self.image)?;
        for (number, phase) in self.phases.iter().enumerate() {
            let Phase { bitmaps, front, end, chore, .. } = phase;
            writeln!(f, "phase {number}: {front:?}, {bitmaps} new bitmaps, ends by {end:?}")?;
            for guest in &phase.guests {
                for (burst, request) in bursts(guest) {
                    writeln!(f, "  {:?}, burst {burst}: {request:x?}", guest.way)?;
                }
            }
            phase.jobs.iter().try_for_each(|job| writeln!(f, "  {job:?}"))?;
            phase.faults.iter().try_for_each(|fault| writeln!(f, "  {fault:?}"))?;
            phase.jumps.iter().try_for_each(|jump| writeln!(f, "  time jumps by {jump:?}"))?;
            chore.iter().try_for_each(|chore| writeln!(f, "then {chore:?}"))?;
        }
        Ok(())
    }
}

fn bursts(guest: &Guest) -> impl Iterator<Item = (usize, &Request)> {
    let numbered = guest.bursts.iter().enumerate();
    numbered.flat_map(|(burst, requests)| requests.iter().map(move |request| (burst, request)))
}

impl Phase {
    fn new(image: &ImageSpec, size_bytes: u64, random: &mut Random) -> Self {
        let end = match random.below(10) {
            0..4 => End::Crash(1 + steps(random)),
            4..8 => End::Close,
            _ => End::Rest,
        };
        let front = match random.below(8) {
            0 => {
                let levels = [ZeroDetection::On, ZeroDetection::Unmap, ZeroDetection::Thorough];
                Front::DetectsZeroes(*random.pick(&levels))
            }
            1 => Front::SharesOnline,
            2 => Front::KeepsPoints,
            _ => Front::Image,
        };
        let mut jobs = jobs(size_bytes, random);
        if front == Front::KeepsPoints {
            let count = 1 + random.below(2);
            jobs.extend((0..count).map(|_| point(image, random)));
        }
        let used_bytes = jobs.iter().filter_map(Job::size_bytes).fold(size_bytes, u64::min);
        let areas = Areas::new(image, used_bytes, 1 + random.below(3), random);
        let guests: Vec<_> =
            (0..areas.count).map(|own| Guest::new(image, &areas, own, random)).collect();
        let order = random.next();
        let guests = some_remote(guests, order);
        Self {
            order,
            bitmaps: usize::from(random.one_in(4)),
            front,
            guests,
            jobs,
            faults: some(2, 8, random, fault),
            jumps: some(3, 6, random, |random| {
                Duration::from_millis(*random.pick(&[1, 900, 4000, 11_000]))
            }),
            end,
            chore: random.one_in(3).then(|| Chore::new(image, size_bytes, random)),
        }
    }

    /// Returns the size that the disk has at least afterwards, from one that it has before.
    fn least_size(&self, before: u64) -> u64 {
        let is_sure = self.faults.is_empty() && !matches!(self.end, End::Crash(_));
        let resized = self.jobs.iter().find_map(Job::size_bytes);
        let size_bytes = match resized {
            Some(size_bytes) if is_sure => size_bytes,
            Some(size_bytes) => size_bytes.min(before),
            None => before,
        };
        self.chore.as_ref().map_or(size_bytes, |chore| chore.least_size(size_bytes))
    }

    fn parts(&self) -> usize {
        let bursts = self.guests.iter().flat_map(|guest| &guest.bursts);
        let chores = self.chore.iter().map(|chore| 1 + chore.faults.len());
        let own = self.jobs.len() + self.faults.len() + self.jumps.len();
        bursts.map(Vec::len).sum::<usize>() + own + chores.sum::<usize>()
    }
}

/// Lets one guest in five reach the disk by a client of ours. What they ask does not depend on that.
fn some_remote(mut guests: Vec<Guest>, seed: u64) -> Vec<Guest> {
    let random = &mut Random::new(!seed);
    for guest in &mut guests {
        if random.one_in(5) {
            guest.way = Way::Remote(Remote::new(random));
        }
    }
    guests
}

/// Makes at most so many, each with a chance of one in `n`.
fn some<T>(most: u64, n: u64, random: &mut Random, make: impl Fn(&mut Random) -> T) -> Vec<T> {
    let mut made = Vec::new();
    for _ in 0..most {
        if random.one_in(n) {
            made.push(make(random));
        }
    }
    made
}

fn steps(random: &mut Random) -> usize {
    let most = *random.pick(&[60, 400, 2000]);
    random.index(most)
}

/// Chooses another size for a disk.
fn size(before: u64, random: &mut Random) -> u64 {
    512 * (1 + random.below(before.div_ceil(512) * 3 / 2))
}

fn jobs(size_bytes: u64, random: &mut Random) -> Vec<Job> {
    let all = [
        Job::Compact,
        Job::Dedup,
        Job::DropSnapshot,
        Job::DropUnusedPins,
        Job::Snapshot,
        Job::Snapshot,
        Job::Sweep,
    ];
    let mut jobs: Vec<Job> = some(3, 3, random, |random| *random.pick(&all));
    jobs.dedup();
    if random.one_in(8) {
        jobs.push(Job::Silent { words: random.index(40) });
    }
    if random.one_in(8) {
        let forms = [NbdForm::Simple, NbdForm::Structured, NbdForm::Extended];
        let by = random.one_in(2).then(|| *random.pick(&forms));
        jobs.push(Job::Resize { size_bytes: size(size_bytes, random), by });
    }
    jobs
}

fn point(image: &ImageSpec, random: &mut Random) -> Job {
    let space_bytes = match random.below(3) {
        0 => image.cluster_bytes() * random.below(4),
        _ => u64::MAX,
    };
    let when_full = *random.pick(&[WhenFull::Break, WhenFull::Wait]);
    let reads = 1 + random.index(4);
    Job::Point { options: PointOptions { space_bytes, when_full }, reads }
}

fn fault(random: &mut Random) -> Fault {
    let kinds = [
        None,
        Some(OperationKind::Read),
        Some(OperationKind::Write),
        Some(OperationKind::Write),
        Some(OperationKind::Zero),
        Some(OperationKind::Punch),
        Some(OperationKind::SetLen),
        Some(OperationKind::Flush),
    ];
    Fault {
        kind: *random.pick(&kinds),
        after: random.index(60),
        times: *random.pick(&[1, 1, 3, usize::MAX]),
        errno: *random.pick(&[5, 28]),
        failure: if random.one_in(2) { Failure::Clean } else { Failure::Short },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guests_change_does_not_overlap_and_lies_within_the_disk() {
        for seed in 1..300 {
            let scenario = Scenario::new(seed);
            let mut size_bytes = scenario.image.size_bytes;
            for phase in &scenario.phases {
                let mut owners = vec![None; size_bytes as usize];
                for (number, guest) in phase.guests.iter().enumerate() {
                    for request in guest.bursts.iter().flatten() {
                        assert!(request.start + request.len <= size_bytes, "{seed}: {request:?}");
                        if request.what.changes() {
                            let range =
                                request.start as usize..(request.start + request.len) as usize;
                            for owner in &mut owners[range] {
                                assert!(owner.is_none_or(|owner| owner == number), "seed {seed}");
                                *owner = Some(number);
                            }
                        }
                    }
                }
                size_bytes = phase.least_size(size_bytes);
            }
        }
    }

    #[test]
    fn parts_can_be_left_out_one_by_one() {
        let scenario = Scenario::new(5);
        let all = scenario.parts();
        for part in 0..all {
            let mut without = scenario.clone();
            without.retain(&|number| number != part);
            // With a chore go the faults in it.
            assert!((all - 2..all).contains(&without.parts()), "part {part}");
        }
    }
}
