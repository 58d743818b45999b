//! Compaction in place changes no byte of disk, snapshots and bitmaps, and leaves no hole; stopped and
//! begun again, too.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lacuna::ErrorKind;
use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{DedupOptions, dedup};
use lacuna::qcow2::format::{Header, RefcountTableEntry, RefcountWidth};
use lacuna::qcow2::{
    Access, CompactOptions, CompactOrder, CompactPace, CompactReport, CompactStep, Image,
    KeptMapping, OpenOptions, SnapshotChoice, compact_estimate,
};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};
use testkit::sim::{Pace, SimHost};
use testkit::{Random, SparseBytes, seeds};

use crate::case::{Backing, Case, Kind, Store};
use crate::crash::kinds;
use crate::drive::{own_check, whole_content};
use crate::guest_order::assert_in_order;

/// What an image is to have beside data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct With {
    pub(crate) snapshots: bool,
    pub(crate) bitmaps: bool,
    pub(crate) streams: bool,
    /// Equal clusters share one, and some of those are pinned for nobody any more.
    pub(crate) pins: bool,
}

/// All that somebody can read of an image.
#[derive(Debug, PartialEq)]
pub(crate) struct View {
    active: Vec<u8>,
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
    pub(crate) bitmaps: Vec<(String, Vec<GuestRange>)>,
    /// How often clusters that are pinned are shown, where each has one pin.
    pub(crate) shown: Option<u64>,
}

/// Bytes that compress well, a little, or not at all.
pub(crate) fn bytes(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes = vec![random.next() as u8; len as usize];
    let noisy = random.below(len + 1) as usize / if random.one_in(2) { 1 } else { 4 };
    bytes[..noisy].iter_mut().for_each(|byte| *byte = random.next() as u8);
    bytes
}

/// Writes or removes clusters here and there, in any order.
pub(crate) async fn scatter<S: Storage>(
    image: &Image<S>,
    kind: &Kind,
    random: &mut Random,
    (holes_in_ten, with): (u64, With),
) -> lacuna::Result<()> {
    let cluster = kind.cluster_bytes();
    let mut order: Vec<u64> = (0..kind.size_bytes() / cluster).collect();
    for index in (1..order.len()).rev() {
        order.swap(index, random.index(index + 1));
    }
    for index in order {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        if random.below(10) < holes_in_ten {
            image.discard(range, DiscardMode::Full).await?;
            continue;
        }
        // Few contents, so that many clusters are equal.
        let content = match with.pins {
            true => bytes(&mut Random::new(random.below(3)), cluster),
            false => bytes(random, cluster),
        };
        let buffer = Buffer::from(&content[..]);
        match with.streams && random.one_in(3) {
            true => image.write_compressed(range.start, buffer).await.0?,
            false => image.write(range.start, buffer, WriteFlags::empty()).await.0?,
        }
    }
    Ok(())
}

async fn scattered(case: &Case, random: &mut Random, how: (u64, With)) -> Case {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await.unwrap();
    scatter(&image, &case.kind, random, how).await.unwrap();
    image.close().await.unwrap();
    case.with_content(vec![host.content(0)])
}

/// Has equal clusters share one, and takes a part of the sharers away.
async fn shared(case: &Case, random: &mut Random) -> Case {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await.unwrap();
    let done = dedup(&image, DedupOptions::default(), &mut |_| ()).await.unwrap();
    assert!(done.keepers > 0, "{:?}: {done:?}", case.kind);
    let cluster = case.kind.cluster_bytes();
    for index in (0..case.kind.size_bytes() / cluster).filter(|_| random.one_in(3)) {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        image.discard(range, DiscardMode::Full).await.unwrap();
    }
    image.close().await.unwrap();
    case.with_content(vec![host.content(0)])
}

/// What QEMU's programs do to an image.
pub(crate) fn by_qemu(case: &Case, steps: impl FnOnce(&Path)) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let path = case.save(folder.path());
    steps(&path);
    case.with_content(vec![SparseBytes::load(&path)])
}

