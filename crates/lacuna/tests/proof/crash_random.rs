//! Power cuts among random requests that are in flight together.

use std::sync::Arc;

use lacuna::block::Layer;
use lacuna::qcow2::Image;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Executor, Menu, ModelDisk, Operation, Operations, Random, seeds};

use crate::case::Case;
use crate::crash::{Recorded, kinds};
use crate::drive::{perform, settle};
use crate::random_operations::round;

/// Rounds of requests in flight together.
const ROUNDS: usize = 12;

/// Random requests in flight together, recorded and crashed at a spread of their events.
struct Busy {
    recorded: Recorded,
    executor: Executor<'static>,
    model: ModelDisk,
}

impl Busy {
    fn new(case: &Case, seed: u64) -> Self {
        let host = SimHost::new(Pace::Executor, seed);
        let mut executor = Executor::new(seed);
        executor.attach(Arc::new(host.clone()));
        Self { recorded: Recorded::start(case, host), executor, model: case.model() }
    }

    /// Runs one round; its operations do not overlap, so that each byte is old or new.
    fn round(&mut self, image: &Image<SimStorage>, round: &[Operation]) -> Result<(), String> {
        for operation in round {
            self.recorded.foresee(&self.model, operation);
        }
        let tasks: Vec<_> = round
            .iter()
            .map(|operation| {
                let (image, operation) = (image.clone(), *operation);
                self.executor.spawn(async move { perform(&image, operation).await })
            })
            .collect();
        self.executor.settle().map_err(|stalled| stalled.to_string())?;
        for (operation, task) in round.iter().zip(tasks) {
            let result = task.take().expect("no task of this test is dropped");
            result.map_err(|error| format!("{operation:x?}: {error}"))?;
            let (image, mut model, operation) = (image.clone(), self.model.clone(), *operation);
            let run = async move { settle(&image, &mut model, &operation).await.map(|()| model) };
            self.model = self.executor.block_on(run)?;
            self.recorded.see(&self.model);
        }
        Ok(())
    }

    fn flush(&mut self, image: &Image<SimStorage>) -> Result<(), String> {
        let image = image.clone();
        let flushed = self.executor.block_on(async move { image.flush().await });
        flushed.map_err(|error| error.to_string())?;
        self.recorded.acknowledge();
        Ok(())
    }

    fn run(mut self, seed: u64) -> Result<usize, String> {
        let files = self.recorded.case.on(&self.recorded.host);
        let opened = self.executor.block_on(async move { files.open().await });
        let image = opened.map_err(|error| error.to_string())?;
        self.recorded.see(&self.model);
        let menu = Menu { resize_up_to: None, reopen: false, ..self.recorded.case.kind.menu() };
        let mut operations = Operations::new(seed, menu);
        let mut random = Random::new(seed);
        for _ in 0..ROUNDS {
            let size_bytes = self.model.size_bytes();
            let round = round(&mut operations, &mut random, size_bytes);
            self.round(&image, &round)?;
            if random.one_in(3) {
                self.flush(&image)?;
            }
        }
        let recorded = self.recorded;
        pollster::block_on(recorded.crash_at(seed, |random| random.one_in(8)))
    }
}

#[test]
fn power_cuts_among_random_requests_in_flight_leave_leaks_at_worst() {
    for seed in seeds(1) {
        for (number, kind) in (0..).zip(kinds(9).into_iter().chain(kinds(14))) {
            let story = format!("LACUNA_SEED={seed}, {kind:?}");
            let seed = seed * 1000 + number;
            let count = Busy::new(&kind.build(seed), seed).run(seed);
            let count = count.unwrap_or_else(|error| panic!("{story}: {error}"));
            assert!(count > 20, "{story}: only {count} states");
        }
    }
}
