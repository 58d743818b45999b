//! Persistent bitmaps made by QEMU: never trusted where they miss a change.

use lacuna::ErrorKind;
use lacuna::block::WriteFlags;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::{QEMU_IMG, qemu_io};
use testkit::sim::{Pace, SimHost, crash};
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
    let options = format!("cluster_size={cluster}");
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
        for kind in [Kind::plain(9), Kind::plain(12)] {
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
    let image = after.on(&host).open().await.unwrap_or_else(|error| panic!("{story}: {error}"));
    let guest = whole_content(&image).await.unwrap_or_else(|error| panic!("{story}: {error}"));
    assert_covers(after, &guest, story);
}