pub(crate) fn img(path: &Path, words: &[&str]) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let words: Vec<&str> =
        words.iter().map(|word| if *word == "@" { name } else { word }).collect();
    QEMU_IMG.succeed_in(path.parent().unwrap(), &words);
}

/// An image full of holes.
pub(crate) fn build(kind: &Kind, with: With, seed: u64) -> Case {
    let random = &mut Random::new(seed ^ 0xc0_4a);
    let case = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(seed | 1) };
    let mut case = pollster::block_on(scattered(&case, random, (2, with)));
    if with.snapshots {
        case = by_qemu(&case, |path| img(path, &["snapshot", "-c", "gone", "@"]));
        case = pollster::block_on(scattered(&case, random, (5, with)));
        case = by_qemu(&case, |path| {
            img(path, &["snapshot", "-c", "one", "@"]);
            img(path, &["snapshot", "-c", "two", "@"]);
        });
    }
    if with.bitmaps {
        case = by_qemu(&case, |path| {
            img(path, &["bitmap", "--add", "-g", "512", "@", "first"]);
            img(path, &["bitmap", "--add", "-g", "4096", "@", "second"]);
        });
    }
    let holes_in_ten = if with.pins { 3 } else { 7 };
    case = pollster::block_on(scattered(&case, random, (holes_in_ten, with)));
    if with.snapshots {
        case = by_qemu(&case, |path| img(path, &["snapshot", "-d", "gone", "@"]));
    }
    match with.pins {
        true => pollster::block_on(shared(&case, random)),
        false => case,
    }
}

pub(crate) async fn view(case: &Case) -> lacuna::Result<View> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let mut files = case.on(&host);
    files.options = OpenOptions::new(Access::ReadOnly);
    let image = files.open().await?;
    let mut view = View {
        active: whole_content(&image).await?.to_vec(),
        snapshots: Vec::new(),
        bitmaps: Vec::new(),
        shown: image.pin_facts().await?.map(|pins| pins.references),
    };
    for snapshot in image.snapshots().await?.into_iter().filter(|it| !it.is_pin()) {
        let layer = image.snapshot(&SnapshotChoice::Id(snapshot.id.clone())).await?;
        let content = whole_content(&layer).await?.to_vec();
        view.snapshots.push((snapshot.name.to_string(), content));
    }
    for facts in image.bitmaps().await? {
        let (mut ranges, mut found) = (image.bitmap(&facts.name).await?.ranges(), Vec::new());
        while let Some(range) = ranges.next().await? {
            found.push(range);
        }
        view.bitmaps.push((facts.name.to_string(), found));
    }
    Ok(view)
}

/// Batches of a few clusters, and memory for a few pointers: as many rounds as there can be.
pub(crate) fn options(kind: &Kind) -> CompactOptions {
    CompactOptions {
        batch_bytes: Some(9 * kind.cluster_bytes()),
        memory_bytes: 6000,
        kept_mapping: KeptMapping::Move,
        ..CompactOptions::default()
    }
}

pub(crate) async fn compact(
    case: &Case,
    options: &CompactOptions,
) -> lacuna::Result<(Case, CompactReport)> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await?;
    let report = image.compact(options, &mut |_| ()).await?;
    Ok((case.with_content(vec![host.content(0)]), report))
}

/// Counts by cluster, beyond the end of the file too.
pub(crate) fn refcounts(image: &SparseBytes) -> Vec<u64> {
    let header = Header::decode(&image.read_vec(0, image.len().min(2 << 20) as usize)).unwrap();
    let (geometry, table) = (header.geometry, header.refcount_table);
    let width = RefcountWidth::of(&geometry);
    let bytes = u64::from(table.clusters) * geometry.cluster_bytes();
    let entries = image.read_vec(table.offset.0, bytes as usize);
    let mut counts = Vec::new();
    for (index, entry) in (0..).zip(entries.as_chunks::<8>().0) {
        let entry = RefcountTableEntry(u64::from_be_bytes(*entry));
        let Some(block) = entry.block() else { continue };
        counts.resize((index * geometry.refcount_block_entries()) as usize, 0);
        let block = image.read_vec(block.0, geometry.cluster_bytes() as usize);
        let entries = geometry.refcount_block_entries() as usize;
        counts.extend((0..entries).map(|index| width.read(&block, index)));
    }
    counts
}

