//! Power cuts at every change of every write path.
//!
//! One run is recorded; afterwards every legal state of the medium at every event of it is opened.

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::qcow2::Image;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{ModelDisk, Operation, Random, seeds};

use crate::case::{Backing, Case, Files, Kind, Store};
use crate::drive::{Candidates, assert_safe, is_dirty, perform, read, settle, whole_content};
use crate::kept_mapping::places;

/// States per crash point where not all can be looked at.
const STATES: usize = 24;
/// One in this many states is also shown to qemu-img.
const QEMU_SAMPLE: usize = 40;

/// A state of the disk that a crash may show: after an operation that began at `event`.
struct Snapshot {
    event: usize,
    /// Number of the flush that made it durable, where one did.
    content: testkit::SparseBytes,
}

/// One recorded run, with what may be seen after a crash in it.
pub(crate) struct Recorded {
    pub(crate) case: Case,
    pub(crate) host: SimHost,
    snapshots: Vec<Snapshot>,
    /// For each mark: index of the first snapshot that may still be seen after it.
    durable: Vec<usize>,
    /// Whether the script changes the size.
    regrow: bool,
    /// Where guest clusters lie, in every state there may be.
    places: Option<Vec<Option<u64>>>,
}

fn write(start: u64, len: u64, seed: u64) -> Operation {
    let range = GuestRange::new(GuestOffset(start), len);
    Operation::Write { range, seed, flags: WriteFlags::empty() }
}

fn zero(start: u64, len: u64, flags: ZeroFlags) -> Operation {
    Operation::WriteZeroes { range: GuestRange::new(GuestOffset(start), len), flags }
}

fn discard(start: u64, len: u64) -> Operation {
    let range = GuestRange::new(GuestOffset(start), len);
    Operation::Discard { range, mode: DiscardMode::Guest }
}

impl Recorded {
    /// Begins with nothing that may be seen.
    pub(crate) fn start(case: &Case, host: SimHost) -> Self {
        let (snapshots, durable) = (Vec::new(), Vec::new());
        Self { case: case.clone(), host, snapshots, durable, regrow: false, places: None }
    }

    /// Records from now on; what the disk holds is durable.
    pub(crate) fn from_now(case: &Case, host: SimHost, model: &ModelDisk) -> Self {
        host.start_record();
        let mut recorded = Self::start(case, host);
        recorded.see(model);
        recorded.acknowledge();
        recorded
    }

    /// Does `prepare` and closes the image, then records `script` on it.
    pub(crate) async fn of(
        case: &Case,
        prepare: &[Operation],
        script: &[Operation],
    ) -> Result<Self, String> {
        Self::of_model(case, case.model(), prepare, script).await
    }

    async fn of_model(
        case: &Case,
        mut model: ModelDisk,
        prepare: &[Operation],
        script: &[Operation],
    ) -> Result<Self, String> {
        let fail = |error: lacuna::Error| error.to_string();
        let host = SimHost::new(Pace::AtOnce, 1);
        let files = case.on(&host);
        let image = files.open().await.map_err(fail)?;
        for operation in prepare {
            perform(&image, *operation).await.map_err(|e| format!("{operation:x?}: {e}"))?;
            settle(&image, &mut model, operation).await?;
        }
        image.close().await.map_err(fail)?;
        host.start_record();

        let mut recorded = Self::start(case, host);
        recorded.regrow = script.iter().any(|it| matches!(it, Operation::Resize { .. }));
        recorded.see(&model);
        recorded.run(&files, model, script).await?;
        Ok(recorded)
    }

    /// Demands that no crash shows a guest cluster at another place than it has.
    pub(crate) fn with_places_kept(mut self) -> Self {
        self.places = Some(places(&self.case.image));
        self
    }

    pub(crate) fn see(&mut self, model: &ModelDisk) {
        let event = self.host.events_len();
        self.snapshots.push(Snapshot { event, content: model.content().clone() });
    }

