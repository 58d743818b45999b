//! Random operations on every kind of image: engine against model.

use std::ffi::OsStr;
use std::sync::Arc;

use lacuna::block::DiscardMode;
use lacuna::qcow2::Image;
use lacuna::storage::Storage;
use testkit::foreign::{QEMU_IMG, qemu_img_read};
use testkit::sim::{Pace, SimHost};
use testkit::{
    DropPoint, Executor, Menu, ModelDisk, Operation, Operations, Random, SparseBytes, Task, seeds,
};

use crate::case::{Case, Files, Kind, Store};
use crate::drive::{Candidates, assert_qemu_agrees, perform, settle, whole_content};

/// Operations in one sequential run.
const STEPS: usize = 60;
/// Rounds in one concurrent run.
const ROUNDS: usize = 25;

pub(crate) async fn step<S: Storage + Clone>(
    image: Image<S>,
    files: &Files<S>,
    model: &mut ModelDisk,
    operation: Operation,
) -> Result<Image<S>, String> {
    if operation == Operation::Reopen {
        image.close().await.map_err(|error| format!("Closing: {error}"))?;
        let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
        model.verify(&image).await?;
        return Ok(image);
    }
    let seen = perform(&image, operation).await.map_err(|error| error.to_string())?;
    if let Operation::Read(range) = operation {
        model.compare(range, &seen)?;
    }
    settle(&image, model, &operation).await?;
    Ok(image)
}

async fn sequence<S: Storage + Clone>(
    mut model: ModelDisk,
    files: &Files<S>,
    mut operations: Operations,
) -> Result<ModelDisk, String> {
    let mut image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
    for index in 0..STEPS {
        let operation = operations.next(model.size_bytes());
        if std::env::var_os("LACUNA_TRACE").is_some() {
            eprintln!("{index}: {operation:x?}");
        }
        let result = step(image, files, &mut model, operation).await;
        image = result.map_err(|error| format!("step {index} {operation:x?}: {error}"))?;
        if index % 20 == 19 {
            model.verify(&image).await.map_err(|error| format!("after step {index}: {error}"))?;
        }
    }
    model.verify(&image).await?;
    image.close().await.map_err(|error| format!("Closing: {error}"))?;
    let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
    model.verify(&image).await.map_err(|error| format!("after the last reopening: {error}"))?;
    image.close().await.map_err(|error| format!("Closing: {error}"))?;
    Ok(model)
}

#[test]
fn sequential_operations_on_memory_agree_with_the_model_and_qemu() {
    for seed in seeds(1) {
        for (number, kind) in Kind::for_this_run() {
            let story = format!("LACUNA_SEED={seed} LACUNA_KIND={number}, {kind:?}");
            let seed = seed * 1000 + number;
            let case = kind.build(seed);
            let files = case.in_memory();
            let operations = Operations::new(seed, kind.menu());
            let run = sequence(case.model(), &files, operations);
            let model = pollster::block_on(run).unwrap_or_else(|error| panic!("{story}: {error}"));
            assert_qemu_agrees(&case.with_content(files.content()), &model, &story);
        }
    }
}

#[test]
fn internal_snapshots_keep_their_data_through_random_operations() {
    let plain = Kind::plain(9);
    let kinds = [
        plain,
        Kind { version: 2, ..plain },
        Kind { lazy: true, ..plain },
        Kind { refcount_order: 1, ..plain },
        Kind { refcount_order: 6, store: Store::Zstd, ..plain },
        Kind { extended: true, ..Kind::plain(14) },
        Kind { extended: true, refcount_order: 2, ..Kind::plain(16) },
        Kind { version: 2, ..Kind::plain(12) },
    ];
    for seed in seeds(3) {
        for (number, kind) in (0..).zip(kinds) {
            let story = format!("LACUNA_SEED={seed}, {kind:?}");
            let seed = seed * 1000 + number;
            let (case, before) = kind.build_with_snapshot(seed);
            let files = case.in_memory();
            // Version 2 does not store the size of a snapshot, so that of the disk must stay.
            let resize_up_to = kind.menu().resize_up_to.filter(|_| kind.version == 3);
            let operations = Operations::new(seed, Menu { resize_up_to, ..kind.menu() });
            let run = sequence(case.model_of(&before), &files, operations);
            let model = pollster::block_on(run).unwrap_or_else(|error| panic!("{story}: {error}"));
            let after = case.with_content(files.content());
            assert_qemu_agrees(&after, &model, &story);
            let allowed = Candidates(vec![before]);
            let judged = allowed.judge(&snapshot_content(&after));
            judged.unwrap_or_else(|error| panic!("{story}: the snapshot has changed: {error}"));
        }
    }
}

