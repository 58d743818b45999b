//! What happens in a run, made from a seed before anything runs: so a part can be left out.

use std::fmt;

use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{BackingName, CreateOptions};
use testkit::Random;
use testkit::sim::{Failure, Fault, OperationKind};

use crate::history::Fill;

/// A whole run.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) image: ImageSpec,
    pub(crate) phases: Vec<Phase>,
}

/// The image at the start.
#[derive(Clone, Debug)]
pub(crate) struct ImageSpec {
    pub(crate) version: Version,
    pub(crate) cluster_bits: u32,
    pub(crate) is_extended: bool,
    pub(crate) refcount_bits: u32,
    pub(crate) is_zstd: bool,
    pub(crate) is_lazy: bool,
    pub(crate) has_zero_claims: bool,
    pub(crate) size_bytes: u64,
    /// The size of the raw disk below, if there is one.
    pub(crate) backing_bytes: Option<u64>,
    /// Seed of the ways in which it is opened.
    pub(crate) opening: u64,
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
    pub(crate) end: End,
}

/// What guests write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Image,
    DetectsZeroes,
    SharesOnline,
}

/// Somebody with a part of the disk that nobody else writes to.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) way: Way,
    /// Requests of one burst are in flight together.
    pub(crate) bursts: Vec<Vec<Request>>,
}

/// How a guest reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Library,
    /// Over NBD, in one of its forms; some cut the wire after so many requests.
    Nbd {
        form: NbdForm,
        cut_after: Option<usize>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NbdForm {
    Simple,
    Structured,
    Extended,
}

/// A request of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) what: What,
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// By the library, it may be dropped after so many polls.
    pub(crate) dropped_after: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write {
        fill: Fill,
        fua: bool,
    },
    /// Compressed where that is possible: one cluster.
    Compress {
        fill: Fill,
    },
    Zero {
        may_unmap: bool,
        fua: bool,
    },
    Discard,
    Flush,
    /// Which parts are zeros.
    Extents,
}

impl What {
    pub(crate) const fn changes(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Compress { .. } | Self::Zero { .. } | Self::Discard
        )
    }
}

/// Work on the whole image beside the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    Compact,
    Dedup,
    DropSnapshot,
    DropUnusedPins,
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
    /// As `Close`, and the disk has another size afterwards.
    Resize(u64),
    /// The power goes after so many steps of the executor.
    Crash(usize),
}

const PATTERNS: u64 = 6;

impl Scenario {
    /// Makes the run of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5ce0_a210);
        let image = ImageSpec::new(&mut random);
        let count = 1 + random.below(4);
        let mut size_bytes = image.size_bytes;
        let phases = (0..count)
            .map(|_| {
                let phase = Phase::new(&image, size_bytes, &mut random);
                if let End::Resize(size) = phase.end {
                    size_bytes = size;
                }
                phase
            })
            .collect();
        Self { seed, image, phases }
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
        }
    }

    /// Returns how many requests, jobs and faults there are.
    pub(crate) fn parts(&self) -> usize {
        self.phases.iter().map(Phase::parts).sum()
    }
}

impl fmt::Display for Scenario {
    /// What is left of it, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.image)?;
        for (number, phase) in self.phases.iter().enumerate() {
            let Phase { bitmaps, front, end, .. } = phase;
            writeln!(f, "phase {number}: {front:?}, {bitmaps} new bitmaps, ends by {end:?}")?;
            for guest in &phase.guests {
                for (burst, request) in bursts(guest) {
                    writeln!(f, "  {:?}, burst {burst}: {request:x?}", guest.way)?;
                }
            }
            phase.jobs.iter().try_for_each(|job| writeln!(f, "  {job:?}"))?;
            phase.faults.iter().try_for_each(|fault| writeln!(f, "  {fault:?}"))?;
        }
        Ok(())
    }
}

fn bursts(guest: &Guest) -> impl Iterator<Item = (usize, &Request)> {
    let numbered = guest.bursts.iter().enumerate();
    numbered.flat_map(|(burst, requests)| requests.iter().map(move |request| (burst, request)))
}

impl ImageSpec {
    fn new(random: &mut Random) -> Self {
        let cluster_bits = *random.pick(&[9, 9, 9, 10, 12, 12, 14, 14, 16]);
        let version = if random.one_in(4) { Version::V2 } else { Version::V3 };
        let is_3 = version == Version::V3;
        let clusters = match cluster_bits {
            9 | 10 => 20 + random.below(180),
            12 => 8 + random.below(40),
            14 => 4 + random.below(12),
            _ => 2 + random.below(4),
        };
        let size_bytes = (clusters << cluster_bits) + 512 * random.below(3);
        let backing_bytes =
            random.one_in(3).then(|| 512 * (1 + random.below(size_bytes.div_ceil(512))));
        Self {
            version,
            cluster_bits,
            is_extended: is_3 && cluster_bits >= 14 && random.one_in(2),
            refcount_bits: if is_3 { *random.pick(&[1, 2, 8, 16, 16, 16, 32, 64]) } else { 16 },
            is_zstd: is_3 && random.one_in(4),
            is_lazy: is_3 && random.one_in(6),
            has_zero_claims: is_3 && random.one_in(3),
            size_bytes,
            backing_bytes: backing_bytes.map(|bytes| bytes.min(size_bytes)),
            opening: random.next(),
        }
    }

