//! Persistent bitmaps made by QEMU: never trusted where they miss a change.

use lacuna::ErrorKind;
use lacuna::block::{Layer, WriteFlags};
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::{QEMU_IMG, qemu_io};
use testkit::sim::{Fault, OperationKind, Pace, SimHost, crash};
use testkit::{Menu, ModelDisk, Operation, Operations, SparseBytes, seeds};

use crate::case::{Case, Kind};
use crate::drive::{assert_qemu_agrees, assert_safe, is_dirty, perform, settle, whole_content};

/// Operations in a run.
const STEPS: usize = 30;

/// How many clusters hold data before the bitmaps are made.
const BEFORE_CLUSTERS: u64 = 6;
/// What the first clusters hold before the bitmaps are made.
const BEFORE: u8 = 5;

/// An image of QEMU's with an enabled bitmap "on" and a disabled one, "off".
fn image_with_bitmaps(kind: Kind, seed: u64) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| QEMU_IMG.succeed_in(folder.path(), words);
    let (cluster, size) = (kind.cluster_bytes(), kind.size_bytes());
    let lazy = if kind.lazy { "on" } else { "off" };
    let options = format!("cluster_size={cluster},lazy_refcounts={lazy}");
    run(&["create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", &size.to_string()]);
    let write = format!("write -q -P {BEFORE} 0 {}", BEFORE_CLUSTERS * cluster);
    qemu_io(&folder.path().join("a.qcow2"), [write]);
    let granularity = cluster.to_string();
    run(&["bitmap", "--add", "-g", &granularity, "a.qcow2", "on"]);
    run(&["bitmap", "--add", "--disable", "-g", &granularity, "a.qcow2", "off"]);
    let image = SparseBytes::load(&folder.path().join("a.qcow2"));
    Case { image, ..kind.build(seed) }
}

/// What the guest sees when the bitmaps are made.
fn before(kind: Kind) -> SparseBytes {
    let mut guest = SparseBytes::default();
    guest.write(0, &vec![BEFORE; (BEFORE_CLUSTERS * kind.cluster_bytes()) as usize]);
    guest.set_len(kind.size_bytes());
    guest
}