/// What QEMU reads once it has gone back to snapshot "one".
fn snapshot_content(case: &Case) -> SparseBytes {
    let folder = tempfile::tempdir().unwrap();
    let image = case.save(folder.path());
    let words = ["snapshot", "-a", "one"].map(OsStr::new);
    QEMU_IMG.succeed(words.into_iter().chain([image.as_os_str()]));
    qemu_img_read(&image)
}

/// Operations that may be in flight together: those that change bytes do not overlap.
pub(crate) fn round(
    operations: &mut Operations,
    random: &mut Random,
    size_bytes: u64,
) -> Vec<Operation> {
    let mut chosen: Vec<Operation> = Vec::new();
    for _ in 0..1 + random.below(7) {
        let next = operations.next(size_bytes);
        if matches!(next, Operation::Resize { .. } | Operation::Reopen) {
            if chosen.is_empty() {
                return vec![next];
            }
            continue;
        }
        let clashes = |other: &Operation| {
            let overlap = match (other.range(), next.range()) {
                (Some(other), Some(next)) => other.overlaps(&next),
                _ => false,
            };
            overlap && other.changes_bytes() && next.changes_bytes()
        };
        // A full discard of a cluster removes what a neighbour in it writes at the same time.
        let full = matches!(next, Operation::Discard { mode: DiscardMode::Full, .. });
        if !full && !chosen.iter().any(clashes) {
            chosen.push(next);
        }
    }
    chosen
}

struct Concurrent<'a> {
    files: &'a Files<testkit::sim::SimStorage>,
    case: &'a Case,
    executor: Executor<'a>,
    random: Random,
    model: ModelDisk,
    /// One round in this many drops one of its futures.
    drops: u64,
}

