//! Equal clusters of snapshots, and of what is shared already, are one afterwards: nothing reads otherwise,
//! stock goes on, through power cuts, dropped at awaits, among guests.

use std::collections::BTreeSet;

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{Dedup, DedupOptions, Deduped, Sharing};
use lacuna::qcow2::{Access, Image, OpenOptions, SnapshotChoice};
use lacuna::storage::Storage;
use lacuna::units::{GuestCluster, GuestOffset, GuestRange};
use testkit::foreign::{QEMU_IMG, qemu_img_check};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{DropPoint, Random, SparseBytes, seeds};

use crate::case::{Case, Kind, Store};
use crate::compacting::{assert_sound, by_qemu, img, refcounts, view};
use crate::drive::{assert_safe, is_dirty, own_check, perform, whole_content};
use crate::live_compacting::{adopt, change};
use crate::scene::Scene;

/// Different contents that clusters have.
const CONTENTS: u64 = 5;
/// States of each power cut.
const STATES: usize = 4;

async fn write_some<S: Storage>(image: &Image<S>, kind: &Kind, random: &mut Random, one_in: u64) {
    let cluster = kind.cluster_bytes();
    for index in 0..kind.size_bytes() / cluster {
        if !random.one_in(one_in) {
            continue;
        }
        let alike = GuestRange::new(GuestOffset(0), cluster);
        let bytes = testkit::content(1 + random.below(CONTENTS), alike);
        let buffer = Buffer::from(&bytes[..]);
        let start = GuestOffset(index * cluster);
        image.write(start, buffer, WriteFlags::empty()).await.0.unwrap();
    }
}

fn written(case: &Case, random: &mut Random, one_in: u64) -> Case {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        write_some(&image, &case.kind, random, one_in).await;
        image.close().await.unwrap();
    });
    case.with_content(vec![host.content(0)])
}

/// An image with two snapshots, few contents, and nothing of it shared but by them.
fn build(kind: &Kind, seed: u64) -> Case {
    let mut random = Random::new(seed);
    let options = OpenOptions::new(Access::ReadWrite);
    let mut case = Case { options, ..kind.build(seed | 1) };
    for (name, one_in) in [("one", 1), ("two", 2)] {
        case = written(&case, &mut random, one_in);
        case = by_qemu(&case, |path| img(path, &["snapshot", "-c", name, "@"]));
    }
    written(&case, &mut random, 3)
}

fn kinds() -> Vec<Kind> {
    let plain = Kind::plain(9);
    let more = [
        Kind { version: 2, ..plain },
        Kind { lazy: true, ..plain },
        Kind { refcount_order: 6, ..Kind::plain(12) },
        Kind { extended: true, store: Store::Zstd, ..Kind::plain(14) },
    ];
    std::iter::once(plain).chain(more).collect()
}

/// Steps of a few clusters.
async fn dedup<S: Storage>(image: &Image<S>, kind: &Kind) -> lacuna::Result<Deduped> {
    let slice_bytes = 16 * kind.cluster_bytes();
    let mut dedup = Dedup::new(image, DedupOptions { slice_bytes, ..DedupOptions::default() })?;
    while let Some(progress) = dedup.step().await? {
        assert!(progress.done_bytes <= progress.total_bytes, "{progress:?}");
    }
    Ok(dedup.so_far())
}

fn deduped(case: &Case) -> (Case, Deduped) {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let done = pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let done = dedup(&image, &case.kind).await.unwrap();
        image.close().await.unwrap();
        done
    });
    (case.with_content(vec![host.content(0)]), done)
}

/// Clusters that are in use.
fn used(case: &Case) -> u64 {
    refcounts(&case.image).iter().filter(|count| **count > 0).count() as u64
}

/// Counts how many contents whole clusters of the disk and of all snapshots have, zeros left out.
fn contents(case: &Case) -> u64 {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let mut seen = BTreeSet::new();
    let cluster = case.kind.cluster_bytes() as usize;
    let mut note = |content: &[u8]| {
        let whole = content.chunks(cluster).filter(|it| it.len() == cluster);
        seen.extend(whole.filter(|it| it.iter().any(|byte| *byte != 0)).map(<[u8]>::to_vec));
    };
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        note(&whole_content(&image).await.unwrap().to_vec());
        for snapshot in image.snapshots().await.unwrap().into_iter().filter(|it| !it.is_pin()) {
            let layer = image.snapshot(&SnapshotChoice::Id(snapshot.id)).await.unwrap();
            note(&whole_content(&layer).await.unwrap().to_vec());
        }
    });
    seen.len() as u64
}