fn number<const N: usize>(image: &SparseBytes, offset: u64) -> u64 {
    image.read_vec(offset, N).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A bitmap as it is stored (qcow2: B.10), read without the engine.
struct Stored {
    in_use: bool,
    granularity_bits: u64,
    bits: Vec<u8>,
}

impl Stored {
    fn is_set(&self, offset: u64) -> bool {
        let bit = offset >> self.granularity_bits;
        self.bits.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
    }
}

/// Returns the bitmap of that name, where the image says that its bitmaps are to be believed.
fn stored(image: &SparseBytes, cluster_bytes: u64, name: &str) -> Option<Stored> {
    let is_valid = number::<8>(image, 88) & 1 == 1;
    let mut extension = number::<4>(image, 100);
    while number::<4>(image, extension) != 0x2385_2875 {
        assert_ne!(number::<4>(image, extension), 0, "the image has lost its bitmaps");
        extension += 8 + number::<4>(image, extension + 4).next_multiple_of(8);
    }
    let mut entry = number::<8>(image, extension + 24);
    for _ in 0..number::<4>(image, extension + 8) {
        let (name_len, extra) = (number::<2>(image, entry + 18), number::<4>(image, entry + 20));
        let found = image.read_vec(entry + 24 + extra, name_len as usize);
        if found == name.as_bytes() {
            return is_valid.then(|| decode(image, entry, cluster_bytes));
        }
        entry += (24 + extra + name_len).next_multiple_of(8);
    }
    panic!("the image has lost bitmap {name}");
}

fn decode(image: &SparseBytes, entry: u64, cluster_bytes: u64) -> Stored {
    let (table, clusters) = (number::<8>(image, entry), number::<4>(image, entry + 8));
    let mut bits = Vec::new();
    for index in 0..clusters {
        match number::<8>(image, table + index * 8) {
            all @ (0 | 1) => bits.resize(bits.len() + cluster_bytes as usize, 0 - all as u8),
            data => bits.extend(image.read_vec(data, cluster_bytes as usize)),
        }
    }
    let in_use = number::<4>(image, entry + 12) & 1 == 1;
    Stored { in_use, granularity_bits: number::<1>(image, entry + 17), bits }
}

/// Every byte that is not as before must be marked, unless nobody is to believe the bitmap.
fn assert_covers(case: &Case, guest: &SparseBytes, story: &str) {
    let Some(bitmap) = stored(&case.image, case.kind.cluster_bytes(), "on") else { return };
    if bitmap.in_use {
        return;
    }
    let (step, before) = (1 << bitmap.granularity_bits, before(case.kind));
    for offset in (0..guest.len()).step_by(step) {
        let changed = guest.read_vec(offset, step) != before.read_vec(offset, step);
        assert!(!changed || bitmap.is_set(offset), "{story}: the change at {offset:#x} is missed");
    }
}

fn kinds() -> [Kind; 3] {
    [Kind::plain(9), Kind::plain(12), Kind::plain(16)]
}

fn menu(kind: Kind) -> Menu {
    kind.menu()
}

/// Runs random operations on `host`; returns the model and the clusters that were named.
async fn run(case: &Case, host: &SimHost, seed: u64) -> (ModelDisk, Vec<Operation>) {
    let files = case.on(host);
    let (mut model, mut done) = (case.model_of(&before(case.kind)), Vec::new());
    let mut image = files.open().await.unwrap();
    let mut operations = Operations::new(seed, menu(case.kind));
    for _ in 0..STEPS {
        let operation = operations.next(model.size_bytes());
        if operation == Operation::Reopen {
            image.close().await.unwrap();
            image = files.open().await.unwrap();
        }
        perform(&image, operation).await.unwrap();
        settle(&image, &mut model, &operation).await.unwrap();
        done.push(operation);
    }
    image.close().await.unwrap();
    (model, done)
}

/// What was added to the disk, which counts as changed: it may have been cut off before.
fn grown(kind: Kind, done: &[Operation]) -> Vec<GuestRange> {
    let mut size = kind.size_bytes();
    let mut ranges = Vec::new();
    for operation in done {
        let Operation::Resize { size_bytes } = *operation else { continue };
        ranges.push(GuestRange::new(GuestOffset(size), size_bytes.saturating_sub(size)));
        size = size_bytes;
    }
    ranges
}

#[test]
fn enabled_bitmaps_mark_what_changed_and_no_more() {
    for seed in seeds(4) {
        for kind in kinds() {
            let story = format!("LACUNA_SEED={seed}, {kind:?}");
            let case = image_with_bitmaps(kind, seed);
            let host = SimHost::without_record(Pace::AtOnce, seed);
            let (model, done) = pollster::block_on(run(&case, &host, seed));
            let after = case.with_content(vec![host.content(0)]);
            assert_qemu_agrees(&after, &model, &story);
            assert_covers(&after, model.content(), &story);
            let on = stored(&after.image, kind.cluster_bytes(), "on").unwrap();
            assert!(!on.in_use, "{story}: still in use after closing");
            let grown = grown(kind, &done);
            let named = |offset: u64| {
                let changes = done.iter().filter(|it| it.changes_bytes());
                let ranges = changes.filter_map(Operation::range).chain(grown.iter().copied());
                let mut covers = ranges.map(|range| kind.cover(range));
                covers.any(|range| range.start.0 <= offset && offset < range.end().0)
            };
            for offset in (0..model.size_bytes()).step_by(kind.cluster_bytes() as usize) {
                assert!(named(offset) || !on.is_set(offset), "{story}: {offset:#x} did not change");
            }
            let off = stored(&after.image, kind.cluster_bytes(), "off").unwrap();
            assert!(!off.in_use && off.bits.iter().all(|byte| *byte == 0), "{story}: off is on");
        }
    }
}

#[test]
fn no_crash_leaves_a_bitmap_that_misses_a_change_and_is_believed() {
    for seed in seeds(3) {
        for kind in [Kind::plain(9), Kind { lazy: true, ..Kind::plain(9) }, Kind::plain(12)] {
            let case = image_with_bitmaps(kind, seed);
            let host = SimHost::new(Pace::AtOnce, seed);
            pollster::block_on(run(&case, &host, seed));
            for (number, point) in crash::points(&host).into_iter().enumerate() {
                for state in point.states(seed, 8) {
                    let story = format!("seed {seed}, {kind:?}, crash after {}", point.event);
                    let after = case.with_content(state.files);
                    pollster::block_on(examine(&after, &story, number % 64 == 0));
                }
            }
        }
    }
}

#[test]
fn clones_that_outlive_a_close_cannot_change_what_bitmaps_miss() {
    let case = image_with_bitmaps(Kind::plain(12), 1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let write = |start| Operation::Write {
        range: GuestRange::new(GuestOffset(start), 512),
        seed: 1,
        flags: WriteFlags::empty(),
    };
    let guest = pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let other = image.clone();
        perform(&other, write(0)).await.unwrap();
        image.close().await.unwrap();
        for start in [8192, 1 << 16] {
            let refused = perform(&other, write(start)).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidRequest);
        }
        whole_content(&other).await.unwrap()
    });
    let after = case.with_content(vec![host.content(0)]);
    assert!(!stored(&after.image, 4096, "on").unwrap().in_use);
    assert_covers(&after, &guest, "a clone after a close");
}

