//! Requests that meet a change of the size, the end of a point, or each other: what simulation found.

mod failures;
mod points;

use std::sync::Arc;

use lacuna::block::{DynLayer, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{Dedup, DedupOptions, sweep};
use lacuna::qcow2::check::{CheckOptions, CheckReport, check};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{
    Access, AmendOptions, BackingName, CreateOptions, DataFileName, DiscardPolicy, Image,
    NewBitmap, OnDiscard, OpenOptions, Parts, SharedZeroCluster, Shrink, create,
};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{ErrorKind, Result};
use pollster::block_on;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};
use testkit::{DropPoint, Executor, SparseBytes, content};

const CLUSTER: u64 = 4096;
const SEEDS: u64 = 60;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

fn options() -> OpenOptions {
    OpenOptions::new(Access::ReadWrite)
}

fn kind(version: Version, size_bytes: u64) -> CreateOptions {
    CreateOptions { version, size_bytes, cluster_bytes: CLUSTER, ..CreateOptions::default() }
}

/// A host whose calls end in an order that the seed decides, and who polls what waits for them.
fn scene(seed: u64) -> (SimHost, Executor<'static>) {
    let host = SimHost::new(Pace::Executor, seed);
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(host.clone()));
    (host, executor)
}

/// Makes an image in a file of a host.
async fn made(host: &SimHost, kind: &CreateOptions) -> SimStorage {
    let storage = host.add_file(SparseBytes::default());
    create(&storage, kind).await.unwrap();
    storage
}

async fn write(disk: &impl Layer, start: u64, bytes: &[u8]) -> Result<()> {
    disk.write(GuestOffset(start), Buffer::from(bytes), WriteFlags::empty()).await.0
}

async fn read(disk: &impl Layer, range: GuestRange) -> Result<Vec<u8>> {
    let (result, bytes) = disk.read(range.start, Buffer::new(range.len as usize)).await;
    result.map(|()| bytes.to_vec())
}

fn checked(file: SparseBytes) -> CheckReport {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file);
    block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap()
}

fn assert_clean(host: &SimHost) {
    let report = checked(host.content(0));
    let wrong = report.corruptions + report.check_errors + report.leaks;
    assert_eq!(wrong, 0, "{report:?}");
}

// ---- zeroing -------------------------------------------------------------------------------

#[test]
fn zeroing_that_would_not_be_fast_changes_nothing() {
    for version in [Version::V2, Version::V3] {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let storage = made(&host, &kind(version, 8 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage), options()).await.unwrap();
            let bytes = content(1, range(0, 8 * CLUSTER));
            write(&image, 0, &bytes).await.unwrap();
            for (start, len) in [(0, 2 * CLUSTER + 512), (512, 3 * CLUSTER), (CLUSTER - 1, 2)] {
                for extra in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP, ZeroFlags::THOROUGH] {
                    let flags = ZeroFlags::FAST | extra;
                    let error = image.write_zeroes(range(start, len), flags).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert!(
                        read(&image, image.whole()).await.unwrap() == bytes,
                        "{start:#x} {len:#x}"
                    );
                }
            }
            // What needs no bytes is done.
            let flags = ZeroFlags::FAST | ZeroFlags::MAY_UNMAP;
            image.write_zeroes(range(CLUSTER, 2 * CLUSTER), flags).await.unwrap();
            let seen = read(&image, range(CLUSTER, 2 * CLUSTER)).await.unwrap();
            assert!(seen.iter().all(|byte| *byte == 0));
            image.close().await.unwrap();
        });
        assert_clean(&host);
    }
}

#[test]
fn a_raw_data_file_is_what_the_disk_is_after_discards_whatever_the_policy() {
    for request in [true, false] {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let data_file = Some(DataFileName { name: "data".into(), raw: true });
            let kind = CreateOptions { data_file, ..kind(Version::V3, 8 * CLUSTER) };
            let storage = made(&host, &kind).await;
            let data = host.add_file(SparseBytes::default());
            let parts = Parts { storage, data: Some(data), backing: None };
            let policy = DiscardPolicy { request, ..DiscardPolicy::default() };
            let image = Image::open(parts, options().discard(policy)).await.unwrap();
            write(&image, 0, &content(1, range(0, 8 * CLUSTER))).await.unwrap();
            image
                .discard(range(CLUSTER, 3 * CLUSTER), lacuna::block::DiscardMode::Guest)
                .await
                .unwrap();
            let seen = read(&image, image.whole()).await.unwrap();
            assert!(seen == host.content(1).read_vec(0, 8 * CLUSTER as usize), "{request}");
            assert_eq!(seen[CLUSTER as usize..][..512].iter().all(|byte| *byte == 0), request);
            image.close().await.unwrap();
        });
    }
}

