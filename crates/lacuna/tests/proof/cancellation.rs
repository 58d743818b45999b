//! Every operation dropped at each of its awaits, once right after and once just before waking.

use std::sync::Arc;

use lacuna::block::{DiscardMode, WriteFlags, ZeroFlags};
use lacuna::qcow2::Image;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{DropPoint, Executor, ModelDisk, Operation, SparseBytes};

use crate::case::{Backing, Case, Files, Kind, Store};
use crate::drive::{Candidates, assert_qemu_agrees, assert_safe, perform, settle, whole_content};

/// More polls than any operation here takes.
const MOST_POLLS: usize = 400;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

/// One of each operation, on a disk whose first ten clusters hold data.
fn operations(kind: &Kind) -> Vec<Operation> {
    let cluster = kind.cluster_bytes();
    let write = |start, len, seed| Operation::Write {
        range: range(start, len),
        seed,
        flags: WriteFlags::empty(),
    };
    let fua =
        |start, len| Operation::Write { range: range(start, len), seed: 9, flags: WriteFlags::FUA };
    let mut operations = vec![
        Operation::Read(range(cluster / 2, 3 * cluster)),
        write(cluster + 5, 100, 1),
        write(12 * cluster + 5, 100, 2),
        write(9 * cluster, 4 * cluster, 3),
        fua(13 * cluster, cluster + 1),
        Operation::WriteZeroes { range: range(cluster, 2 * cluster), flags: ZeroFlags::MAY_UNMAP },
        Operation::WriteZeroes { range: range(cluster + 9, cluster), flags: ZeroFlags::empty() },
        Operation::WriteZeroes { range: range(3 * cluster, cluster), flags: ZeroFlags::FUA },
        Operation::Discard { range: range(2 * cluster, 3 * cluster), mode: DiscardMode::Guest },
        Operation::Flush,
        // All kinds of preallocation, which the sizes choose.
        Operation::Resize { size_bytes: kind.size_bytes() * 2 },
        Operation::Resize { size_bytes: kind.size_bytes() * 2 + 512 },
        Operation::Resize { size_bytes: kind.size_bytes() * 2 + 1024 },
        Operation::Resize { size_bytes: kind.size_bytes() * 2 + 1536 },
        Operation::Resize { size_bytes: 5 * cluster },
    ];
    if kind.allows_compression() {
        operations.push(Operation::WriteCompressed { range: range(cluster, cluster), seed: 4 });
        operations
            .push(Operation::WriteCompressed { range: range(14 * cluster, cluster), seed: 5 });
    }
    operations
}

struct Scene {
    case: Case,
    host: SimHost,
    executor: Executor<'static>,
    image: Image<SimStorage>,
    model: ModelDisk,
    /// What was flushed before the last change.
    flushed: SparseBytes,
}

impl Scene {
    fn set(case: &Case, seed: u64) -> Self {
        let host = SimHost::without_record(Pace::Executor, seed);
        let mut executor = Executor::new(seed);
        executor.attach(Arc::new(host.clone()));
        let files = case.on(&host);
        let mut model = case.model();
        let image = executor.block_on(async move { files.open().await }).unwrap();
        let cluster = case.kind.cluster_bytes();
        let fill =
            Operation::Write { range: range(0, 10 * cluster), seed: 77, flags: WriteFlags::FUA };
        let writer = image.clone();
        executor.block_on(async move { perform(&writer, fill).await }).unwrap();
        model.apply(&fill);
        // Something unflushed is under way when the operation begins.
        let more = Operation::Write {
            range: range(16 * cluster + 3, 9),
            seed: 78,
            flags: WriteFlags::empty(),
        };
        let writer = image.clone();
        executor.block_on(async move { perform(&writer, more).await }).unwrap();
        let flushed = model.content().clone();
        model.apply(&more);
        Self { case: case.clone(), host, executor, image, model, flushed }
    }

