//! Points in time beside what is dropped, cut and full.

use lacuna::Result;
use lacuna::block::{DiscardMode, Layer, PointOptions, Points, WhenFull, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{CreateOptions, Image, Parts, Shrink};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use pollster::block_on;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{DropPoint, SparseBytes, content};

use super::{CLUSTER, SEEDS, kind, made, options, range, read, scene, write};

#[test]
fn a_point_outlives_a_write_at_the_end_of_a_disk_that_was_cut() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    block_on(async {
        let kind = CreateOptions { cluster_bytes: 16 << 10, ..kind(Version::V3, 64 << 10) };
        let storage = made(&host, &kind).await;
        let image = Image::open(Parts::alone(storage), options()).await.unwrap();
        let before = content(1, range(0, 64 << 10));
        write(&image, 0, &before).await.unwrap();
        let points = Points::new(image.clone());
        let target = Raw::create(MemoryStorage::new(), 64 << 10).await.unwrap();
        let now = async { Ok(()) };
        let (point, ()) = points.add(target, PointOptions::default(), now).await.unwrap();
        let cut_to = 28 << 10;
        let change = points.before_resize(cut_to).await;
        image.resize(cut_to, Shrink::Allow).await.unwrap();
        drop(change);
        write(&points, 16 << 10, &[9; 4096]).await.unwrap();
        assert!(read(&point, point.whole()).await.unwrap() == before);
    });
}

/// What is dropped on the way, through the disk that keeps points.
#[derive(Clone, Copy, Debug)]
enum Dropped {
    Write,
    ZeroPart,
    Compress,
    CompressPlain,
}

const PIECES: u64 = 6;

async fn change(
    points: &Points<Image<SimStorage>, Raw<MemoryStorage>>,
    image: &Image<SimStorage>,
    what: Dropped,
) -> Result<()> {
    let whole = range(0, PIECES * CLUSTER);
    match what {
        Dropped::Write => write(points, 0, &vec![9; whole.len as usize]).await,
        Dropped::ZeroPart => points.write_zeroes(range(512, 2048), ZeroFlags::empty()).await,
        Dropped::Compress | Dropped::CompressPlain => {
            let cluster = range(CLUSTER, CLUSTER);
            let mut bytes = match what {
                Dropped::Compress => Buffer::from(&[9; CLUSTER as usize][..]),
                _ => Buffer::from(&content(3, cluster)[..]),
            };
            let change = points.before_change(cluster).await;
            bytes.set_hold(change.hold());
            image.write_compressed(cluster.start, bytes).await.0
        }
    }
}

/// A write is of several pieces, and the driver may have any of them when it is dropped.
#[test]
fn a_point_waits_for_a_write_that_was_dropped_and_that_a_driver_has() {
    for what in [Dropped::Write, Dropped::ZeroPart, Dropped::Compress, Dropped::CompressPlain] {
        for (seed, polls) in (1..SEEDS).flat_map(|seed| (1..8).map(move |polls| (seed, polls))) {
            dropped_beside_a_point(what, seed, polls);
        }
    }
}

fn dropped_beside_a_point(what: Dropped, seed: u64, polls: usize) {
    let (host, mut executor) = scene(seed);
    let (image, points) = executor.block_on(async move {
        let storage = made(&host, &kind(Version::V3, PIECES * CLUSTER)).await;
        let image = Image::open(Parts::alone(storage), options()).await.unwrap();
        for cluster in (0..PIECES).rev() {
            write(&image, cluster * CLUSTER, &[1; CLUSTER as usize]).await.unwrap();
        }
        (image.clone(), Points::new(image))
    });
    let changing = points.clone();
    executor.spawn_until(DropPoint::AfterPoll(polls), async move {
        change(&changing, &image, what).await
    });
    let seen = executor.spawn(async move {
        let target = Raw::create(MemoryStorage::new(), PIECES * CLUSTER).await?;
        let now = async { Ok(()) };
        let (point, ()) = points.add(target, PointOptions::default(), now).await?;
        Ok::<_, lacuna::Error>((read(&point, point.whole()).await?, point))
    });
    executor.run().unwrap();
    let (first, point) = seen.take().unwrap().unwrap();
    let again = executor.block_on(async move { read(&point, point.whole()).await });
    assert!(first == again.unwrap(), "{what:?}, seed {seed}, dropped after {polls} polls");
}

/// What a raw disk asks of its storage, which may have it still when it is dropped.
#[derive(Clone, Copy, Debug)]
enum RawChange {
    Zero,
    Discard,
}

#[test]
fn a_point_of_a_raw_disk_waits_for_what_was_dropped_and_a_driver_has() {
    for what in [RawChange::Zero, RawChange::Discard] {
        for seed in 1..SEEDS {
            dropped_on_a_raw_disk(what, seed);
        }
    }
}

fn dropped_on_a_raw_disk(what: RawChange, seed: u64) {
    const SIZE: u64 = PIECES * CLUSTER;
    let (host, mut executor) = scene(seed);
    let points = executor.block_on(async move {
        let disk = Raw::create(host.add_file(SparseBytes::default()), SIZE).await.unwrap();
        write(&disk, 0, &[1; SIZE as usize]).await.unwrap();
        Points::new(disk)
    });
    let changing = points.clone();
    executor.spawn_until(DropPoint::AfterPoll(1), async move {
        match what {
            RawChange::Zero => changing.write_zeroes(range(0, SIZE), ZeroFlags::empty()).await,
            RawChange::Discard => changing.discard(range(0, SIZE), DiscardMode::Guest).await,
        }
    });
    let seen = executor.spawn(async move {
        let target = Raw::create(MemoryStorage::new(), SIZE).await?;
        let (point, ()) = points.add(target, PointOptions::default(), async { Ok(()) }).await?;
        Ok::<_, lacuna::Error>((read(&point, point.whole()).await?, point))
    });
    executor.run().unwrap();
    let (first, point) = seen.take().unwrap().unwrap();
    let again = executor.block_on(async move { read(&point, point.whole()).await });
    assert!(first == again.unwrap(), "{what:?}, seed {seed}");
}

#[test]
fn who_waits_for_space_of_a_point_goes_on_when_it_ends() {
    for seed in 1..SEEDS {
        let (host, mut executor) = scene(seed);
        let from = host.clone();
        let points = executor.block_on(async move {
            let storage = made(&from, &kind(Version::V3, 8 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage), options()).await.unwrap();
            write(&image, 0, &content(1, range(0, 8 * CLUSTER))).await.unwrap();
            Points::new(image)
        });
        let adding = points.clone();
        let point = executor.block_on(async move {
            let target = Raw::create(MemoryStorage::new(), 8 * CLUSTER).await?;
            let options = PointOptions { space_bytes: 0, when_full: WhenFull::Wait };
            adding.add(target, options, async { Ok(()) }).await.map(|(point, ())| point)
        });
        let point = point.unwrap();
        let written = executor.spawn(async move { write(&points, 512, &[9; 512]).await });
        let ended = executor.spawn(async move {
            let looked = read(&point, range(0, CLUSTER)).await;
            point.end();
            looked
        });
        executor.run().unwrap();
        written.take().unwrap().unwrap();
        ended.take().unwrap().unwrap();
    }
}