impl Concurrent<'_> {
    fn open(&mut self) -> Image<testkit::sim::SimStorage> {
        let files = self.files.clone();
        self.executor.block_on(async move { files.open().await }).unwrap()
    }

    fn round(
        &mut self,
        image: &Image<testkit::sim::SimStorage>,
        operations: &[Operation],
    ) -> Result<(), String> {
        let mut before = Candidates::default();
        before.add(&self.model);
        let resizes = matches!(operations, [Operation::Resize { .. }]);
        let doomed = (self.drops > 0 && !resizes && self.random.one_in(self.drops))
            .then(|| self.random.index(operations.len()));
        let tasks: Vec<_> = (0..operations.len())
            .map(|index| self.start(image, operations[index], doomed == Some(index)))
            .collect();
        self.executor.settle().map_err(|stalled| stalled.to_string())?;
        let mut reads = Vec::new();
        for (operation, task) in operations.iter().zip(&tasks) {
            match task.take() {
                Some(result) => {
                    let seen = result.map_err(|error| format!("{operation:x?}: {error}"))?;
                    reads.extend(operation.range().map(|range| (*operation, range, seen)));
                    self.settle(image, operation)?;
                }
                None => self.adopt(image, operation)?,
            }
        }
        for (operation, range, seen) in reads {
            if let Operation::Read(_) = operation {
                self.judge_read(&before.0[0], range, &seen)?;
            }
        }
        Ok(())
    }

    fn start(
        &mut self,
        image: &Image<testkit::sim::SimStorage>,
        operation: Operation,
        doomed: bool,
    ) -> Task<lacuna::Result<Vec<u8>>> {
        let polls = 1 + self.random.below(6) as usize;
        let drop_point = match (doomed, self.random.one_in(2)) {
            (false, _) => DropPoint::Never,
            (true, false) => DropPoint::AfterPoll(polls),
            (true, true) => DropPoint::InsteadOfPoll(polls),
        };
        let image = image.clone();
        self.executor.spawn_until(drop_point, async move { perform(&image, operation).await })
    }

    fn settle(
        &mut self,
        image: &Image<testkit::sim::SimStorage>,
        operation: &Operation,
    ) -> Result<(), String> {
        let mut model = self.model.clone();
        let (image, of) = (image.clone(), *operation);
        let task = async move { settle(&image, &mut model, &of).await.map(|()| model) };
        self.model = self.executor.block_on(task)?;
        Ok(())
    }

    /// Takes over what a dropped operation left: each byte old or new.
    fn adopt(
        &mut self,
        image: &Image<testkit::sim::SimStorage>,
        operation: &Operation,
    ) -> Result<(), String> {
        let Some(range) = operation.range().filter(|_| operation.changes_bytes()) else {
            return Ok(());
        };
        let mut allowed = Candidates::default();
        allowed.add(&self.model);
        if let Operation::Discard { mode, .. } = *operation {
            allowed.add_discard(range, mode, self.case);
        }
        let mut after = self.model.clone();
        after.apply(operation);
        allowed.add(&after);
        let copy = image.clone();
        let seen = self.executor.block_on(async move { whole_content(&copy).await });
        let seen = seen.map_err(|error| error.to_string())?;
        self.model.adopt(range, &seen.read_vec(range.start.0, range.len as usize));
        // Only the range itself may differ now, and only between old and new.
        let (model, allowed) = (self.model.content().clone(), allowed);
        allowed.judge(&model).map_err(|error| format!("dropped {operation:x?}: {error}"))
    }

    fn judge_read(
        &self,
        before: &SparseBytes,
        range: lacuna::units::GuestRange,
        seen: &[u8],
    ) -> Result<(), String> {
        let old = before.read_vec(range.start.0, seen.len());
        let new = self.model.bytes(range);
        match (0..seen.len()).find(|i| seen[*i] != old[*i] && seen[*i] != new[*i]) {
            None => Ok(()),
            Some(index) => Err(format!(
                "A read of {range:x?} saw {:#x} at {index:#x}, neither {:#x} nor {:#x}",
                seen[index], old[index], new[index]
            )),
        }
    }

    fn run(&mut self, seed: u64) -> Result<(), String> {
        let mut image = self.open();
        let mut operations = Operations::new(seed, self.case.kind.menu());
        for index in 0..ROUNDS {
            let chosen = round(&mut operations, &mut self.random, self.model.size_bytes());
            if chosen == [Operation::Reopen] {
                self.executor.block_on(image.close()).map_err(|error| error.to_string())?;
                image = self.open();
            } else if !chosen.is_empty() {
                let result = self.round(&image, &chosen);
                result.map_err(|error| format!("round {index} {chosen:x?}: {error}"))?;
            }
            if index % 8 == 7 {
                self.verify(&image).map_err(|error| format!("after round {index}: {error}"))?;
            }
        }
        self.verify(&image)?;
        self.executor.block_on(image.close()).map_err(|error| format!("Closing: {error}"))
    }

    fn verify(&mut self, image: &Image<testkit::sim::SimStorage>) -> Result<(), String> {
        let (model, image) = (self.model.clone(), image.clone());
        self.executor.block_on(async move { model.verify(&image).await })
    }
}

fn concurrent_run(kind: Kind, story: &str, seed: u64, drops: u64) {
    let case = kind.build(seed);
    let host = SimHost::without_record(Pace::Executor, seed);
    let files = case.on(&host);
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(host.clone()));
    let random = Random::new(seed ^ 0xc0_c0);
    let model = case.model();
    let mut run = Concurrent { files: &files, case: &case, executor, random, model, drops };
    run.run(seed).unwrap_or_else(|error| panic!("{story}: {error}"));
    let model = run.model.clone();
    let mut content = vec![host.content(0)];
    content.extend(case.data.as_ref().map(|_| host.content(1)));
    assert_qemu_agrees(&case.with_content(content), &model, story);
}

#[test]
fn requests_in_flight_together_agree_with_the_model_and_qemu() {
    for seed in seeds(1) {
        for (number, kind) in Kind::for_this_run() {
            let story = format!("LACUNA_SEED={seed} LACUNA_KIND={number}, {kind:?}");
            concurrent_run(kind, &story, seed * 1000 + number, 0);
        }
    }
}

#[test]
fn requests_dropped_among_others_leave_old_or_new_bytes_and_no_leak() {
    for seed in seeds(1) {
        for (number, kind) in Kind::for_this_run() {
            let story = format!("LACUNA_SEED={seed} LACUNA_KIND={number}, {kind:?}");
            concurrent_run(kind, &story, seed * 1000 + number, 2);
        }
    }
}
