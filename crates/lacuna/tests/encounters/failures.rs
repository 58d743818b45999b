//! Flushes that fail, and changes of the header that are dropped or fail half-way.

use std::sync::Arc;

use lacuna::block::{Layer, ZeroFlags};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{BackingName, CreateOptions, Image, NewBitmap, Parts, SharedZeroCluster};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use pollster::block_on;
use testkit::DropPoint;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage, crash};

use super::{
    CLUSTER, SEEDS, kind, made, open_overlay, options, range, scene, small_overlay, write,
};

/// Whatever the flush was for, what was acknowledged before may be lost with it.
#[test]
fn nothing_is_acknowledged_after_a_flush_that_failed() {
    let mut struck = 0;
    for after in 0..6 {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let storage = small_overlay(&host, 40).await;
            let image = open_overlay(&storage, 60, SharedZeroCluster::On).await;
            write(&image, 0, &[1; 512]).await.unwrap();
            host.order(Fault::io(OperationKind::Flush, after));
            // The hint of the shared cluster, its pins, and the flush of all.
            let _failed = image.write_zeroes(range(512, 512), ZeroFlags::MAY_UNMAP).await;
            struck += u64::from(host.struck());
            assert_eq!(image.flush().await.is_err(), host.struck(), "{after}");
        });
        let host = SimHost::without_record(Pace::AtOnce, 1);
        block_on(async {
            let storage = made(&host, &kind(Version::V3, 8 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage.clone()), options()).await.unwrap();
            image.add_bitmap(&NewBitmap::new("changed")).await.unwrap();
            image.close().await.unwrap();
            let image = Image::open(Parts::alone(storage), options()).await.unwrap();
            host.order(Fault::io(OperationKind::Flush, after));
            // Intents begin, and the mark of use.
            let _failed = write(&image, 0, &[1; 512]).await;
            struck += u64::from(host.struck());
            assert_eq!(image.flush().await.is_err(), host.struck(), "{after}");
        });
    }
    assert!(struck > 6, "{struck}");
}

/// The header that tells of intents is durable before the mark of use is written, also where a write that
/// was dropped had changed it.
#[test]
fn bitmaps_survive_a_power_cut_after_the_first_write_was_dropped() {
    for (seed, polls) in (1..SEEDS).flat_map(|seed| (1..12).map(move |polls| (seed, polls))) {
        let (host, mut executor) = scene(seed);
        let from = host.clone();
        let image = executor.block_on(async move {
            let storage = made(&from, &kind(Version::V3, 8 * CLUSTER)).await;
            let image = Image::open(Parts::alone(storage.clone()), options()).await.unwrap();
            image.add_bitmap(&NewBitmap::new("changed")).await.unwrap();
            image.close().await.unwrap();
            from.start_record();
            Image::open(Parts::alone(storage), options()).await.unwrap()
        });
        let given_up = image.clone();
        executor.spawn_until(DropPoint::AfterPoll(polls), async move {
            write(&given_up, 0, &[1; 512]).await
        });
        let written = executor.spawn(async move { write(&image, CLUSTER, &[2; 512]).await });
        executor.run().unwrap();
        written.take().unwrap().unwrap();
        for moment in crash::points(&host) {
            for state in moment.states(seed, 4) {
                let storage =
                    SimHost::without_record(Pace::AtOnce, 1).add_file(state.files[0].clone());
                block_on(async {
                    let image = Image::open(Parts::alone(storage), options()).await.unwrap();
                    let bitmap = image.bitmap(&"changed".into()).await;
                    assert!(bitmap.is_ok(), "{seed}, {polls}, {:?}", state.survivors);
                });
            }
        }
    }
}

/// Each try that fails leaves a copy of the name somewhere in the first cluster.
#[test]
fn an_image_keeps_its_backing_file_while_its_header_cannot_be_written() {
    let name = "below".repeat(60);
    for seed in 1..SEEDS {
        let host = SimHost::without_record(Pace::AtOnce, seed);
        block_on(async {
            let backing = Some(BackingName { name: name.clone(), format: Some("raw".into()) });
            let kind = CreateOptions { backing, ..kind(Version::V3, 8 * CLUSTER) };
            let storage = made(&host, &kind).await;
            let image = open_over_zeros(&storage).await;
            image.add_bitmap(&NewBitmap::new("changed")).await.unwrap();
            image.close().await.unwrap();
            let image = open_over_zeros(&storage).await;
            host.order(Fault::io(OperationKind::Write, 0).short().forever());
            for _ in 0..20 {
                write(&image, 0, &[1; 512]).await.unwrap_err();
            }
            drop(image);
            host.heal();
            let header = open_over_zeros(&storage).await.header();
            assert_eq!(header.backing_name, Some(name.as_str().into()), "{seed}");
        });
    }
}

async fn open_over_zeros(storage: &SimStorage) -> Image<SimStorage> {
    let below = Raw::create(MemoryStorage::new(), 8 * CLUSTER).await.unwrap();
    let parts = Parts { storage: storage.clone(), data: None, backing: Some(Arc::new(below)) };
    Image::open(parts, options()).await.unwrap()
}
