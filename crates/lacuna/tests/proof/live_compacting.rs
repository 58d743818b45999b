//! Compaction of an image that is in use changes no byte: among writers, through power cuts, dropped at
//! awaits.

use lacuna::ErrorKind;
use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{
    Access, Image, LiveCompactOptions, LiveCompacted, LiveCompaction, OnDiscard, OpenOptions,
    SnapshotChoice,
};
use lacuna::storage::Storage;
use lacuna::units::{GuestCluster, GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{ModelDisk, Operation, Random, SparseBytes, content, seeds};

use crate::case::{Case, Kind, Store};
use crate::compacting::{With, all_kinds, assert_short, assert_sound, build, view, with_all};
use crate::crash::Recorded;
use crate::drive::{perform, whole_content};
use crate::scene::Scene;

/// Steps of a few clusters.
pub(crate) fn options(kind: &Kind) -> LiveCompactOptions {
    LiveCompactOptions { slice_bytes: 5 * kind.cluster_bytes(), memory_bytes: 20_000 }
}

pub(crate) async fn compact<S: Storage>(
    image: &Image<S>,
    options: LiveCompactOptions,
) -> lacuna::Result<LiveCompacted> {
    let mut compaction = LiveCompaction::new(image, options)?;
    while let Some(progress) = compaction.step().await? {
        assert!(progress.done_bytes <= progress.total_bytes, "{progress:?}");
    }
    Ok(compaction.so_far())
}

pub(crate) async fn compacted(case: &Case) -> lacuna::Result<(Case, LiveCompacted)> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await?;
    let done = compact(&image, options(&case.kind)).await?;
    image.close().await?;
    Ok((case.with_content(vec![host.content(0)]), done))
}

fn compact_and_look(kind: &Kind, with: With, seed: u64) {
    let story = format!("LACUNA_SEED={seed} {kind:?} {with:?}");
    let case = build(kind, with, seed);
    let before = pollster::block_on(view(&case)).unwrap();
    let run = pollster::block_on(compacted(&case));
    let (after, done) = run.unwrap_or_else(|error| panic!("{story}: {error}"));
    // Streams need refcounts that can count more than them.
    assert!(done.moved_bytes > 0 || kind.refcount_order == 0, "{story}: {done:?}");
    if !with.streams || kind.refcount_order > 2 {
        // Streams are packed otherwise than they were, and tables need room beside those they replace.
        let slack = if with.streams || with.snapshots { 8 } else { 0 };
        assert!(done.left_bytes <= slack * kind.cluster_bytes(), "{story}: {done:?}");
        assert_short(&after, slack as usize + 2, &story);
    }
    assert_sound(&after, &before, &story);
}

#[test]
fn an_image_compacted_while_it_is_open_reads_the_same() {
    for bits in [9, 14] {
        for kind in all_kinds(bits) {
            for seed in seeds(1) {
                compact_and_look(&kind, with_all(&kind), seed);
                compact_and_look(&kind, without_bitmaps(&kind), seed);
                compact_and_look(&kind, With::default(), seed);
            }
        }
    }
}

/// Kinds that differ in what moves.
fn few() -> Vec<Kind> {
    let plain = Kind::plain(9);
    let extended = Kind { extended: true, ..Kind::plain(14) };
    let more = [Kind { version: 2, ..plain }, Kind { lazy: true, ..plain }, extended];
    std::iter::once(plain).chain(more).collect()
}

fn without_bitmaps(kind: &Kind) -> With {
    With { bitmaps: false, streams: true, ..with_all(kind) }
}

pub(crate) async fn adopt(image: &Image<SimStorage>, model: &mut ModelDisk, _: u64) {
    let content = whole_content(image).await.unwrap();
    model.adopt(GuestRange::new(GuestOffset(0), content.len()), &content.to_vec());
}

/// An image that is open and recorded from now on, with what its disk holds.
pub(crate) async fn in_use(
    case: &Case,
    seed: u64,
) -> lacuna::Result<(Image<SimStorage>, ModelDisk, Recorded)> {
    let host = SimHost::new(Pace::AtOnce, seed);
    let mut model = case.model();
    let image = case.on(&host).open().await?;
    adopt(&image, &mut model, 0).await;
    let recorded = Recorded::from_now(case, host, &model);
    Ok((image, model, recorded))
}

/// Something that a guest does to one place.
pub(crate) fn change(random: &mut Random, kind: &Kind, place: u64) -> Operation {
    let cluster = kind.cluster_bytes();
    let whole = GuestRange::new(GuestOffset(place * cluster), cluster);
    let start = whole.start + random.below(cluster / 512) * 512;
    let part = GuestRange::new(start, 512);
    let (seed, flags) = (random.next(), WriteFlags::empty());
    match random.below(5) {
        0 => Operation::WriteZeroes { range: whole, flags: ZeroFlags::MAY_UNMAP },
        1 => Operation::Write { range: whole, seed, flags },
        _ => Operation::Write { range: part, seed, flags },
    }
}

