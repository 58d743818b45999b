//! Zero detection under a seeded executor and under power cuts.

use std::sync::Arc;

use lacuna::block::{DetectZeroes, Layer, WriteFlags, ZeroDetection};
use lacuna::buffer::Buffer;
use lacuna::qcow2::Image;
use lacuna::units::GuestOffset;
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{Executor, seeds};

use crate::case::Kind;

type Detecting = DetectZeroes<Image<SimStorage>>;

async fn write(layer: &Detecting, at: u64, bytes: &[u8], flags: WriteFlags) {
    layer.write(GuestOffset(at), Buffer::from(bytes), flags).await.0.unwrap();
}

async fn read(layer: &Detecting, at: u64, len: usize) -> Vec<u8> {
    let (result, bytes) = layer.read(GuestOffset(at), Buffer::new(len)).await;
    result.unwrap();
    bytes.to_vec()
}

/// 004-5b: while one looks whether the rest of a cluster is zeros, another writes there.
#[test]
fn thorough_detection_never_loses_the_bytes_of_a_writer_beside_it() {
    for seed in seeds(12) {
        for kind in [Kind::plain(12), Kind { extended: true, ..Kind::plain(16) }] {
            let (host, mut executor) =
                (SimHost::without_record(Pace::Executor, seed), Executor::new(seed));
            executor.attach(Arc::new(host.clone()));
            let files = kind.build(seed).on(&host);
            let image = executor.block_on(async move { files.open().await }).unwrap();
            let layer = DetectZeroes::new(image, ZeroDetection::Thorough);
            let zeros = layer.clone();
            executor.spawn(async move {
                for _ in 0..40 {
                    write(&zeros, 0, &[0; 1024], WriteFlags::empty()).await;
                }
            });
            executor.spawn(async move {
                for round in 0..40 {
                    // Every other round all of the unit becomes zeros, and may be freed.
                    let byte = if round % 2 == 0 { round + 1 } else { 0 };
                    write(&layer, 1024, &[byte; 1024], WriteFlags::empty()).await;
                    let seen = read(&layer, 1024, 1024).await;
                    assert!(seen.iter().all(|it| *it == byte), "round {round}");
                }
            });
            executor.run().unwrap_or_else(|stalled| panic!("{stalled}"));
        }
    }
}

#[test]
fn what_detection_tears_apart_is_durable_when_a_write_with_fua_returns() {
    for level in [ZeroDetection::On, ZeroDetection::Unmap, ZeroDetection::Thorough] {
        for kind in [Kind::plain(12), Kind { version: 2, ..Kind::plain(12) }] {
            let case = kind.build(2);
            let host = SimHost::new(Pace::AtOnce, 1);
            let files = case.on(&host);
            // Zeros, data, zeros, data, the ends in the midst of clusters.
            let mut bytes = vec![0; 5 * 4096];
            bytes[3000..6000].fill(7);
            bytes[18000..].fill(9);
            let run = async {
                let layer = DetectZeroes::new(files.open().await.unwrap(), level);
                write(&layer, 2048, &[5; 24 << 10], WriteFlags::FUA).await;
                write(&layer, 4196, &bytes, WriteFlags::FUA).await;
                // The process ends here, and the power with it.
                host.mark(1);
            };
            pollster::block_on(run);
            for point in crash::points(&host).iter().filter(|point| point.mark == Some(1)) {
                for state in point.states(1, 8) {
                    let after = case.with_content(state.files);
                    let storage = SimHost::without_record(Pace::AtOnce, 1);
                    let files = after.on(&storage);
                    let seen = pollster::block_on(async {
                        let layer = DetectZeroes::new(files.open().await.unwrap(), level);
                        read(&layer, 4196, bytes.len()).await
                    });
                    assert!(seen == bytes, "{level:?}, {kind:?}");
                }
            }
        }
    }
}