async fn examine(after: &Case, story: &str, ask_qemu: bool) {
    if !is_dirty(after) {
        let safe = assert_safe(after, ask_qemu).await;
        safe.unwrap_or_else(|error| panic!("{story}: {error}"));
    }
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let files = after.on(&host);
    // Who only reads believes it, with all that may have changed.
    let reading = Image::open(Parts::alone(host.open_file(0)), OpenOptions::new(Access::ReadOnly));
    let named = match is_dirty(after) {
        true => None,
        false => {
            Some(named(&reading.await.unwrap()).await.unwrap_or_else(|e| panic!("{story}: {e}")))
        }
    };
    let image = files.open().await.unwrap_or_else(|error| panic!("{story}: {error}"));
    let guest = whole_content(&image).await.unwrap_or_else(|error| panic!("{story}: {error}"));
    assert_covers(after, &guest, story);
    let recovered = self::named(&image).await.unwrap_or_else(|error| panic!("{story}: {error}"));
    for named in named.iter().chain([&recovered]) {
        assert_names(named, &guest, after.kind, story);
    }
    // And so does everybody else from then on.
    image.close().await.unwrap_or_else(|error| panic!("{story}: {error}"));
    let closed = after.with_content(vec![host.content(0)]);
    assert!(!stored(&closed.image, after.kind.cluster_bytes(), "on").unwrap().in_use, "{story}");
    assert_covers(&closed, &guest, story);
    if ask_qemu {
        let safe = assert_safe(&closed, true).await;
        safe.unwrap_or_else(|error| panic!("{story}: recovered: {error}"));
    }
}

/// What bitmap "on" names.
async fn named<S: Storage>(image: &Image<S>) -> lacuna::Result<Vec<GuestRange>> {
    let mut ranges = image.bitmap(&"on".into()).await?.ranges();
    let mut all = Vec::new();
    while let Some(range) = ranges.next().await? {
        all.push(range);
    }
    Ok(all)
}

/// Every byte that is not as before must be named.
fn assert_names(named: &[GuestRange], guest: &SparseBytes, kind: Kind, story: &str) {
    let before = before(kind);
    for offset in (0..guest.len()).step_by(512) {
        let changed = guest.read_vec(offset, 512) != before.read_vec(offset, 512);
        let is_named = || named.iter().any(|it| it.start.0 <= offset && offset < it.end().0);
        assert!(!changed || is_named(), "{story}: the change at {offset:#x} is missed");
    }
}

/// As after a crash: bytes were written to the first cluster and bitmaps are in use.
fn crashed(kind: Kind) -> Case {
    let case = image_with_bitmaps(kind, 1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let range = GuestRange::new(GuestOffset(0), 512);
        perform(&image, Operation::Write { range, seed: 3, flags: WriteFlags::FUA }).await.unwrap();
    });
    case.with_content(vec![host.content(0)])
}

