//! Refcounts and what bitmaps have move as well while an image is used: through power cuts, among guests
//! and those who read bitmaps, dropped at awaits.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::{Header, RefcountTableEntry};
use lacuna::qcow2::{Access, Image, NewBitmap, OpenOptions};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{Operation, Random, SparseBytes, seeds};

use crate::case::{Case, Kind};
use crate::compacting::{View, assert_short, assert_sound, by_qemu, img, refcounts, view};
use crate::crash::Recorded;
use crate::drive::{assert_safe, is_dirty, perform, whole_content};
use crate::live_compacting::{adopt, change, compact, compacted, in_use, options};
use crate::scene::Scene;

/// What is at the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AtEnd {
    bitmaps: bool,
    refcounts: bool,
}

const BOTH: AtEnd = AtEnd { bitmaps: true, refcounts: true };
/// States of each power cut.
const STATES: usize = 4;

async fn write_all<S: Storage>(
    image: &Image<S>,
    kind: &Kind,
    seed: u64,
    step: u64,
) -> lacuna::Result<()> {
    let cluster = kind.cluster_bytes();
    for index in (0..kind.size_bytes() / cluster).step_by(step as usize) {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let bytes = Buffer::from(&testkit::content(seed, range)[..]);
        image.write(range.start, bytes, WriteFlags::empty()).await.0?;
    }
    Ok(())
}

/// Does something to an image; it is closed then.
fn with_image<F>(case: &Case, act: F) -> Case
where
    F: AsyncFnOnce(&Image<SimStorage>) -> lacuna::Result<()>,
{
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        act(&image).await.unwrap();
        image.close().await.unwrap();
    });
    case.with_content(vec![host.content(0)])
}

/// An image whose front is holes, with some of its tables behind all data.
fn build(kind: &Kind, at_end: AtEnd, seed: u64) -> Case {
    let case = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(seed | 1) };
    let mut case = with_image(&case, async |image| {
        write_all(image, kind, seed, 1).await?;
        if !at_end.bitmaps {
            return Ok(());
        }
        let fine = NewBitmap { granularity_bytes: Some(512), ..NewBitmap::new("off") };
        image.add_bitmap(&fine).await?;
        write_all(image, kind, seed + 1, 3).await?;
        image.enable_bitmap(&"off".into(), false).await?;
        image
            .add_bitmap(&NewBitmap { granularity_bytes: Some(4096), ..NewBitmap::new("on") })
            .await?;
        write_all(image, kind, seed + 2, 11).await
    });
    if at_end.refcounts {
        // Refcounts of another width are others, behind all that is there.
        case = by_qemu(&case, |path| img(path, &["amend", "-o", "refcount_bits=64", "@"]));
        case.kind.refcount_order = 6;
    }
    with_image(&case, async |image| {
        let cut = kind.size_bytes() * 3 / 4 / kind.cluster_bytes() * kind.cluster_bytes();
        image.discard(GuestRange::new(GuestOffset(0), cut), DiscardMode::Full).await
    })
}

fn kinds() -> [Kind; 3] {
    let plain = Kind::plain(9);
    [plain, Kind { lazy: true, ..plain }, Kind::plain(12)]
}

/// Returns where refcount blocks and the table lie: the end of the last one, in clusters.
fn end_of_refcounts(image: &SparseBytes) -> u64 {
    let header = Header::decode(&image.read_vec(0, 4096)).unwrap();
    let (at, cluster) = (header.refcount_table, header.geometry.cluster_bytes());
    let words = image.read_vec(at.offset.0, u64::from(at.clusters) as usize * cluster as usize);
    let entries = words.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word));
    let blocks = entries.filter_map(|entry| RefcountTableEntry(entry).block());
    let ends = blocks.map(|block| block.0 / cluster + 1);
    ends.max().unwrap().max(at.offset.0 / cluster + u64::from(at.clusters))
}

/// Returns how many clusters an image needs.
fn used(image: &SparseBytes) -> u64 {
    refcounts(image).iter().filter(|count| **count > 0).count() as u64
}