/// What snapshots show stays as it was, and what is said to be zeros is.
async fn look_at_snapshots(image: Image<SimStorage>, wanted: Vec<(String, Vec<u8>)>) {
    for (name, content) in wanted {
        let choice = SnapshotChoice::Name(name.as_str().into());
        let layer = image.snapshot(&choice).await.unwrap();
        assert!(whole_content(&layer).await.unwrap().to_vec() == content);
        let all = GuestRange::new(GuestOffset(0), layer.size_bytes());
        for extent in layer.extents(all).await.unwrap() {
            let bytes = &content[extent.range.start.0 as usize..extent.range.end().0 as usize];
            assert!(!extent.status.reads_zero || bytes.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn what_is_written_while_an_image_is_compacted_is_kept() {
    for seed in seeds(4) {
        for (number, kind) in (0..).zip(few()) {
            let case = build(&kind, with_all(&kind), seed);
            let snapshots = pollster::block_on(view(&case)).unwrap().snapshots;
            let mut scene = Scene::set(&case, seed * 100 + number, adopt);
            let mut random = Random::new(seed);
            let image = scene.image.clone();
            let compacting =
                scene.executor.spawn(async move { compact(&image, options(&case.kind)).await });
            let reader = look_at_snapshots(scene.image.clone(), snapshots);
            let reading = scene.executor.spawn(reader);
            let places: Vec<u64> = (0..kind.size_bytes() / kind.cluster_bytes())
                .filter(|_| random.one_in(3))
                .collect();
            let mut changes = Vec::new();
            for place in places {
                let operation = change(&mut random, &kind, place);
                let image = scene.image.clone();
                let run = async move { perform(&image, operation).await };
                changes.push((operation, scene.executor.spawn(run)));
                if random.one_in(8) {
                    scene.executor.run().unwrap();
                }
            }
            scene.executor.settle().unwrap();
            compacting.take().unwrap().unwrap();
            reading.take().unwrap();
            for (operation, task) in changes {
                task.take().unwrap().unwrap();
                scene.model.apply(&operation);
            }
            let case = build(&kind, without_bitmaps(&kind), seed);
            scene.judge(&case, &format!("LACUNA_SEED={seed} {kind:?}"));
        }
    }
}

#[test]
fn a_live_compaction_dropped_at_any_await_changes_no_byte_and_leaks_nothing() {
    for kind in few() {
        let case = build(&kind, without_bitmaps(&kind), 1);
        Scene::drop_everywhere(&case, (23, 50), adopt, |image| async move {
            compact(&image, options(&kind)).await
        });
    }
}

async fn crashed(case: &Case, seed: u64) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let (image, mut model, mut recorded) = in_use(case, seed).await.map_err(fail)?;
    let mut random = Random::new(seed);
    let clusters = case.kind.size_bytes() / case.kind.cluster_bytes();
    let mut compaction = LiveCompaction::new(&image, options(&case.kind)).map_err(fail)?;
    while compaction.step().await.map_err(fail)?.is_some() {
        let place = random.below(clusters);
        let operation = change(&mut random, &case.kind, place);
        recorded.change(&image, &mut model, operation).await.map_err(fail)?;
        if random.one_in(4) {
            image.flush().await.map_err(fail)?;
            recorded.acknowledge();
        }
    }
    let done = compaction.so_far();
    // In a disk of a few clusters, what is written meanwhile may take all holes.
    if done.moved_bytes == 0 && clusters > 100 {
        return Err(format!("nothing was moved: {done:?}"));
    }
    image.close().await.map_err(fail)?;
    recorded.acknowledge();
    let one_in = if std::env::var_os("LACUNA_LONG").is_some() { 1 } else { 12 };
    recorded.crash_at(seed, |random| random.one_in(one_in)).await
}

#[test]
fn a_crash_of_a_live_compaction_leaves_leaks_at_worst() {
    for seed in seeds(1) {
        for kind in few() {
            for with in [without_bitmaps(&kind), With::default()] {
                let case = build(&kind, with, seed);
                let count = pollster::block_on(crashed(&case, seed));
                let count = count.unwrap_or_else(|error| {
                    panic!("LACUNA_SEED={seed} {kind:?} {with:?}: {error}")
                });
                assert!(count > 5, "{kind:?}: only {count} states");
            }
        }
    }
}

/// Fills the disk with what is alike in groups, has that share, and makes holes before it.
async fn share_behind_holes(image: &Image<SimStorage>, model: &mut ModelDisk, cluster: u64) {
    let clusters = model.size_bytes() / cluster;
    for index in 0..clusters {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let bytes = content(100 + index % 5, GuestRange::new(GuestOffset(0), cluster));
        image.write(range.start, Buffer::from(&bytes[..]), WriteFlags::empty()).await.0.unwrap();
        model.adopt(range, &bytes);
    }
    image.flush().await.unwrap();
    let alike = |group: u64| (clusters / 2..clusters).filter(move |it| it % 5 == group);
    let groups: Vec<_> = (0..5).map(|it| alike(it).map(GuestCluster).collect()).collect();
    assert!(image.share(&groups).await.unwrap().shared > 5);
    for index in 0..clusters / 2 {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        image.write_zeroes(range, ZeroFlags::MAY_UNMAP).await.unwrap();
        model.apply(&Operation::WriteZeroes { range, flags: ZeroFlags::MAY_UNMAP });
    }
}

/// A case whose discards free, as what shares may not be bound to its place.
fn to_share(kind: &Kind, seed: u64) -> Case {
    let mut case = kind.build(seed);
    case.options = case.options.on_discard(OnDiscard::Free);
    case
}

#[test]
fn shared_clusters_move_with_their_pins_while_guests_write() {
    for seed in seeds(4) {
        for (number, kind) in (0..).zip(few()) {
            let case = to_share(&kind, seed);
            let mut scene = Scene::set(&case, seed * 100 + number, share_behind_holes);
            let before = scene.host.content(0).len();
            let (image, mut random) = (scene.image.clone(), Random::new(seed));
            let run = async move { compact(&image, options(&kind)).await };
            let compacting = scene.executor.spawn(run);
            let mut changes = Vec::new();
            for place in (0..kind.size_bytes() / kind.cluster_bytes()).step_by(7) {
                let operation = change(&mut random, &kind, place);
                let image = scene.image.clone();
                let run = async move { perform(&image, operation).await };
                changes.push((operation, scene.executor.spawn(run)));
            }
            scene.executor.settle().unwrap();
            compacting.take().unwrap().unwrap();
            for (operation, task) in changes {
                task.take().unwrap().unwrap();
                scene.model.apply(&operation);
            }
            let image = scene.image.clone();
            let run = async move { compact(&image, options(&kind)).await };
            let done = scene.executor.block_on(run).unwrap();
            let story = format!("LACUNA_SEED={seed} {kind:?}: {done:?}");
            assert!(done.left_bytes <= 8 * kind.cluster_bytes(), "{story}");
            assert!(scene.host.content(0).len() < before, "{story}");
            // Pins are where they are thought to be.
            let image = scene.image.clone();
            scene.executor.block_on(async move { image.drop_unused_pins().await }).unwrap();
            scene.judge(&case, &story);
        }
    }
}

#[test]
fn moving_pins_may_be_dropped_at_any_await_and_survives_power_cuts() {
    for kind in few() {
        let case = to_share(&kind, 1);
        Scene::drop_everywhere(&case, (29, 0), share_behind_holes, |image| async move {
            compact(&image, options(&kind)).await
        });
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let mut model = case.model();
        pollster::block_on(async {
            let image = case.on(&host).open().await.unwrap();
            share_behind_holes(&image, &mut model, kind.cluster_bytes()).await;
            image.close().await.unwrap();
        });
        let shared = case.with_content(vec![host.content(0)]);
        let count = pollster::block_on(crashed(&shared, 1));
        let count = count.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        assert!(count > 5, "{kind:?}: only {count} states");
    }
}

fn assert_refused(case: &Case, kind: ErrorKind, text: &str) {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = pollster::block_on(case.on(&host).open()).unwrap();
    let error = LiveCompaction::new(&image, LiveCompactOptions::default()).err().unwrap();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn what_cannot_be_compacted_while_open_is_refused_with_the_reason() {
    let plain = Kind::plain(16);
    let with = |image: SparseBytes, options: OpenOptions| Case { image, options, ..plain.build(1) };
    let writable = || OpenOptions::new(Access::ReadWrite);
    let image = || plain.builder().data(0, b"guest").build().bytes;
    let data = Kind { store: Store::DataFile, ..plain }.build(1);
    assert_refused(&data, ErrorKind::Unsupported, "external data file");
    let keeps = writable().on_discard(OnDiscard::KeepMapping);
    assert_refused(&with(image(), keeps), ErrorKind::InvalidRequest, "keeps its clusters");
    let read_only = OpenOptions::new(Access::ReadOnly);
    assert_refused(&with(image(), read_only), ErrorKind::ReadOnly, "read-only");
    let stranger = plain.builder().extension(0x1234_5678, b"12345678").build().bytes;
    assert_refused(&with(stranger, writable()), ErrorKind::Unsupported, "0x12345678");
    let keeping = plain.builder().extension(0x6c61_6b6d, b"").build().bytes;
    let frees = writable().on_discard(OnDiscard::Free);
    assert_refused(&with(keeping, frees), ErrorKind::InvalidRequest, "keep_mapping");
}