    async fn run(
        &mut self,
        files: &Files<SimStorage>,
        mut model: ModelDisk,
        script: &[Operation],
    ) -> Result<(), String> {
        let fail = |error: lacuna::Error| error.to_string();
        let mut image = files.open().await.map_err(fail)?;
        for operation in script {
            // What the operation may leave counts from its beginning on.
            self.foresee(&model, operation);
            if *operation == Operation::Reopen {
                image.close().await.map_err(fail)?;
                self.acknowledge();
                image = files.open().await.map_err(fail)?;
                continue;
            }
            perform(&image, *operation).await.map_err(|e| format!("{operation:x?}: {e}"))?;
            if *operation == Operation::Flush {
                self.acknowledge();
            }
            settle(&image, &mut model, operation).await?;
            self.see(&model);
        }
        image.close().await.map_err(fail)?;
        self.acknowledge();
        Ok(())
    }

    /// Does what a guest asks for, in the image and in the model.
    pub(crate) async fn change(
        &mut self,
        image: &Image<SimStorage>,
        model: &mut ModelDisk,
        operation: Operation,
    ) -> lacuna::Result<()> {
        self.foresee(model, &operation);
        perform(image, operation).await?;
        model.apply(&operation);
        self.see(model);
        Ok(())
    }

    pub(crate) fn foresee(&mut self, model: &ModelDisk, operation: &Operation) {
        let states = Candidates::foresee(model, operation, &self.case);
        let event = self.host.events_len();
        let seen = states.0.into_iter().map(|content| Snapshot { event, content });
        self.snapshots.extend(seen);
    }

    /// A flush returned: nothing older than the last snapshot may be seen any more.
    pub(crate) fn acknowledge(&mut self) {
        self.host.mark(self.durable.len() as u64);
        self.durable.push(self.snapshots.len() - 1);
    }

    /// What a crash at `point` may show.
    fn allowed(&self, point: &crash::Crash) -> Candidates {
        let first = point.mark.map_or(0, |mark| self.durable[mark as usize]);
        let seen = self.snapshots.iter().enumerate();
        let seen =
            seen.filter(|(index, snapshot)| *index >= first && snapshot.event <= point.event);
        let mut states: Vec<_> = seen.map(|(_, snapshot)| snapshot.content.clone()).collect();
        if states.is_empty() {
            states.push(self.snapshots[first].content.clone());
        }
        states.dedup();
        Candidates(states)
    }

    /// Looks at every moment; returns how many states there were.
    pub(crate) async fn crash_everywhere(&self, seed: u64) -> Result<usize, String> {
        self.crash_at(seed, |_| true).await
    }

    /// Looks at the moments that are chosen.
    pub(crate) async fn crash_at(
        &self,
        seed: u64,
        mut is_chosen: impl FnMut(&mut Random) -> bool,
    ) -> Result<usize, String> {
        let (mut count, mut random) = (0, Random::new(seed));
        for point in crash::points(&self.host) {
            if !is_chosen(&mut random) {
                continue;
            }
            let allowed = self.allowed(&point);
            for state in point.states(seed, STATES) {
                count += 1;
                let survivors = state.survivors;
                let after = self.case.with_content(state.files);
                let ask_qemu = count % QEMU_SAMPLE == 1;
                let moved = self.places.as_ref().is_some_and(|it| *it != places(&after.image));
                let result = match moved {
                    true => Err("A guest cluster has another place".to_owned()),
                    false => examine(&after, &allowed, self.regrow, ask_qemu).await,
                };
                result.map_err(|error| {
                    let story = survivors.join("\n  ");
                    format!(
                        "{error}\ncrash after event {} (mark {:?}), {} unflushed, survivors:\n  {story}",
                        point.event,
                        point.mark,
                        point.unflushed_len()
                    )
                })?;
            }
        }
        Ok(count)
    }
}

/// Opens what a crash left: leaks at worst (unless the image says that it is dirty), and every
/// byte as in one of the states allowed.
async fn examine(
    after: &Case,
    allowed: &Candidates,
    regrow: bool,
    ask_qemu: bool,
) -> Result<(), String> {
    if !is_dirty(after) {
        assert_safe(after, ask_qemu).await?;
    }
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let files = after.on(&host);
    let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
    let seen = whole_content(&image).await.map_err(|error| format!("Reading: {error}"))?;
    allowed.judge(&seen)?;
    if regrow {
        assert_growth_is_zero(&image).await?;
    }
    image.close().await.map_err(|error| format!("Closing: {error}"))?;
    let mut content = vec![host.content(0)];
    content.extend(after.data.as_ref().map(|_| host.content(1)));
    assert_safe(&after.with_content(content), ask_qemu).await
}