#[test]
fn a_bitmap_that_a_stock_writer_saw_after_a_crash_is_not_believed() {
    let case = crashed(Kind::plain(16));
    let folder = tempfile::tempdir().unwrap();
    let path = case.save(folder.path());
    qemu_io(&path, ["write -q -P 8 512k 512".to_owned()]);
    let left = case.with_content(vec![SparseBytes::load(&path)]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        host.add_file(left.image.clone());
        let opening = Image::open(Parts::alone(host.open_file(0)), OpenOptions::new(access));
        let image = pollster::block_on(opening).unwrap();
        let error = pollster::block_on(named(&image)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("in use"), "{error}");
    }
}

/// One call that fails, wherever it is: then the bitmap names the change, or is not believed.
#[test]
fn a_host_that_fails_once_leaves_no_bitmap_that_misses_a_change_and_is_believed() {
    let case = image_with_bitmaps(Kind::plain(16), 1);
    let mut believed = 0;
    for kind in [OperationKind::Read, OperationKind::Write, OperationKind::Flush] {
        for after in 0..14 {
            let host = SimHost::without_record(Pace::AtOnce, 1);
            let files = case.on(&host);
            let story = format!("{kind:?} fails after {after}");
            let image = pollster::block_on(files.open()).unwrap();
            host.order(Fault { times: 2, ..Fault::no_space(kind, after) });
            // It fails at first, and goes on when asked again: as a guest does.
            for _ in 0..4 {
                let range = GuestRange::new(GuestOffset(0), 512);
                let write = Operation::Write { range, seed: 3, flags: WriteFlags::FUA };
                drop(pollster::block_on(perform(&image, write)));
            }
            drop(image);
            host.heal();
            let image = pollster::block_on(files.open()).unwrap();
            let guest = pollster::block_on(whole_content(&image)).unwrap();
            if let Ok(named) = pollster::block_on(named(&image)) {
                assert_names(&named, &guest, case.kind, &story);
                believed += 1;
            }
        }
    }
    assert!(believed > 20, "only {believed} bitmaps were believed");
}

#[test]
fn a_repair_between_a_crash_and_the_next_opening_loses_no_change() {
    for lazy in [false, true] {
        for repair in [Repair::Leaks, Repair::All] {
            let case = crashed(Kind { lazy, ..Kind::plain(16) });
            let host = SimHost::without_record(Pace::AtOnce, 1);
            let files = case.on(&host);
            let options = CheckOptions { repair };
            let changed = pollster::block_on(async {
                check(&host.open_file(0), &options, &mut |_| {}).await.unwrap();
                named(&files.open().await.unwrap()).await.unwrap()
            });
            assert!(
                changed.iter().any(|range| range.start.0 == 0),
                "{lazy} {repair:?}: {changed:?}"
            );
        }
    }
}

#[test]
fn qemu_never_believes_a_bitmap_that_was_left_in_use_before_it_is_recovered() {
    let case = crashed(Kind::plain(16));
    let merges = |case: &Case| {
        let folder = tempfile::tempdir().unwrap();
        let path = case.save(folder.path());
        QEMU_IMG.run(["bitmap", "--merge", "on", path.to_str().unwrap(), "off"]).code == 0
    };
    assert!(!merges(&case));
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async { case.on(&host).open().await.unwrap().close().await.unwrap() });
    let recovered = case.with_content(vec![host.content(0)]);
    assert!(merges(&recovered));
    assert!(stored(&recovered.image, 1 << 16, "on").unwrap().is_set(0));
}

#[test]
fn long_runs_with_flushes_leave_exact_bitmaps_and_few_intents() {
    let case = image_with_bitmaps(Kind::plain(12), 1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let range = GuestRange::new(GuestOffset(4096), 512);
        for seed in 0..20_000 {
            perform(&image, Operation::Write { range, seed, flags: WriteFlags::empty() })
                .await
                .unwrap();
            if seed % 1000 == 999 {
                image.flush().await.unwrap();
            }
        }
        assert_eq!(named(&image).await.unwrap(), [GuestRange::new(GuestOffset(4096), 4096)]);
        image.flush().await.unwrap();
    });
    // The bitmaps were stored meanwhile: a crash now finds the marks themselves.
    let left = case.with_content(vec![host.content(0)]);
    assert!(stored(&left.image, 4096, "on").unwrap().is_set(4096));
}