/// Nothing that is in use could lie lower, but for `slack` clusters.
pub(crate) fn assert_short(case: &Case, slack: usize, story: &str) {
    let counts = refcounts(&case.image);
    let clusters = case.image.len().div_ceil(case.kind.cluster_bytes()) as usize;
    let used = counts.iter().filter(|count| **count > 0).count();
    let last = counts.iter().rposition(|count| *count > 0).unwrap() + 1;
    assert_eq!(last, clusters, "{story}: the file ends elsewhere than what is in use");
    assert!(used + slack >= clusters, "{story}: {clusters} clusters, {used} in use");
}

/// Says what of two views is not the same.
pub(crate) fn differing(seen: &View, before: &View) -> String {
    let mut names = Vec::new();
    if seen.active != before.active {
        names.push("the disk".to_owned());
    }
    let snapshots = seen.snapshots != before.snapshots;
    names.extend(snapshots.then(|| {
        let of = |view: &View| view.snapshots.iter().map(|it| it.0.clone()).collect::<Vec<_>>();
        format!("snapshots ({:?}, before {:?})", of(seen), of(before))
    }));
    let bitmaps = seen.bitmaps != before.bitmaps;
    names.extend(
        bitmaps.then(|| format!("bitmaps ({:?}, before {:?})", seen.bitmaps, before.bitmaps)),
    );
    names.join(", ")
}

/// Clean for both checks, and every byte as it was; stock can go on with it.
pub(crate) fn assert_sound(case: &Case, before: &View, story: &str) {
    let report = pollster::block_on(own_check(case));
    assert!(report.is_clean(), "{story}: {report:x?}");
    let after = pollster::block_on(view(case)).unwrap();
    let differing = differing(&after, before);
    assert!(differing.is_empty(), "{story}: {differing} read otherwise");
    assert_eq!(after.shown, before.shown, "{story}: references of pinned clusters");
    let folder = tempfile::tempdir().unwrap();
    let path = case.save(folder.path());
    let is_clean = |when: &str| {
        let found = qemu_img_check(&path);
        assert!(found.is_clean(), "{story}: {when}: {}", found.text);
    };
    is_clean("afterwards");
    let raw = folder.path().join("wanted.raw");
    let compare = |wanted: &[u8]| {
        std::fs::write(&raw, wanted).unwrap();
        img(&path, &["compare", "-f", "qcow2", "-F", "raw", "@", "wanted.raw"]);
    };
    compare(&before.active);
    for (name, wanted) in &before.snapshots {
        img(&path, &["convert", "-l", name, "-f", "qcow2", "-O", "raw", "@", "seen.raw"]);
        let seen = std::fs::read(folder.path().join("seen.raw")).unwrap();
        assert!(seen == *wanted, "{story}: snapshot {name} for qemu-img");
    }
    let cluster = case.kind.cluster_bytes();
    let write = |byte: u8, at: u64| format!("write -P {byte} {} {cluster}", at * cluster);
    qemu_io(&path, [write(3, 0), write(4, 2), format!("discard {cluster} {cluster}")]);
    is_clean("after writes");
    if case.kind.refcount_order > 1 {
        img(&path, &["snapshot", "-c", "later", "@"]);
        qemu_io(&path, [write(5, 1), write(6, 3)]);
        is_clean("after a snapshot");
        // QEMU applies no snapshot to a disk with bitmaps.
        for (name, _) in &before.bitmaps {
            img(&path, &["bitmap", "--remove", "@", name]);
        }
        for (name, wanted) in &before.snapshots {
            img(&path, &["snapshot", "-a", name, "@"]);
            is_clean("after applying");
            compare(wanted);
            img(&path, &["snapshot", "-d", name, "@"]);
            is_clean("after deleting");
        }
    }
}