// ---- opening and emptying ------------------------------------------------------------------

#[test]
fn an_image_of_version_2_that_is_only_read_does_not_mind_that_others_keep_places() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    block_on(async {
        let storage = made(&host, &kind(Version::V2, CLUSTER)).await;
        let keeps = |access| OpenOptions::new(access).on_discard(OnDiscard::KeepMapping);
        let open = |access| Image::open(Parts::alone(storage.clone()), keeps(access));
        open(Access::ReadOnly).await.unwrap();
        assert_eq!(open(Access::ReadWrite).await.unwrap_err().kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn emptying_leaves_no_state_of_a_machine_and_no_leak_of_it() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    block_on(async {
        let storage = made(&host, &kind(Version::V3, 8 * CLUSTER)).await;
        let image = Image::open(Parts::alone(storage), options()).await.unwrap();
        write(&image, 0, &[7; 512]).await.unwrap();
        image.write_vm_state(0, Buffer::from(&[8; 9000][..])).await.0.unwrap();
        image.make_empty().await.unwrap();
        image.close().await.unwrap();
    });
    assert_clean(&host);
}

#[test]
fn another_backing_file_takes_claims_about_zeros_off_and_leaves_bitmaps() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    block_on(async {
        let kind = CreateOptions { zero_claims: true, ..kind(Version::V3, 8 * CLUSTER) };
        let storage = made(&host, &kind).await;
        let image = Image::open(Parts::alone(storage.clone()), options()).await.unwrap();
        image.add_bitmap(&NewBitmap::new("changed")).await.unwrap();
        assert!(image.known_zeroes().await.unwrap().open);
        let base = BackingName { name: "below".into(), format: Some("raw".into()) };
        image.close_onto(Some(base)).await.unwrap();
        let below: Arc<dyn DynLayer> =
            Arc::new(Raw::open(MemoryStorage::from(&[5; 512][..])).await.unwrap());
        let parts = Parts { storage, data: None, backing: Some(below) };
        let image = Image::open(parts, OpenOptions::new(Access::ReadOnly)).await.unwrap();
        assert!(!image.known_zeroes().await.unwrap().open);
        image.bitmap(&"changed".into()).await.unwrap();
    });
}

// ---- writing back --------------------------------------------------------------------------

/// What is written to tables that are new, after a flush or a growth that was dropped at a poll; a power
/// cut at any moment of it.
fn left_after_a_drop(seed: u64, drop_point: DropPoint, grows: bool) {
    const SMALL: u64 = 512;
    let (host, mut executor) = scene(seed);
    let kind = CreateOptions { cluster_bytes: SMALL, ..kind(Version::V3, 200 * SMALL) };
    let from = host.clone();
    let image = executor.block_on(async move {
        let image = Image::open(Parts::alone(made(&from, &kind).await), options()).await.unwrap();
        from.start_record();
        write(&image, 0, &[1; SMALL as usize]).await.unwrap();
        image
    });
    let given_up = image.clone();
    executor.spawn_until(drop_point, async move {
        match grows {
            true => given_up.resize(9000 * SMALL, Shrink::Refuse).await,
            false => given_up.flush().await,
        }
    });
    executor.run().unwrap();
    executor.block_on(async move {
        // In the table that is there, and in one of its own.
        write(&image, 3 * SMALL, &[2; SMALL as usize]).await.unwrap();
        write(&image, 150 * SMALL, &[3; SMALL as usize]).await.unwrap();
        image.close().await.unwrap();
    });
    for crash in testkit::sim::crash::points(&host) {
        for state in crash.states(seed, 20) {
            let report = checked(state.files[0].clone());
            let wrong = report.corruptions + report.check_errors;
            assert_eq!(wrong, 0, "{drop_point:?} {:?}: {report:?}", state.survivors);
        }
    }
}

#[test]
fn tables_that_a_dropped_write_back_named_are_new_no_longer() {
    for seed in 1..4 {
        for polls in 1..16 {
            left_after_a_drop(seed, DropPoint::AfterPoll(polls), false);
            left_after_a_drop(seed, DropPoint::AfterPoll(polls), true);
        }
    }
}

// ---- the size ------------------------------------------------------------------------------

/// Clusters of version 2 over a backing file, which needs bytes or references for zeros.
async fn small_overlay(host: &SimHost, clusters: u64) -> SimStorage {
    let backing = Some(BackingName { name: "below".into(), format: Some("raw".into()) });
    made(host, &CreateOptions { cluster_bytes: 512, backing, ..kind(Version::V2, clusters * 512) })
        .await
}

/// Opens one over as many clusters of content.
async fn open_overlay(
    storage: &SimStorage,
    clusters: usize,
    shared_zero: SharedZeroCluster,
) -> Image<SimStorage> {
    let below = MemoryStorage::from(&vec![5; clusters * 512][..]);
    let below: Arc<dyn DynLayer> = Arc::new(Raw::open(below).await.unwrap());
    let parts = Parts { storage: storage.clone(), data: None, backing: Some(below) };
    Image::open(parts, options().shared_zero_cluster(shared_zero)).await.unwrap()
}

/// Gives the disk another size after so many reads.
async fn resize_after(image: &Image<SimStorage>, reads: u64, size_bytes: u64) -> Result<()> {
    for _ in 0..reads {
        read(image, range(0, 512)).await?;
    }
    image.resize(size_bytes, Shrink::Allow).await
}

#[test]
fn zeros_that_come_to_be_shared_while_the_disk_grows_stay_pinned() {
    for seed in 1..SEEDS {
        let (host, mut executor) = scene(seed);
        // One table of 64 entries, and growth into the next.
        let from = host.clone();
        let image = executor.block_on(async move {
            let storage = small_overlay(&from, 40).await;
            open_overlay(&storage, 30, SharedZeroCluster::On).await
        });
        let (zeroing, growing) = (image.clone(), image.clone());
        let zeroed = executor.spawn(async move {
            zeroing.write_zeroes(range(512, 512), ZeroFlags::MAY_UNMAP).await
        });
        let grown = executor.spawn(async move { growing.resize(90 * 512, Shrink::Refuse).await });
        executor.run().unwrap();
        zeroed.take().unwrap().unwrap();
        grown.take().unwrap().unwrap();
        executor.block_on(async move {
            write(&image, 512, &[1; 512]).await.unwrap();
            image.close().await.unwrap();
        });
        assert_clean(&host);
    }
}

#[test]
fn what_a_growth_without_space_left_behind_the_disk_is_given_up_with_it() {
    let mut failures = 0;
    for (after, is_emptied) in (0..40).flat_map(|after| [(after, true), (after, false)]) {
        for shared_zero in [SharedZeroCluster::Off, SharedZeroCluster::On] {
            let host = SimHost::without_record(Pace::AtOnce, 1);
            block_on(async {
                let storage = small_overlay(&host, 40).await;
                let image = open_overlay(&storage, 60, shared_zero).await;
                host.order(Fault::no_space(OperationKind::Write, after).forever());
                failures += u64::from(image.resize(55 * 512, Shrink::Refuse).await.is_err());
                host.heal();
                match is_emptied {
                    true => image.make_empty().await.unwrap(),
                    false => image.resize(20 * 512, Shrink::Allow).await.unwrap(),
                }
                image.close().await.unwrap();
            });
            assert_clean(&host);
        }
    }
    assert!(failures > 20, "{failures} failed");
}

/// A write of the pins, or of what names them, fails; and nobody closes the image.
#[test]
fn pins_that_a_run_without_end_made_are_known_to_the_next() {
    for (after, again) in (0..20).flat_map(|after| [(after, true), (after, false)]) {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let storage = small_overlay(&host, 40).await;
            let image = open_overlay(&storage, 60, SharedZeroCluster::On).await;
            host.order(Fault::no_space(OperationKind::Write, after));
            let one = || image.write_zeroes(range(512, 512), ZeroFlags::MAY_UNMAP);
            let zeroed = one().await;
            if again && zeroed.is_err() {
                one().await.unwrap();
            }
            let _failed = image.flush().await;
            drop(image);
            host.heal();
            let image = open_overlay(&storage, 60, SharedZeroCluster::AsRemembered).await;
            image.resize(20 * 512, Shrink::Allow).await.unwrap();
            image.close().await.unwrap();
        });
        let report = checked(host.content(0));
        assert_eq!(report.corruptions + report.check_errors, 0, "{after}, {again}: {report:?}");
    }
}