#[test]
fn refcounts_and_bitmaps_at_the_end_do_not_keep_a_file_long() {
    for kind in kinds() {
        for seed in seeds(2) {
            for at_end in
                [BOTH, AtEnd { bitmaps: false, ..BOTH }, AtEnd { refcounts: false, ..BOTH }]
            {
                let story = format!("LACUNA_SEED={seed} {kind:?} {at_end:?}");
                let case = build(&kind, at_end, seed);
                let is_far = end_of_refcounts(&case.image) > used(&case.image);
                assert!(is_far || !at_end.refcounts, "{story}: refcounts lie well");
                let before = pollster::block_on(view(&case)).unwrap();
                let (after, done) = pollster::block_on(compacted(&case)).unwrap();
                assert_eq!(done.left_bytes, 0, "{story}: {done:?}");
                assert_short(&after, 1, &story);
                assert_sound(&after, &before, &story);
            }
        }
    }
}

/// What somebody who opens the image believes of its bitmaps.
async fn named<S: Storage>(image: &Image<S>, name: &str) -> lacuna::Result<Vec<GuestRange>> {
    let mut ranges = image.bitmap(&name.into()).await?.ranges();
    let mut all = Vec::new();
    while let Some(range) = ranges.next().await? {
        all.push(range);
    }
    Ok(all)
}

/// What bitmaps must go on naming, and what the disk held when they did.
struct Known {
    disk: SparseBytes,
    view: View,
}

impl Known {
    fn of(case: &Case) -> Self {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let disk = pollster::block_on(async {
            whole_content(&case.on(&host).open().await.unwrap()).await.unwrap()
        });
        Self { disk, view: pollster::block_on(view(case)).unwrap() }
    }

    fn of_name(&self, name: &str) -> &[GuestRange] {
        let found = self.view.bitmaps.iter().find(|(other, _)| other == name);
        &found.expect("the bitmap is there").1
    }

    /// Bitmap "on" names all that it did and all that changed; bitmap "off" what it did.
    async fn assert_named<S: Storage>(&self, image: &Image<S>) -> Result<(), String> {
        let fail = |error: lacuna::Error| format!("bitmaps: {error}");
        if named(image, "off").await.map_err(fail)? != self.of_name("off") {
            return Err("bitmap off names something else".to_owned());
        }
        let disk = whole_content(image).await.map_err(fail)?;
        let on = named(image, "on").await.map_err(fail)?;
        let covers = |at: u64| on.iter().any(|it| it.start.0 <= at && at < it.end().0);
        for range in self.of_name("on") {
            if !(range.start.0..range.end().0).step_by(512).all(covers) {
                return Err(format!("bitmap on has forgotten {range:?}"));
            }
        }
        let changed = |at: &u64| disk.read_vec(*at, 512) != self.disk.read_vec(*at, 512);
        match (0..disk.len()).step_by(512).filter(changed).find(|at| !covers(*at)) {
            Some(at) => Err(format!("bitmap on misses the change at {at:#x}")),
            None => Ok(()),
        }
    }
}

/// Compacts while a guest writes; returns the record, and how often it was flushed.
async fn recorded(case: &Case, seed: u64) -> Result<Recorded, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let (image, mut model, mut recorded) = in_use(case, seed).await.map_err(fail)?;
    let mut random = Random::new(seed);
    let clusters = case.kind.size_bytes() / case.kind.cluster_bytes();
    let options = options(&case.kind);
    let mut compaction = lacuna::qcow2::LiveCompaction::new(&image, options).map_err(fail)?;
    while compaction.step().await.map_err(fail)?.is_some() {
        if random.one_in(2) {
            // At the end of the disk, so that its front stays holes.
            let place = clusters * 3 / 4 + random.below(clusters / 4);
            let operation = change(&mut random, &case.kind, place);
            recorded.change(&image, &mut model, operation).await.map_err(fail)?;
        }
        if random.one_in(4) {
            image.flush().await.map_err(fail)?;
            recorded.acknowledge();
        }
    }
    image.close().await.map_err(fail)?;
    recorded.acknowledge();
    Ok(recorded)
}

async fn examine(left: &Case, known: &Known, ask_qemu: bool) -> Result<(), String> {
    if !is_dirty(left) {
        assert_safe(left, ask_qemu).await?;
    }
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = left.on(&host).open().await.map_err(|error| format!("opening: {error}"))?;
    known.assert_named(&image).await?;
    image.close().await.map_err(|error| format!("closing: {error}"))?;
    let closed = left.with_content(vec![host.content(0)]);
    assert_safe(&closed, ask_qemu).await
}