/// What a later growth adds must not show what was there before the crash.
async fn assert_growth_is_zero(image: &Image<SimStorage>) -> Result<(), String> {
    let old = image.size_bytes();
    let added = GuestRange::new(GuestOffset(old), 40 * image.geometry().cluster_bytes());
    let size_bytes = added.end().0;
    perform(image, Operation::Resize { size_bytes }).await.map_err(|error| error.to_string())?;
    let seen = read(image, added).await.map_err(|error| error.to_string())?;
    match seen.iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(at) => Err(format!("Growing brought byte {:#x} back", old + at as u64)),
    }
}

/// Kinds of images that a write path is crashed on.
pub(crate) fn kinds(cluster_bits: u32) -> Vec<Kind> {
    let plain = Kind::plain(cluster_bits);
    let mut kinds = vec![
        plain,
        Kind { version: 2, ..plain },
        Kind { lazy: true, ..plain },
        Kind { backing: Backing::RawShorter, ..plain },
        Kind { version: 2, backing: Backing::Qcow2Longer, ..plain },
        Kind { version: 2, backing: Backing::Qcow2Longer, shared_zero: true, ..plain },
        Kind { refcount_order: 6, ..plain },
        Kind { refcount_order: 0, ..plain },
        Kind { store: Store::DataFile, ..plain },
        Kind { store: Store::RawDataFile, ..plain },
    ];
    if cluster_bits >= 14 {
        let extended = Kind { extended: true, ..plain };
        kinds.extend([extended, Kind { backing: Backing::RawLonger, ..extended }]);
    }
    kinds
}

fn crash(
    name: &str,
    prepare: impl Fn(&Kind) -> Vec<Operation>,
    script: impl Fn(&Kind) -> Vec<Operation>,
) {
    for bits in [9, 14] {
        for kind in kinds(bits) {
            for seed in seeds(1) {
                let case = kind.build(seed);
                let run = async {
                    let recorded = Recorded::of(&case, &prepare(&kind), &script(&kind)).await?;
                    recorded.crash_everywhere(seed).await
                };
                match pollster::block_on(run) {
                    Ok(count) => {
                        println!("{name}, {kind:?}: {count} crash states");
                        assert!(count > 0, "{name}: no crash was tried");
                    }
                    Err(error) => panic!("{name}, seed {seed}, {kind:?}: {error}"),
                }
            }
        }
    }
}

#[test]
fn allocating_writes_leave_leaks_at_worst() {
    crash(
        "allocating writes",
        |_| vec![],
        |kind| {
            let cluster = kind.cluster_bytes();
            vec![
                write(cluster + 100, 300, 1),
                write(3 * cluster, 2 * cluster, 2),
                Operation::Flush,
                write(cluster, cluster, 3),
                write(6 * cluster + 512, cluster, 4),
                Operation::Flush,
                write(3 * cluster + 7, 50, 5),
            ]
        },
    );
}

#[test]
fn zeroing_and_discarding_leave_leaks_at_worst() {
    crash(
        "zeroing and discarding",
        |kind| vec![write(0, 10 * kind.cluster_bytes(), 1)],
        |kind| {
            let cluster = kind.cluster_bytes();
            vec![
                zero(cluster, cluster, ZeroFlags::MAY_UNMAP),
                discard(3 * cluster, 2 * cluster),
                zero(6 * cluster + 100, cluster, ZeroFlags::empty()),
                write(12 * cluster, cluster, 2),
                Operation::Flush,
                // The clusters that became free are used again.
                write(14 * cluster, 3 * cluster, 3),
                zero(8 * cluster, cluster, ZeroFlags::empty()),
                write(8 * cluster + 50, 60, 4),
                Operation::Flush,
            ]
        },
    );
}