pub(crate) fn all_kinds(cluster_bits: u32) -> Vec<Kind> {
    let plain = Kind::plain(cluster_bits);
    let more = [
        Kind { store: Store::Zstd, ..plain },
        Kind { refcount_order: 3, ..plain },
        Kind { version: 2, backing: Backing::RawShorter, ..plain },
    ];
    kinds(cluster_bits).into_iter().filter(|kind| !kind.has_data_file()).chain(more).collect()
}

/// What a kind can have: snapshots need counts above 2, bitmaps version 3. Half of the kinds have
/// compressed clusters as well.
pub(crate) fn with_all(kind: &Kind) -> With {
    let is_odd = kind.extended || kind.store == Store::Zstd || kind.lazy;
    let streams = is_odd || kind.backing != Backing::None || kind.refcount_order < 4;
    let (snapshots, bitmaps) = (kind.refcount_order > 1, kind.version == 3);
    With { snapshots, bitmaps, streams, pins: false }
}

/// Kinds that can have pins, and what of all they have.
pub(crate) fn pinned_kinds(cluster_bits: u32) -> impl Iterator<Item = (Kind, With)> {
    let can = |kind: &Kind| kind.refcount_order > 2;
    let with = |kind: Kind| (kind, With { pins: true, ..with_all(&kind) });
    all_kinds(cluster_bits).into_iter().filter(can).map(with)
}

fn compact_and_look(kind: &Kind, with: With, seed: u64) {
    for order in [CompactOrder::Any, CompactOrder::Guest] {
        compact_in_order(kind, with, order, seed);
    }
}

fn compact_in_order(kind: &Kind, with: With, order: CompactOrder, seed: u64) {
    let story = format!("LACUNA_SEED={seed} {kind:?} {with:?} {order:?}");
    let case = build(kind, with, seed);
    let before = pollster::block_on(view(&case)).unwrap();
    let options = CompactOptions { order, ..options(kind) };
    let run = pollster::block_on(compact(&case, &options));
    let (after, report) = run.unwrap_or_else(|error| panic!("{story}: {error}"));
    if order == CompactOrder::Guest {
        assert_in_order(&after, &report, &story);
    }
    assert!(report.after_bytes < report.before_bytes, "{story}: {report:?}");
    assert_eq!(report.after_bytes, after.image.len(), "{story}");
    assert_short(&after, 0, &story);
    assert_sound(&after, &before, &story);
}

#[test]
fn a_compacted_image_reads_the_same_and_has_no_holes() {
    for bits in [9, 14] {
        for kind in all_kinds(bits) {
            seeds(1).for_each(|seed| compact_and_look(&kind, with_all(&kind), seed));
        }
    }
}

#[test]
fn so_does_one_whose_equal_clusters_share_one() {
    for bits in [9, 14] {
        for (kind, with) in pinned_kinds(bits) {
            seeds(1).for_each(|seed| compact_and_look(&kind, with, seed));
        }
    }
}

#[test]
fn so_does_one_of_any_cluster_size_and_width() {
    for bits in [10, 12, 16, 18] {
        let plain = Kind::plain(bits);
        let kinds = [plain, Kind { version: 2, ..plain }, Kind { refcount_order: 6, ..plain }];
        for kind in kinds {
            seeds(1).for_each(|seed| compact_and_look(&kind, with_all(&kind), seed));
        }
    }
    for refcount_order in [0, 1, 2, 5] {
        compact_and_look(
            &Kind { refcount_order, ..Kind::plain(9) },
            With { streams: true, ..With::default() },
            1,
        );
    }
}