fn one_in() -> u64 {
    if std::env::var_os("LACUNA_LONG").is_some() { 1 } else { 9 }
}

#[test]
fn a_power_cut_leaves_bitmaps_that_miss_nothing_and_counts_that_are_high_enough() {
    for seed in seeds(2) {
        for kind in kinds() {
            let story = format!("LACUNA_SEED={seed} {kind:?}");
            let case = build(&kind, BOTH, seed);
            let known = Known::of(&case);
            let recorded = pollster::block_on(recorded(&case, seed)).unwrap();
            let after = end_of_refcounts(&recorded.host.content(0));
            assert!(after < end_of_refcounts(&case.image), "{story}: blocks were not moved");
            let look = recorded.crash_at(seed, |random| random.one_in(one_in()));
            let count = pollster::block_on(look).unwrap_or_else(|error| panic!("{story}: {error}"));
            assert!(count > 5, "{story}: only {count} states");
            let mut random = Random::new(seed);
            let mut count = 0;
            for point in crash::points(&recorded.host) {
                if !random.one_in(one_in()) {
                    continue;
                }
                for state in point.states(seed, STATES) {
                    count += 1;
                    let left = case.with_content(state.files);
                    let examined = pollster::block_on(examine(&left, &known, count % 40 == 1));
                    examined.unwrap_or_else(|error| {
                        panic!("{story}: after event {}: {error}", point.event)
                    });
                }
            }
            assert!(count > 20, "{story}: only {count} states");
        }
    }
}

#[test]
fn refcounts_that_move_may_be_dropped_at_any_await_and_leak_nothing() {
    for kind in kinds() {
        let case = build(&kind, AtEnd { bitmaps: false, ..BOTH }, 1);
        Scene::drop_everywhere(&case, (13, 50), adopt, |image| async move {
            compact(&image, options(&kind)).await
        });
    }
}

/// Goes on with an image that a compaction was dropped on: what changes is named.
async fn going_on(image: Image<SimStorage>, known: &Known) -> Result<(), String> {
    let range = GuestRange::new(GuestOffset(0), 512);
    let write = Operation::Write { range, seed: 99, flags: WriteFlags::empty() };
    perform(&image, write).await.map_err(|error| error.to_string())?;
    known.assert_named(&image).await?;
    image.close().await.map_err(|error| format!("closing: {error}"))
}

#[test]
fn bitmaps_that_move_may_be_dropped_at_any_await() {
    let kind = Kind::plain(9);
    let case = build(&kind, BOTH, 1);
    let known: &'static Known = Box::leak(Box::new(Known::of(&case)));
    for polls in (1..).step_by(11) {
        let mut scene = Scene::set(&case, 1, adopt);
        let (image, other) = (scene.image.clone(), scene.image.clone());
        let work = async move { compact(&image, options(&kind)).await };
        let task = scene.executor.spawn_until(testkit::DropPoint::AfterPoll(polls), work);
        scene.executor.settle().unwrap();
        let is_over = task.take().is_some();
        let story = format!("dropped after poll {polls}");
        let went_on = scene.executor.block_on(async move { going_on(other, known).await });
        went_on.unwrap_or_else(|error| panic!("{story}: {error}"));
        let left = case.with_content(vec![scene.host.content(0)]);
        let looked = pollster::block_on(examine(&left, known, polls % 5 == 1));
        looked.unwrap_or_else(|error| panic!("{story}: {error}"));
        if is_over {
            assert!(polls > 100, "over after {polls} polls");
            return;
        }
    }
}

/// Reads bitmaps for as long as somebody compacts.
async fn read_on(image: Image<SimStorage>, known: &'static Known) -> Result<(), String> {
    for _ in 0..40 {
        let off = named(&image, "off").await.map_err(|error| error.to_string())?;
        if off != known.of_name("off") {
            return Err(format!("bitmap off: {off:?}"));
        }
        let on = named(&image, "on").await.map_err(|error| error.to_string())?;
        let covers = |at: u64| on.iter().any(|it| it.start.0 <= at && at < it.end().0);
        let was = known.of_name("on").iter();
        if !was.flat_map(|it| (it.start.0..it.end().0).step_by(512)).all(covers) {
            return Err(format!("bitmap on: {on:?}"));
        }
    }
    Ok(())
}