#[test]
fn freed_clusters_are_not_reused_before_their_mapping_is_gone_for_good() {
    crash(
        "reuse",
        |kind| vec![write(0, 8 * kind.cluster_bytes(), 1)],
        |kind| {
            let cluster = kind.cluster_bytes();
            let mut script = Vec::new();
            for round in 0..4 {
                script.push(discard(round * cluster, cluster));
                script.push(write((10 + round) * cluster, cluster, 10 + round));
            }
            script
        },
    );
}

#[test]
fn compressed_writes_leave_leaks_at_worst() {
    crash(
        "compressed writes",
        |kind| vec![write(0, 3 * kind.cluster_bytes(), 1)],
        |kind| {
            let cluster = kind.cluster_bytes();
            let compressed = |index: u64, seed| {
                let range = GuestRange::new(GuestOffset(index * cluster), cluster);
                match kind.allows_compression() {
                    true => Operation::WriteCompressed { range, seed },
                    false => write(range.start.0, range.len, seed),
                }
            };
            vec![
                compressed(5, 2),
                compressed(6, 3),
                Operation::Flush,
                compressed(1, 4),
                write(5 * cluster + 10, 20, 5),
                Operation::Flush,
                discard(6 * cluster, cluster),
                compressed(7, 6),
            ]
        },
    );
}

#[test]
fn resizing_leaves_leaks_at_worst() {
    crash(
        "resizing",
        |kind| vec![write(0, 4 * kind.cluster_bytes(), 1)],
        |kind| {
            let size_bytes = kind.size_bytes();
            // Reserved by the host the first time, mapped only the second time.
            let larger = size_bytes * 5 / 2 / 2048 * 2048 + 1024;
            let again = size_bytes / 2048 * 2048 + 512;
            vec![
                Operation::Resize { size_bytes: larger },
                write(larger - 1000, 1000, 2),
                Operation::Flush,
                Operation::Resize { size_bytes: size_bytes / 2 / 512 * 512 },
                Operation::Flush,
                Operation::Resize { size_bytes: again },
                write(again - 700, 600, 3),
            ]
        },
    );
}

#[test]
fn closing_and_reopening_leaves_leaks_at_worst() {
    crash(
        "reopening",
        |kind| vec![write(0, kind.cluster_bytes(), 1)],
        |kind| {
            let cluster = kind.cluster_bytes();
            vec![
                write(2 * cluster, cluster, 2),
                Operation::Reopen,
                discard(0, cluster),
                write(4 * cluster, 10, 3),
                Operation::Reopen,
                write(6 * cluster, cluster, 4),
            ]
        },
    );
}

#[test]
fn growing_refcount_structures_leaves_leaks_at_worst() {
    // 512-byte clusters: a block counts 64 clusters at 64 bits, a table cluster holds 64 blocks.
    for order in [6, 4] {
        let kind = Kind { refcount_order: order, ..Kind::plain(9) };
        let case = kind.build(1);
        let script: Vec<_> = (0..5)
            .flat_map(|round| [write(round * 20 * 512, 20 * 512, round), Operation::Flush])
            .collect();
        let run = async {
            Recorded::of(&case, &[write(190 * 512, 512, 9)], &script)
                .await?
                .crash_everywhere(1)
                .await
        };
        pollster::block_on(run).unwrap_or_else(|error| panic!("order {order}: {error}"));
    }
}

#[test]
fn copying_clusters_shared_with_a_snapshot_leaves_leaks_at_worst() {
    let plain = Kind::plain(14);
    let small = Kind::plain(9);
    for kind in [
        plain,
        small,
        Kind { version: 2, ..plain },
        Kind { version: 2, ..small },
        Kind { extended: true, ..plain },
        Kind { refcount_order: 6, ..small },
        Kind { lazy: true, ..small },
    ] {
        let (case, guest) = kind.build_with_snapshot(1);
        let cluster = kind.cluster_bytes();
        let script = [
            write(100, 50, 11),
            write(cluster, cluster, 12),
            Operation::Flush,
            zero(2 * cluster, cluster, ZeroFlags::MAY_UNMAP),
            discard(3 * cluster, cluster),
            Operation::Flush,
            write(2 * cluster + 9, 20, 13),
        ];
        let run = async {
            let recorded = Recorded::of_model(&case, case.model_of(&guest), &[], &script).await?;
            recorded.crash_everywhere(1).await
        };
        pollster::block_on(run).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
    }
}