#[test]
fn pins_stay_pins_in_an_image_that_becomes_version_3() {
    for size in [20 * 512, 90 * 512] {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let storage = small_overlay(&host, 40).await;
            let image = open_overlay(&storage, 60, SharedZeroCluster::On).await;
            image.write_zeroes(range(512, 512), ZeroFlags::MAY_UNMAP).await.unwrap();
            let newer = AmendOptions { version: Some(Version::V3), ..AmendOptions::default() };
            image.amend(&newer, &mut |_, _| ()).await.unwrap();
            let image = open_overlay(&storage, 60, SharedZeroCluster::AsRemembered).await;
            let extents = image.extents(range(512, 512)).await.unwrap();
            assert!(extents[0].status.reads_zero, "{extents:?}");
            image.resize(size, Shrink::Allow).await.unwrap();
            image.close().await.unwrap();
        });
        assert_clean(&host);
    }
}

#[test]
fn zeros_are_swept_on_a_disk_that_gets_smaller() {
    for seed in 1..SEEDS {
        let (host, mut executor) = scene(seed);
        let from = host.clone();
        let image = executor.block_on(async move {
            let storage = made(&from, &kind(Version::V3, 32 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage), options()).await.unwrap();
            write(&image, 0, &[0; 32 * CLUSTER as usize]).await.unwrap();
            image
        });
        let (sweeping, cutting) = (image.clone(), image.clone());
        let swept = executor.spawn(async move { sweep(&sweeping, &mut |_| {}).await });
        let cut = executor.spawn(async move { cutting.resize(5 * CLUSTER, Shrink::Allow).await });
        executor.run().unwrap();
        swept.take().unwrap().unwrap();
        cut.take().unwrap().unwrap();
        executor.block_on(async move { image.close().await }).unwrap();
        assert_clean(&host);
    }
}