#[test]
fn guests_and_readers_of_bitmaps_go_on_while_tables_move() {
    for seed in seeds(6) {
        for (number, kind) in (0..).zip(kinds()) {
            let case = build(&kind, BOTH, seed);
            let known: &'static Known = Box::leak(Box::new(Known::of(&case)));
            let mut scene = Scene::set(&case, seed * 10 + number, adopt);
            let image = scene.image.clone();
            let options = options(&case.kind);
            let compacting = scene.executor.spawn(async move { compact(&image, options).await });
            let reading = scene.executor.spawn(read_on(scene.image.clone(), known));
            let mut random = Random::new(seed);
            let mut changes = Vec::new();
            for place in 0..kind.size_bytes() / kind.cluster_bytes() {
                if !random.one_in(3) {
                    continue;
                }
                let operation = change(&mut random, &kind, place);
                let image = scene.image.clone();
                let flushes = random.one_in(5);
                let run = async move {
                    let done = perform(&image, operation).await;
                    if flushes { image.flush().await.and(done) } else { done }
                };
                changes.push((operation, scene.executor.spawn(run)));
                if random.one_in(4) {
                    scene.executor.run_for(50);
                }
            }
            scene.executor.settle().unwrap();
            let story = format!("LACUNA_SEED={seed} {kind:?}");
            assert!(compacting.take().unwrap().unwrap().moved_bytes > 0, "{story}");
            reading.take().unwrap().unwrap_or_else(|error| panic!("{story}: {error}"));
            for (operation, task) in changes {
                task.take().unwrap().unwrap();
                scene.model.apply(&operation);
            }
            let image = scene.image.clone();
            let looked = scene.executor.block_on(async move { known.assert_named(&image).await });
            looked.unwrap_or_else(|error| panic!("{story}: {error}"));
            scene.judge(&case, &story);
        }
    }
}

/// More blocks than a sector of the refcount table names, moving at once.
#[test]
fn a_power_cut_that_parts_sectors_of_the_refcount_table_leaves_no_block_uncounted() {
    let kind = Kind { refcount_order: 6, ..Kind::plain(9) };
    let clusters = 12_000;
    let case = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(1) };
    let case = by_qemu(&case, |path| img(path, &["amend", "-o", "refcount_bits=16", "@"]));
    let case = with_image(&case, async |image| {
        image.resize(clusters * 512, lacuna::qcow2::Shrink::Refuse).await?;
        let bytes = vec![7; 64 << 10];
        for at in (0..clusters * 512).step_by(bytes.len()) {
            let len = bytes.len().min((clusters * 512 - at) as usize);
            let part = Buffer::from(&bytes[..len]);
            image.write(GuestOffset(at), part, WriteFlags::empty()).await.0?;
        }
        Ok(())
    });
    let case = by_qemu(&case, |path| img(path, &["amend", "-o", "refcount_bits=64", "@"]));
    let case = with_image(&case, async |image| {
        let half = GuestRange::new(GuestOffset(0), clusters / 2 * 512);
        image.discard(half, DiscardMode::Full).await
    });
    let host = SimHost::new(Pace::AtOnce, 1);
    let done = pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        host.start_record();
        let done = compact(&image, Default::default()).await.unwrap();
        image.close().await.unwrap();
        done
    });
    assert_eq!(done.left_bytes, 0, "{done:?}");
    let (mut count, mut random) = (0, Random::new(1));
    let points = crash::points(&host);
    let all = points.len();
    for (number, point) in points.into_iter().enumerate() {
        // Refcounts come last.
        if number + 60 < all || !random.one_in(2) {
            continue;
        }
        for state in point.states(number as u64, 6) {
            count += 1;
            let left = case.with_content(state.files);
            let looked = pollster::block_on(assert_safe(&left, count % 40 == 1));
            looked.unwrap_or_else(|error| panic!("after event {}: {error}", point.event));
        }
    }
    assert!(count > 30, "only {count} states");
}