    /// Says whether the operation was dropped (and not over before).
    fn drop_at(&mut self, drop_point: DropPoint, operation: Operation) -> bool {
        let image = self.image.clone();
        let task =
            self.executor.spawn_until(drop_point, async move { perform(&image, operation).await });
        self.executor.settle().unwrap_or_else(|stalled| panic!("{stalled}"));
        match task.take() {
            Some(result) => {
                result.unwrap();
                false
            }
            None => true,
        }
    }

    fn content(&mut self) -> Result<SparseBytes, String> {
        let image = self.image.clone();
        let seen = self.executor.block_on(async move { whole_content(&image).await });
        seen.map_err(|error| format!("Reading afterwards: {error}"))
    }

    /// Old or new, the same at a second look, and everything still works.
    fn judge(mut self, operation: Operation, story: &str) -> Result<Case, String> {
        let mut allowed = Candidates::default();
        allowed.add(&self.model);
        if let Operation::Discard { range, mode } = operation {
            allowed.add_discard(range, mode, &self.case);
        }
        if let Operation::Resize { size_bytes } = operation {
            allowed.add_shrink(size_bytes, &self.case);
        }
        let mut after = self.model.clone();
        after.apply(&operation);
        allowed.add(&after);
        let seen = self.content()?;
        allowed.judge(&seen)?;
        if self.content()? != seen {
            return Err("Two reads in a row differ".into());
        }
        if let Operation::Resize { .. } = operation {
            self.model.apply(&Operation::Resize { size_bytes: seen.len() });
        }
        self.model.adopt(range(0, seen.len()), &seen.to_vec());
        self.go_on(operation)?;
        let (image, model) = (self.image.clone(), self.model.clone());
        self.executor.block_on(async move { model.verify(&image).await })?;
        let image = self.image;
        let closed = self.executor.block_on(async move { image.close().await });
        closed.map_err(|error| format!("Closing: {error}"))?;
        let mut content = vec![self.host.content(0)];
        content.extend(self.case.data.as_ref().map(|_| self.host.content(1)));
        let left = self.case.with_content(content);
        assert_qemu_agrees(&left, &self.model, story);
        Ok(left)
    }

    /// The same operation again, and a write elsewhere.
    fn go_on(&mut self, operation: Operation) -> Result<(), String> {
        let elsewhere = Operation::Write {
            range: range(4 * self.case.kind.cluster_bytes() + 3, 70),
            seed: 99,
            flags: WriteFlags::empty(),
        };
        for operation in [operation, elsewhere, Operation::Flush] {
            let (image, mut model) = (self.image.clone(), self.model.clone());
            let run = async move {
                let result = perform(&image, operation).await;
                result.map_err(|error| format!("{operation:x?} afterwards: {error}"))?;
                settle(&image, &mut model, &operation).await.map(|()| model)
            };
            self.model = self.executor.block_on(run)?;
        }
        Ok(())
    }
}

fn drop_everywhere(kind: Kind, seed: u64) -> usize {
    drop_each(&kind.build(seed), &operations(&kind), seed, |_| Ok(()))
}

/// Drops each operation at each await; `check` judges what is left of the image at last.
pub(crate) fn drop_each(
    case: &Case,
    operations: &[Operation],
    seed: u64,
    check: impl Fn(&Case) -> Result<(), String>,
) -> usize {
    let (mut dropped, kind) = (0, case.kind);
    for operation in operations.iter().copied() {
        for polls in 1..MOST_POLLS {
            let mut more = false;
            for point in [DropPoint::AfterPoll(polls), DropPoint::InsteadOfPoll(polls + 1)] {
                let story = format!("seed {seed}, {kind:?}, {operation:x?} dropped {point:?}");
                let mut scene = Scene::set(case, seed);
                if scene.drop_at(point, operation) {
                    (more, dropped) = (true, dropped + 1);
                    let left = scene.judge(operation, &story).and_then(|left| check(&left));
                    left.unwrap_or_else(|error| panic!("{story}: {error}"));
                }
            }
            if !more {
                break;
            }
        }
    }
    dropped
}