fn keepers(case: &Case) -> u64 {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let facts = pollster::block_on(async {
        case.on(&host).open().await.unwrap().pin_facts().await.unwrap()
    });
    facts.map_or(0, |facts| facts.keepers)
}

#[test]
fn equal_clusters_of_disk_and_snapshots_are_one() {
    for kind in kinds() {
        for seed in seeds(2) {
            let story = format!("LACUNA_SEED={seed} {kind:?}");
            let case = build(&kind, seed);
            let mut before = pollster::block_on(view(&case)).unwrap();
            let (after, done) = deduped(&case);
            assert!(done.united > 0, "{story}: {done:?}");
            let freed = used(&case) as i64 - used(&after) as i64;
            assert!(freed > 0 || kind.size_bytes() < 30 * kind.cluster_bytes(), "{story}: {freed}");
            // Each content has one cluster, which is pinned.
            assert_eq!(keepers(&after), contents(&after), "{story}: {done:?}");
            let (again, more) = deduped(&after);
            assert_eq!((more.united, more.shared), (0, 0), "{story}: {more:?}");
            assert_eq!(used(&again), used(&after), "{story}");
            before.shown = pollster::block_on(view(&again)).unwrap().shown;
            assert_sound(&again, &before, &story);
        }
    }
}

/// Two keepers of one content, as a power cut or a full refcount leaves them.
fn twice(kind: &Kind) -> (Case, SparseBytes) {
    let cluster = kind.cluster_bytes();
    let case = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(1) };
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let guest = pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let bytes = testkit::content(1, GuestRange::new(GuestOffset(0), cluster));
        for index in 0..12 {
            let buffer = Buffer::from(&bytes[..]);
            let start = GuestOffset(index * cluster);
            image.write(start, buffer, WriteFlags::empty()).await.0.unwrap();
        }
        // Each group by itself: nobody compares them with each other.
        for group in [0..4, 4..8, 8..12] {
            let group = group.map(GuestCluster).collect();
            assert_eq!(image.share(&[group]).await.unwrap().keepers, 1);
        }
        let guest = whole_content(&image).await.unwrap();
        image.close().await.unwrap();
        guest
    });
    (case.with_content(vec![host.content(0)]), guest)
}

#[test]
fn keepers_with_equal_bytes_become_one_as_far_as_it_can_count() {
    // With 8 bits, three may share one: of each group one is left, and these share a fourth.
    let narrow = Kind { refcount_order: 3, ..Kind::plain(9) };
    for (kind, left, united) in [(Kind::plain(9), 1, 2), (narrow, 4, 0)] {
        let (case, guest) = twice(&kind);
        assert_eq!(keepers(&case), 3, "{kind:?}");
        let (after, done) = deduped(&case);
        assert_eq!((keepers(&after), done.united), (left, united), "{kind:?}: {done:?}");
        assert_eq!(used(&case) - used(&after), 2, "{kind:?}");
        crate::drive::assert_qemu_agrees(&after, &case.model_of(&guest), &format!("{kind:?}"));
    }
}

#[test]
fn what_would_not_pay_is_left_as_it_is() {
    let kind = Kind::plain(16);
    let case = build(&kind, 3);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let done = pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let sharing = Sharing::WhereItPays;
        let mut dedup = Dedup::new(&image, DedupOptions { sharing, ..DedupOptions::default() })?;
        while dedup.step().await?.is_some() {}
        image.close().await?;
        Ok::<_, lacuna::Error>(dedup.so_far())
    });
    let done = done.unwrap();
    let after = case.with_content(vec![host.content(0)]);
    match done.united + done.shared {
        0 => assert!(done.declined.saved_bytes > 0, "{done:?}"),
        _ => assert!(used(&after) < used(&case), "{done:?}"),
    }
}