/// Growth ends the state of a machine, which lies behind the disk. A table that was just made for pins, and
/// had none yet, was taken for that, and the pins for some of its clusters: the shared cluster was left
/// with a reference that has no copied flag, and none besides.
#[test]
fn a_table_that_is_made_for_pins_is_no_state_of_a_machine() {
    for seed in 1..5 * SEEDS {
        let (host, mut executor) = scene(seed);
        let from = host.clone();
        let image = executor.block_on(async move {
            let storage = small_overlay(&from, 40).await;
            open_overlay(&storage, 30, SharedZeroCluster::On).await
        });
        let (zeroing, resizing) = (image.clone(), image.clone());
        let zeroed = executor.spawn(async move {
            zeroing.write_zeroes(range(512, 512), ZeroFlags::MAY_UNMAP).await
        });
        let clusters = if seed % 2 == 0 { 44 } else { 36 };
        // While the cluster is being made.
        let resized =
            executor.spawn(async move { resize_after(&resizing, seed % 20, clusters * 512).await });
        executor.run().unwrap();
        zeroed.take().unwrap().unwrap();
        resized.take().unwrap().unwrap();
        executor.block_on(async move { image.close().await }).unwrap();
        assert_clean(&host);
    }
}

#[test]
fn equal_clusters_are_looked_for_on_a_disk_that_gets_smaller() {
    for seed in 1..SEEDS {
        let (host, mut executor) = scene(seed);
        let from = host.clone();
        let image = executor.block_on(async move {
            let storage = made(&from, &kind(Version::V3, 32 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage), options()).await.unwrap();
            for index in 0..32 {
                write(&image, index * CLUSTER, &[index as u8 % 3 + 1; CLUSTER as usize])
                    .await
                    .unwrap();
            }
            image.flush().await.unwrap();
            image
        });
        let (sharing, cutting) = (image.clone(), image.clone());
        let shared = executor.spawn(async move {
            let mut dedup = Dedup::new(&sharing, DedupOptions::default())?;
            while dedup.step().await?.is_some() {}
            Ok::<_, lacuna::Error>(())
        });
        // On odd seeds within a cluster.
        let size_bytes = 5 * CLUSTER + 512 * (seed % 2);
        // While clusters are found, compared, or shared.
        let cut = executor.spawn(async move { resize_after(&cutting, seed, size_bytes).await });
        executor.run().unwrap();
        shared.take().unwrap().unwrap();
        cut.take().unwrap().unwrap();
        executor.block_on(async move { image.close().await }).unwrap();
        assert_clean(&host);
    }
}