/// Holes that come to be while the image is whole are found by the estimate, and it is right.
#[test]
fn the_estimate_says_what_is_done() {
    for bits in [9, 14] {
        let kind = Kind::plain(bits);
        let case = build(&kind, with_all(&kind), 3);
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let storage = host.add_file(case.image.clone());
        let options = options(&kind);
        let estimate = pollster::block_on(compact_estimate(&storage, &options)).unwrap();
        assert!(host.content(0).to_vec() == case.image.to_vec(), "the estimate has written");
        let (after, report) = pollster::block_on(compact(&case, &options)).unwrap();
        assert_eq!(estimate.before_bytes, case.image.len());
        let cluster = kind.cluster_bytes();
        assert_eq!(estimate.goal_bytes, after.image.len());
        assert!(estimate.moved_bytes.abs_diff(report.moved_bytes) <= 8 * cluster, "{report:?}");
    }
}

#[test]
fn who_stops_it_has_a_clean_image_and_may_go_on() {
    for kind in [Kind::plain(9), Kind { extended: true, ..Kind::plain(14) }] {
        let case = build(&kind, with_all(&kind), 1);
        let before = pollster::block_on(view(&case)).unwrap();
        let one = CompactOptions { batch_bytes: Some(1), ..options(&kind) };
        let calls = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&calls);
        let pace = CompactPace::new(move |bytes| {
            assert!(bytes > 0);
            let is_second = seen.fetch_add(1, Ordering::Relaxed) == 1;
            let step = if is_second { CompactStep::Stop } else { CompactStep::GoOn };
            Box::pin(std::future::ready(step))
        });
        let stopping = CompactOptions { pace: Some(pace), ..one.clone() };
        let (half, report) = pollster::block_on(compact(&case, &stopping)).unwrap();
        assert!(report.is_stopped && calls.load(Ordering::Relaxed) == 2, "{report:?}");
        assert_sound(&half, &before, "half-way");
        let flag = Arc::new(AtomicBool::new(true));
        let flagged = CompactOptions { stop: Some(flag), ..one.clone() };
        let (half, report) = pollster::block_on(compact(&half, &flagged)).unwrap();
        assert!(report.is_stopped, "{report:?}");
        let (whole, report) = pollster::block_on(compact(&half, &options(&kind))).unwrap();
        assert!(!report.is_stopped, "{report:?}");
        assert_short(&whole, 0, "at the end");
        assert_sound(&whole, &before, "at the end");
    }
}

/// `qemu-img check` does not see these either.
#[test]
fn counts_beyond_the_end_are_cleared() {
    let kind = Kind::plain(16);
    let image = kind.builder().data(0, b"guest").refcount(6, 1).build().bytes;
    let odd = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(1) };
    let case = Case { image, ..odd };
    assert_eq!(refcounts(&case.image)[6], 1);
    let (after, _) = pollster::block_on(compact(&case, &options(&kind))).unwrap();
    assert_short(&after, 0, "counts beyond the end");
}

/// Refuses, and has not changed a byte.
fn assert_refused(case: &Case, kind: ErrorKind, text: &str) {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let options = CompactOptions::default();
    let error = pollster::block_on(async {
        case.on(&host).open().await?.compact(&options, &mut |_| ()).await
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
    assert!(host.content(0).to_vec() == case.image.to_vec(), "{text}: something was written");
}

#[test]
fn what_cannot_be_compacted_is_refused_with_the_reason() {
    let plain = Kind::plain(16);
    let odd = Case { options: OpenOptions::new(Access::ReadWrite), ..plain.build(1) };
    let with = |image: SparseBytes| Case { image, ..odd.clone() };
    let data = Kind { store: Store::DataFile, ..plain }.build(1);
    assert_refused(&data, ErrorKind::Unsupported, "external data file");
    let stranger = plain.builder().extension(0x1234_5678, b"12345678").build().bytes;
    assert_refused(&with(stranger), ErrorKind::Unsupported, "0x12345678");
    let mut leaking = plain.builder().data(0, b"guest").refcount(6, 1).build().bytes;
    leaking.set_len(7 << 16);
    assert_refused(&with(leaking), ErrorKind::Corrupt, "1 leaks");
    let keeping = plain.builder().extension(0x6c61_6b6d, b"").build().bytes;
    assert_refused(&with(keeping), ErrorKind::InvalidRequest, "keep_mapping");
}
