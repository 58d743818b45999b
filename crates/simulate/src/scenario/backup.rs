//! Backups of a disk into a folder whose power goes.

use lacuna_backup::Form;
use testkit::Random;
use testkit::sim::Fault;

use super::{fault, some};

/// A folder of points, and what is added to it.
#[derive(Clone, Debug)]
pub(crate) struct Backups {
    pub(crate) form: Form,
    pub(crate) size_bytes: u64,
    pub(crate) rounds: Vec<Round>,
}

/// A point that is made: to its end, or until the power goes.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    pub(crate) seed: u64,
    /// How many parts of the disk are changed before.
    pub(crate) changes: usize,
    /// The size that the disk gets before.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) is_full: bool,
    /// How much is copied before it is made durable.
    pub(crate) durable_every_bytes: u64,
    pub(crate) has_crash: bool,
    pub(crate) faults: Vec<Fault>,
}

impl Backups {
    pub(super) fn new(random: &mut Random) -> Self {
        let size_bytes = 512 * (1 + random.below(160));
        let form = *random.pick(&[Form::Segments, Form::Qcow2]);
        let rounds = (0..2 + random.below(4)).map(|_| Round::new(size_bytes, random)).collect();
        Self { form, size_bytes, rounds }
    }
}

impl Round {
    fn new(size_bytes: u64, random: &mut Random) -> Self {
        Self {
            seed: random.next(),
            // What was cut off may go on where nothing has changed.
            changes: if random.one_in(3) { 0 } else { 1 + random.index(6) },
            size_bytes: random.one_in(8).then(|| super::size(size_bytes, random)),
            is_full: random.one_in(3),
            durable_every_bytes: *random.pick(&[1, 3000, 20_000, 1 << 20]),
            has_crash: !random.one_in(3),
            faults: some(1, 5, random, fault),
        }
    }
}