/// A power cut leaves leaks; when stock has repaired those, nothing else is wrong.
#[test]
fn a_power_cut_while_clusters_become_one_leaves_leaks_at_worst() {
    let long = std::env::var_os("LACUNA_LONG").is_some();
    for kind in kinds() {
        let story = format!("{kind:?}");
        let case = build(&kind, 1);
        let before = pollster::block_on(view(&case)).unwrap();
        let host = SimHost::new(Pace::AtOnce, 1);
        pollster::block_on(async {
            let image = case.on(&host).open().await.unwrap();
            dedup(&image, &kind).await.unwrap();
            image.close().await.unwrap();
        });
        let (mut count, mut random) = (0, Random::new(1));
        for point in crash::points(&host) {
            if !long && !random.one_in(14) {
                continue;
            }
            for state in point.states(1, STATES) {
                count += 1;
                let left = case.with_content(state.files);
                if !is_dirty(&left) {
                    let safe = pollster::block_on(assert_safe(&left, false));
                    safe.unwrap_or_else(|error| panic!("{story}, {}: {error}", point.event));
                }
                let seen = pollster::block_on(view(&left)).unwrap();
                let differing = crate::compacting::differing(&seen, &before);
                assert!(differing.is_empty(), "{story}, after {}: {differing}", point.event);
                if count % 12 == 1 && !is_dirty(&left) {
                    assert_repaired(&left, &format!("{story}, after {}", point.event));
                }
            }
        }
        let least = if kind.cluster_bits == 9 { 30 } else { 5 };
        assert!(count > least, "{story}: only {count} states");
    }
}

fn assert_repaired(left: &Case, story: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = left.save(folder.path());
    QEMU_IMG.run_in(folder.path(), ["check", "-q", "-r", "leaks", path.to_str().unwrap()]);
    let found = qemu_img_check(&path);
    assert!(found.is_clean(), "{story}: after a repair: {}", found.text);
}

#[test]
fn it_may_be_dropped_at_any_await_and_leaks_nothing() {
    for kind in [Kind::plain(9), Kind { version: 2, ..Kind::plain(9) }] {
        let case = build(&kind, 1);
        let before = pollster::block_on(view(&case)).unwrap();
        for polls in (1..).step_by(41) {
            let mut scene = Scene::set(&case, 1, adopt);
            let image = scene.image.clone();
            let work = async move { dedup(&image, &kind).await };
            let task = scene.executor.spawn_until(DropPoint::AfterPoll(polls), work);
            scene.executor.settle().unwrap();
            let is_over = task.take().is_some();
            let image = scene.image.clone();
            scene.executor.block_on(async move { image.close().await }).unwrap();
            let after = case.with_content(vec![scene.host.content(0)]);
            let story = format!("{kind:?} dropped after poll {polls}");
            let report = pollster::block_on(own_check(&after));
            assert!(report.is_clean(), "{story}: {report:x?}");
            let seen = pollster::block_on(view(&after)).unwrap();
            assert!(crate::compacting::differing(&seen, &before).is_empty(), "{story}");
            if is_over {
                assert!(polls > 200, "{story}");
                break;
            }
        }
    }
}

/// What snapshots show stays as it was.
async fn look_on(image: Image<SimStorage>, wanted: &'static [(String, Vec<u8>)]) {
    for _ in 0..3 {
        for (name, content) in wanted {
            let choice = SnapshotChoice::Name(name.as_str().into());
            let layer = image.snapshot(&choice).await.unwrap();
            assert!(whole_content(&layer).await.unwrap().to_vec() == *content, "snapshot {name}");
        }
    }
}

#[test]
fn guests_write_and_snapshots_are_read_meanwhile() {
    for seed in seeds(6) {
        for (number, kind) in (0..).zip(kinds()) {
            let case = build(&kind, seed);
            let view = pollster::block_on(view(&case)).unwrap();
            let snapshots: &'static _ = Box::leak(view.snapshots.into_boxed_slice());
            let mut scene = Scene::set(&case, seed * 10 + number, adopt);
            let image = scene.image.clone();
            let sharing = scene.executor.spawn(async move { dedup(&image, &kind).await });
            let reading = scene.executor.spawn(look_on(scene.image.clone(), snapshots));
            let (mut random, mut changes) = (Random::new(seed), Vec::new());
            for place in 0..kind.size_bytes() / kind.cluster_bytes() {
                if !random.one_in(4) {
                    continue;
                }
                let operation = change(&mut random, &kind, place);
                let image = scene.image.clone();
                let run = async move { perform(&image, operation).await };
                changes.push((operation, scene.executor.spawn(run)));
                if random.one_in(3) {
                    scene.executor.run_for(200);
                }
            }
            scene.executor.settle().unwrap();
            let story = format!("LACUNA_SEED={seed} {kind:?}");
            sharing.take().unwrap().unwrap_or_else(|error| panic!("{story}: {error}"));
            reading.take().unwrap();
            for (operation, task) in changes {
                task.take().unwrap().unwrap();
                scene.model.apply(&operation);
            }
            let look = look_on(scene.image.clone(), snapshots);
            scene.executor.block_on(look);
            scene.judge(&case, &story);
        }
    }
}
