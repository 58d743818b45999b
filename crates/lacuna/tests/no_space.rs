//! A host that has no space for one of its writes, whichever, and then has some again: the image that
//! is open goes on, with everything that was acknowledged.
//!
//! What a crash leaves beside such failures is tried in `proof/faults.rs`.

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Shrink, create};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{ErrorKind, Result};
use pollster::block_on;
use testkit::SparseBytes;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};

const CLUSTER: usize = 512;
const SIZE: usize = 64 * CLUSTER;

/// Something that takes space.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize, usize, u8),
    Compressed(usize, u8),
    Zeroes(usize, usize),
    Discard(usize, usize),
    Grow,
    Flush,
}

const SCRIPT: [Step; 12] = [
    Step::Write(0, 6 * CLUSTER, 1),
    Step::Flush,
    Step::Write(9 * CLUSTER + 7, 99, 2),
    Step::Compressed(20, 3),
    Step::Flush,
    Step::Zeroes(CLUSTER, CLUSTER),
    Step::Zeroes(2 * CLUSTER + 9, 30),
    Step::Grow,
    Step::Discard(4 * CLUSTER, CLUSTER),
    Step::Write(SIZE - 3 * CLUSTER, 3 * CLUSTER, 4),
    Step::Write(CLUSTER, 8 * CLUSTER, 5),
    Step::Flush,
];

fn open(storage: &SimStorage) -> Image<SimStorage> {
    let parts = Parts::alone(storage.clone());
    block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap()
}

fn perform(image: &Image<SimStorage>, step: Step) -> Result<()> {
    let range = |at, len| GuestRange::new(GuestOffset(at as u64), len as u64);
    block_on(async {
        match step {
            Step::Write(at, len, byte) => {
                let bytes = Buffer::from(&vec![byte; len][..]);
                image.write(GuestOffset(at as u64), bytes, WriteFlags::empty()).await.0
            }
            Step::Compressed(cluster, byte) => {
                let at = GuestOffset((cluster * CLUSTER) as u64);
                image.write_compressed(at, Buffer::from(&[byte; CLUSTER][..])).await.0
            }
            Step::Zeroes(at, len) => image.write_zeroes(range(at, len), ZeroFlags::empty()).await,
            Step::Discard(at, len) => image.discard(range(at, len), DiscardMode::Guest).await,
            Step::Grow => image.resize(2 * SIZE as u64, Shrink::Refuse).await,
            Step::Flush => image.flush().await,
        }
    })
}

fn expect(disk: &mut Vec<u8>, step: Step) {
    match step {
        Step::Write(at, len, byte) => disk[at..at + len].fill(byte),
        Step::Compressed(cluster, byte) => disk[cluster * CLUSTER..][..CLUSTER].fill(byte),
        Step::Zeroes(at, len) | Step::Discard(at, len) => disk[at..at + len].fill(0),
        Step::Grow => disk.resize(2 * SIZE, 0),
        Step::Flush => {}
    }
}

fn content(image: &Image<SimStorage>) -> Vec<u8> {
    let len = image.size_bytes() as usize;
    let (result, bytes) = block_on(image.read(GuestOffset(0), Buffer::new(len)));
    result.unwrap();
    bytes.to_vec()
}

/// Runs the script while the host fails; after a failure there is space again. Says whether the host
/// failed at all.
fn run(fault: Fault) -> bool {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = host.add_file(SparseBytes::default());
    let options = CreateOptions {
        size_bytes: SIZE as u64,
        cluster_bytes: CLUSTER as u64,
        ..CreateOptions::default()
    };
    block_on(create(&storage, &options)).unwrap();
    let (image, mut disk) = (open(&storage), vec![0; SIZE]);
    host.order(fault);
    for step in SCRIPT {
        if let Err(error) = perform(&image, step) {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{fault:?} {step:?}: {error}");
            assert!(error.to_string().contains("Simulated"), "it says what failed: {error}");
            host.heal();
            perform(&image, step).unwrap_or_else(|error| {
                panic!("{fault:?}: {step:?} fails though there is space again: {error}")
            });
        }
        expect(&mut disk, step);
        assert!(content(&image) == disk, "{fault:?}: after {step:?}");
    }
    let struck = host.struck();
    host.heal();
    block_on(image.close()).unwrap_or_else(|error| panic!("{fault:?}: closing: {error}"));
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{fault:?}: {report:?}");
    assert!(content(&open(&storage)) == disk, "{fault:?}: opened again");
    struck
}

#[test]
fn an_open_image_goes_on_when_there_is_space_again() {
    for kind in [OperationKind::Write, OperationKind::Zero, OperationKind::SetLen] {
        for times in [1, 2, usize::MAX] {
            for short in [false, true] {
                let order = |after| {
                    let fault = Fault { times, ..Fault::no_space(kind, after) };
                    if short { fault.short() } else { fault }
                };
                let failures = (0..).take_while(|after| run(order(*after))).count();
                assert!(failures > 0 || kind != OperationKind::Write, "no write failed");
            }
        }
    }
}
