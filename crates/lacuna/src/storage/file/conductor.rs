//! Who makes the calls that may block, decided as late as possible.
//!
//! A ring costs a thread and a third of a millisecond, which is half of what a short command
//! takes; one that finds all it reads in the page cache needs none.

use std::io;
use std::sync::{Arc, OnceLock};

use super::options::Driver;
use crate::Error;
use crate::storage::sys::Ring;

/// Who makes the calls that may block.
#[derive(Debug)]
pub(super) enum Runner {
    Ring(Arc<Ring>),
    Threads,
}

/// Knows the driver, or how to find one.
#[derive(Debug)]
pub(super) struct Conductor {
    shared_ring: fn() -> io::Result<Arc<Ring>>,
    decided: OnceLock<(Driver, Runner)>,
}

impl Conductor {
    /// Decides when the first call is to be made: the ring, or threads where that is refused.
    pub(super) const fn undecided(shared_ring: fn() -> io::Result<Arc<Ring>>) -> Self {
        Self { shared_ring, decided: OnceLock::new() }
    }

    pub(super) fn decided(driver: Driver, runner: Runner) -> Self {
        Self { shared_ring: Ring::shared, decided: OnceLock::from((driver, runner)) }
    }

    pub(super) fn driver(&self) -> &Driver {
        &self.decision().0
    }

    pub(super) fn runner(&self) -> &Runner {
        &self.decision().1
    }

    fn decision(&self) -> &(Driver, Runner) {
        self.decided.get_or_init(|| match (self.shared_ring)() {
            Ok(ring) => (Driver::IoUring, Runner::Ring(ring)),
            Err(error) => (Driver::Threads { refusal: Some(refused(error)) }, Runner::Threads),
        })
    }
}

/// What to say where there is no ring.
pub(super) fn refused(error: io::Error) -> Error {
    Error::io(error, "The kernel refuses io_uring")
}
