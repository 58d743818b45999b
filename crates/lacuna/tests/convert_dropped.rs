//! A conversion that ends half-way, dropped or failed, leaves a valid target that can be written
//! anew.

use std::sync::Arc;

use lacuna::ErrorKind;
use lacuna::job::{
    self, CompareOptions, ConvertOptions, Encoding, TargetContent, Threads, WriteOrder, compare,
};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::raw::Raw;
use testkit::foreign::qemu_img_check;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};
use testkit::{DropPoint, Executor, ImageBuilder, SparseBytes};

const SIZE: u64 = 5 << 20;

/// A host with a raw disk and an empty image, in that order.
fn host(seed: u64) -> SimHost {
    let host = SimHost::without_record(Pace::Executor, seed);
    let mut disk = SparseBytes::default();
    let data: Vec<u8> = (0..SIZE as u32).map(|index| (index / 700) as u8).collect();
    disk.write(0, &data[..3 << 20]);
    disk.write(4 << 20, &data[..70_000]);
    disk.set_len(SIZE);
    drop(host.add_file(disk));
    drop(host.add_file(ImageBuilder::new(3, 14, SIZE).build().bytes));
    host
}

fn executor(host: &SimHost, seed: u64) -> Executor<'static> {
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(host.clone()));
    executor
}

async fn source(host: &SimHost) -> Raw<SimStorage> {
    Raw::open(host.open_file(0)).await.unwrap()
}

async fn target(host: &SimHost) -> Image<SimStorage> {
    let options = OpenOptions::new(Access::ReadWrite);
    Image::open(Parts::alone(host.open_file(1)), options).await.unwrap()
}

async fn convert(
    host: &SimHost,
    image: &Image<SimStorage>,
    options: ConvertOptions,
) -> lacuna::Result<()> {
    job::convert(&source(host).await, image, &options, &mut |_| ()).await.map(drop)
}

/// The image as it lies on the host is sound, apart from leaks where it was not closed.
fn assert_valid(host: &SimHost, closed: bool, story: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    host.content(1).save(file.path());
    let check = qemu_img_check(file.path());
    let good = if closed { check.is_clean() } else { check.is_safe() };
    assert!(good, "{story}: {}", check.text);
}

/// A second conversion over whatever the first one left makes the target equal to the source.
fn assert_repeatable(host: &SimHost, closed: bool, options: ConvertOptions, story: &str) {
    let options = ConvertOptions { content: TargetContent::Unknown, ..options };
    let found = executor(host, 7).block_on(async {
        let image = target(host).await;
        convert(host, &image, options).await.unwrap();
        let plain = CompareOptions::default();
        let found = compare(&source(host).await, &image, plain, &mut |_, _| ()).await.unwrap();
        image.close().await.unwrap();
        found
    });
    assert!(found.is_identical(), "{story}: {found:?}");
    // Leaks of the first session stay until a repair.
    assert_valid(host, closed, story);
}

fn kinds() -> impl Iterator<Item = ConvertOptions> {
    let fresh = ConvertOptions { content: TargetContent::Zero, ..ConvertOptions::default() };
    [
        fresh,
        ConvertOptions { order: WriteOrder::Any, sparse_bytes: 65536, ..fresh },
        ConvertOptions {
            encoding: Encoding::Compressed,
            in_flight: 3,
            threads: Threads::Caller,
            ..fresh
        },
    ]
    .into_iter()
}

#[test]
fn a_conversion_dropped_anywhere_leaves_a_valid_target() {
    for (kind, options) in kinds().enumerate() {
        for polls in (1..16).chain((16..400).step_by(31)) {
            let (seed, story) = (polls as u64, format!("kind {kind}, dropped after {polls} polls"));
            let host = host(seed);
            let ended = {
                let mut executor = executor(&host, seed);
                let image = executor.block_on(target(&host));
                let (there, clone) = (host.clone(), image.clone());
                let copy = async move { convert(&there, &clone, options).await };
                let task = executor.spawn_until(DropPoint::AfterPoll(polls), copy);
                executor.settle().unwrap();
                let ended = task.take();
                // Half of the time nobody closes the image: as if the process had gone.
                if polls % 2 == 0 {
                    executor.block_on(image.close()).unwrap();
                }
                ended
            };
            assert_valid(&host, polls % 2 == 0, &story);
            assert_repeatable(&host, polls % 2 == 0, options, &story);
            if ended.is_some() {
                break;
            }
        }
    }
}

#[test]
fn a_conversion_that_runs_out_of_space_says_so_and_leaves_a_valid_target() {
    for (kind, options) in kinds().enumerate() {
        for after in [0, 1, 2, 5, 11, 60] {
            let story = format!("kind {kind}, no space after {after} writes");
            let host = host(after as u64);
            host.order(Fault::no_space(OperationKind::Write, after).forever());
            let result = executor(&host, 1).block_on(async {
                let image = target(&host).await;
                convert(&host, &image, options).await
            });
            if let Err(error) = result {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{story}: {error}");
            }
            host.heal();
            assert_valid(&host, false, &story);
            assert_repeatable(&host, false, options, &story);
        }
    }
}