    pub(crate) const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn create_options(&self) -> CreateOptions {
        CreateOptions {
            size_bytes: self.size_bytes,
            version: self.version,
            cluster_bytes: self.cluster_bytes(),
            entry_width: if self.is_extended { EntryWidth::Extended } else { EntryWidth::Standard },
            refcount_bits: self.refcount_bits,
            compression: match self.is_zstd {
                true => CompressionType::Zstd,
                false => CompressionType::Deflate,
            },
            lazy_refcounts: self.is_lazy,
            backing: self
                .backing_bytes
                .map(|_| BackingName { name: "below.raw".into(), format: Some("raw".into()) }),
            zero_claims: self.has_zero_claims,
            ..CreateOptions::default()
        }
    }
}

impl Phase {
    fn new(image: &ImageSpec, size_bytes: u64, random: &mut Random) -> Self {
        let end = match random.below(10) {
            0..4 => End::Crash(1 + steps(random)),
            4..7 => End::Close,
            7 if image.version == Version::V3 => {
                End::Resize(512 * (1 + random.below(size_bytes.div_ceil(512) * 3 / 2)))
            }
            _ => End::Rest,
        };
        let front = match random.below(8) {
            0 => Front::DetectsZeroes,
            1 => Front::SharesOnline,
            _ => Front::Image,
        };
        let areas = Areas::new(image, size_bytes, 1 + random.below(3), random);
        let guests = (0..areas.count).map(|own| Guest::new(image, &areas, own, random)).collect();
        Self {
            order: random.next(),
            bitmaps: usize::from(random.one_in(4)),
            front,
            guests,
            jobs: jobs(random),
            faults: some(2, 8, random, fault),
            end,
        }
    }

    fn parts(&self) -> usize {
        let bursts = self.guests.iter().flat_map(|guest| &guest.bursts);
        bursts.map(Vec::len).sum::<usize>() + self.jobs.len() + self.faults.len()
    }
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

fn jobs(random: &mut Random) -> Vec<Job> {
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
    jobs
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

/// The disk in chunks that belong to the guests in turn; their ends do not fall on those of clusters.
struct Areas {
    chunk_bytes: u64,
    count: u64,
    size_bytes: u64,
}

impl Areas {
    fn new(image: &ImageSpec, size_bytes: u64, count: u64, random: &mut Random) -> Self {
        let cluster = image.cluster_bytes();
        let chunk = *random.pick(&[cluster / 2, cluster, cluster * 3 / 2, cluster * 13 / 4]);
        let all = size_bytes.div_ceil(count);
        Self { chunk_bytes: chunk.clamp(1, all), count, size_bytes }
    }

    /// Chooses a range that belongs to a guest; nothing where it has none.
    fn range(&self, own: u64, image: &ImageSpec, random: &mut Random) -> Option<(u64, u64)> {
        let chunks = self.size_bytes.div_ceil(self.chunk_bytes);
        let mine = chunks.saturating_sub(own).div_ceil(self.count);
        let chunk = own + self.count * random.below(Some(mine).filter(|it| *it > 0)?);
        let first = chunk * self.chunk_bytes;
        let end = (first + self.chunk_bytes).min(self.size_bytes);
        let (start, len) = within(first, end, image, random);
        Some((start, len))
    }
}

/// Chooses a range within another: whole sectors or clusters, or any bytes.
fn within(first: u64, end: u64, image: &ImageSpec, random: &mut Random) -> (u64, u64) {
    if random.one_in(3) {
        return (first, end - first);
    }
    let unit = *random.pick(&[1, 512, 512, image.cluster_bytes()]);
    let start = (first + random.below(end - first)) / unit * unit;
    let start = start.max(first);
    let most = (end - start).min(2 * image.cluster_bytes());
    let len = (1 + random.below(most)).next_multiple_of(unit).min(end - start);
    (start, len)
}

impl Guest {
    fn new(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Self {
        let way = match random.below(3) {
            0 => Way::Library,
            _ => Way::Nbd {
                form: *random.pick(&[NbdForm::Simple, NbdForm::Structured, NbdForm::Extended]),
                cut_after: random.one_in(5).then(|| random.index(20)),
            },
        };
        let count = 1 + random.below(8);
        let bursts = (0..count).map(|_| burst(image, areas, own, random)).collect();
        Self { way, bursts }
    }
}

/// Requests that are in flight together: what they change does not overlap.
fn burst(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Vec<Request> {
    let mut burst: Vec<Request> = Vec::new();
    for _ in 0..1 + random.below(5) {
        let Some(request) = request(image, areas, own, random) else { continue };
        let overlaps = |other: &Request| {
            other.what.changes()
                && other.start < request.start + request.len
                && request.start < other.start + other.len
        };
        if !request.what.changes() || !burst.iter().any(overlaps) {
            burst.push(request);
        }
    }
    burst
}

fn request(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Option<Request> {
    let (mut start, mut len) = areas.range(own, image, random)?;
    let cluster_bytes = image.cluster_bytes();
    let fill = match random.one_in(10) {
        true => Fill::Zeros,
        false => Fill::Pattern { seed: random.below(PATTERNS), cluster_bytes },
    };
    let fua = random.one_in(12);
    let what = match random.below(100) {
        0..18 => What::Read,
        18..58 => What::Write { fill, fua },
        58..63 => What::Compress { fill },
        63..75 => What::Zero { may_unmap: random.one_in(2), fua },
        75..86 => What::Discard,
        86..93 => What::Flush,
        _ => What::Extents,
    };
    if matches!(what, What::Read | What::Extents) && random.one_in(2) {
        // What others write may be looked at.
        (start, len) = within(0, areas.size_bytes, image, random);
    }
    let dropped_after = random.one_in(15).then(|| 1 + random.index(8));
    Some(Request { what, start, len, dropped_after })
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
                if let End::Resize(size) = phase.end {
                    size_bytes = size;
                }
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
            assert_eq!(without.parts(), all - 1);
        }
    }
}