#[test]
fn operations_dropped_at_any_await_leave_old_or_new_bytes_and_no_leak() {
    let plain = Kind::plain(9);
    for kind in [
        plain,
        Kind { version: 2, ..plain },
        Kind { version: 2, backing: Backing::RawShorter, ..plain },
        Kind { version: 2, backing: Backing::Qcow2Longer, shared_zero: true, ..plain },
        Kind { lazy: true, backing: Backing::Qcow2Longer, ..plain },
        Kind { store: Store::DataFile, ..plain },
        Kind { extended: true, ..Kind::plain(14) },
        Kind { extended: true, backing: Backing::RawLonger, ..Kind::plain(14) },
    ] {
        for seed in testkit::seeds(1) {
            let dropped = drop_everywhere(kind, seed);
            assert!(dropped > 50, "{kind:?}: only {dropped} awaits were reached");
        }
    }
}

/// Opens the image on the scene's host once more, as after the end of the first process.
fn open_again(executor: &mut Executor<'static>, case: &Case, host: &SimHost) -> Image<SimStorage> {
    let files = files_again(case, host);
    executor.block_on(async move { files.open().await }).unwrap()
}

fn files_again(case: &Case, host: &SimHost) -> Files<SimStorage> {
    Files {
        image: host.open_file(0),
        data: case.data.as_ref().map(|_| host.open_file(1)),
        backing: case.backing_layer(),
        options: case.options.clone(),
    }
}

/// What was flushed is there, what was not may be; the image is sound.
fn assert_sound_again(
    mut executor: Executor<'static>,
    case: &Case,
    host: &SimHost,
    allowed: &Candidates,
) -> Result<(), String> {
    let image = open_again(&mut executor, case, host);
    let reader = image.clone();
    let seen = executor.block_on(async move { whole_content(&reader).await });
    allowed.judge(&seen.map_err(|error| error.to_string())?)?;
    executor.block_on(image.close()).map_err(|error| error.to_string())?;
    let mut content = vec![host.content(0)];
    content.extend(case.data.as_ref().map(|_| host.content(1)));
    pollster::block_on(assert_safe(&case.with_content(content), true))
}

fn kinds_to_reopen() -> [Kind; 5] {
    let plain = Kind::plain(9);
    [
        plain,
        Kind { version: 2, backing: Backing::RawShorter, ..plain },
        Kind { lazy: true, ..plain },
        Kind { store: Store::DataFile, lazy: true, ..plain },
        Kind { extended: true, ..Kind::plain(14) },
    ]
}

#[test]
fn closing_dropped_at_any_await_is_like_a_crash_that_loses_nothing_flushed() {
    for kind in kinds_to_reopen() {
        let case = kind.build(1);
        for polls in 1.. {
            let Scene { host, mut executor, image, model, flushed, .. } = Scene::set(&case, 1);
            let task = executor.spawn_until(DropPoint::AfterPoll(polls), image.close());
            executor.settle().unwrap();
            if task.take().is_some() {
                assert!(polls > 3, "{kind:?}: closing was dropped {} times only", polls - 1);
                break;
            }
            let story = format!("{kind:?}, close dropped after poll {polls}");
            let allowed = Candidates(vec![flushed, model.content().clone()]);
            let sound = assert_sound_again(executor, &case, &host, &allowed);
            sound.unwrap_or_else(|error| panic!("{story}: {error}"));
        }
    }
}

#[test]
fn opening_dropped_at_any_await_can_be_tried_again() {
    for kind in kinds_to_reopen() {
        let case = kind.build(1);
        for polls in 1.. {
            // The first image is only dropped, so that lazy refcounts leave a dirty image.
            let Scene { host, mut executor, image, model, flushed, .. } = Scene::set(&case, 1);
            drop(image);
            executor.settle().unwrap();
            let files = files_again(&case, &host);
            let open = async move { files.open().await.map(drop) };
            let task = executor.spawn_until(DropPoint::AfterPoll(polls), open);
            executor.settle().unwrap();
            if task.take().is_some() {
                break;
            }
            let story = format!("{kind:?}, open dropped after poll {polls}");
            let allowed = Candidates(vec![flushed, model.content().clone()]);
            let sound = assert_sound_again(executor, &case, &host, &allowed);
            sound.unwrap_or_else(|error| panic!("{story}: {error}"));
        }
    }
}
