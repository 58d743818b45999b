//! Work on an image that no guest uses, between two phases.

use lacuna::qcow2::AmendOptions;
use lacuna::qcow2::format::Version;
use testkit::Random;
use testkit::sim::Fault;

use super::{BelowSpec, ImageSpec, fault, size, some, steps};

/// A piece of such work, and what goes wrong meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct Chore {
    pub(crate) what: ChoreKind,
    /// Seed of the order in which things happen.
    pub(crate) order: u64,
    pub(crate) faults: Vec<Fault>,
    /// The steps of the executor after which the power goes, where it does.
    pub(crate) crash: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChoreKind {
    /// The image becomes another kind of image, where it can.
    Amend(AmendOptions),
    /// What it holds goes into what it stands on.
    Commit,
    /// In a chain of three: what it and the image below it hold goes into the base.
    CommitThrough,
    /// The file is made short.
    Compact,
    /// It is put onto another disk, or onto none, and reads the same.
    Rebase(Option<BelowSpec>),
    /// In a chain of three: it is put onto the base, and reads the same.
    RebaseOntoBase,
    Resize(u64),
}

impl Chore {
    pub(super) fn new(image: &ImageSpec, size_bytes: u64, random: &mut Random) -> Self {
        let what = match random.below(9) {
            0..2 => ChoreKind::Commit,
            2..4 => ChoreKind::Rebase(
                random.one_in(2).then(|| BelowSpec::new(size_bytes, image.cluster_bits, random)),
            ),
            4 => ChoreKind::Amend(amendment(random)),
            5 => ChoreKind::Compact,
            _ => ChoreKind::Resize(size(size_bytes, random)),
        };
        let crash = random.one_in(3).then(|| 1 + steps(random));
        let order = random.next();
        Self { what: what.deeper(order), order, faults: some(1, 6, random, fault), crash }
    }

    /// Returns the size that the disk has at least afterwards, from one that it has before.
    pub(super) fn least_size(&self, before: u64) -> u64 {
        match self.what {
            ChoreKind::Resize(size) if self.crash.is_none() && self.faults.is_empty() => size,
            ChoreKind::Resize(size) => size.min(before),
            _ => before,
        }
    }
}

impl ChoreKind {
    /// Makes every other one go down to the base, where it could. What else happens does not depend on
    /// that.
    fn deeper(self, seed: u64) -> Self {
        match self {
            Self::Commit if Random::new(seed).one_in(2) => Self::CommitThrough,
            Self::Rebase(None) if Random::new(seed).one_in(2) => Self::RebaseOntoBase,
            what => what,
        }
    }

    /// Returns what is done instead where no chain has three images.
    pub(crate) fn in_chain(self, images: usize) -> Self {
        match self {
            Self::CommitThrough if images < 3 => Self::Commit,
            Self::RebaseOntoBase if images < 3 => Self::Rebase(None),
            what => what,
        }
    }
}

fn amendment(random: &mut Random) -> AmendOptions {
    let nothing = AmendOptions::default();
    match random.below(5) {
        0 => AmendOptions { version: Some(Version::V2), ..nothing },
        1 => AmendOptions { version: Some(Version::V3), ..nothing },
        2 => AmendOptions { lazy_refcounts: Some(random.one_in(2)), ..nothing },
        3 => AmendOptions { zero_claims: Some(random.one_in(2)), ..nothing },
        _ => {
            let bits = *random.pick(&[1, 2, 4, 8, 16, 32, 64]);
            AmendOptions { refcount_bits: Some(bits), ..nothing }
        }
    }
}
