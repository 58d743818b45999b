//! No crash and no failing host leaves a claim of zeros over data (A.1.2), whatever the event.

use lacuna::block::{DiscardMode, Layer, Preallocation, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Shrink, create};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::SparseBytes;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage, crash};

const CLUSTER: u64 = 4096;
/// The byte of the header that holds the claims.
const CLAIMS_AT: u64 = 95;

/// Something that happens to an image.
#[derive(Clone, Copy, Debug)]
enum Event {
    Compressed,
    Discard,
    Grow(Preallocation),
    MakeZero,
    Reopen,
    Shrink,
    Write(u64, usize),
    Zero(ZeroFlags),
}

const EVENTS: [Event; 10] = [
    Event::Write(0, 512),
    Event::Write(CLUSTER - 100, 3 * CLUSTER as usize),
    Event::Compressed,
    Event::Zero(ZeroFlags::empty()),
    Event::Zero(ZeroFlags::MAY_UNMAP),
    Event::Discard,
    Event::Grow(Preallocation::Off),
    Event::Grow(Preallocation::Full),
    Event::Shrink,
    Event::Reopen,
];

/// A new image that may claim, on a host of its own.
fn claiming(preallocation: Preallocation) -> SimHost {
    let host = SimHost::new(Pace::AtOnce, 1);
    let storage = host.add_file(SparseBytes::default());
    let options = CreateOptions {
        size_bytes: 24 * CLUSTER,
        cluster_bytes: CLUSTER,
        zero_claims: true,
        preallocation,
        ..CreateOptions::default()
    };
    block_on(create(&storage, &options)).unwrap();
    host.start_record();
    host
}

async fn open(storage: SimStorage, access: Access) -> lacuna::Result<Image<SimStorage>> {
    Image::open(Parts::alone(storage), OpenOptions::new(access)).await
}

async fn happen(image: Image<SimStorage>, event: Event) -> lacuna::Result<Image<SimStorage>> {
    let range = GuestRange::new(GuestOffset(CLUSTER), 4 * CLUSTER);
    let data = |len| Buffer::from(&vec![7; len][..]);
    match event {
        Event::Compressed => {
            image.write_compressed(range.start, data(CLUSTER as usize)).await.0?;
        }
        Event::Discard => image.discard(range, DiscardMode::Guest).await?,
        Event::Grow(mode) => image.grow(image.size_bytes() + 9 * CLUSTER, mode).await?,
        Event::MakeZero => image.make_zero().await?,
        Event::Reopen => {
            let storage = image.storage().clone();
            image.close().await?;
            return open(storage, Access::ReadWrite).await;
        }
        Event::Shrink => image.resize(image.size_bytes() - CLUSTER, Shrink::Allow).await?,
        Event::Write(at, len) => {
            image.write(GuestOffset(at), data(len), WriteFlags::empty()).await.0?;
        }
        Event::Zero(flags) => image.write_zeroes(range, flags).await?,
    }
    Ok(image)
}

/// Asserts that every claim is true in whatever a power cut at any moment leaves; returns in how many
/// of the states something was claimed.
fn assert_no_lie(host: &SimHost, story: &str) -> usize {
    let mut claimed = 0;
    for point in crash::points(host) {
        for state in point.states(1, 12) {
            let story = || format!("{story}, after event {}: {:?}", point.event, state.survivors);
            let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(state.files[0].clone());
            let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
            assert_eq!(report.corruptions, 0, "{}: {report:?}", story());
            let image = block_on(open(storage, Access::ReadOnly)).unwrap();
            if block_on(image.known_zeroes()).unwrap().open {
                claimed += 1;
                let whole = Buffer::new(image.size_bytes() as usize);
                let (result, bytes) = block_on(image.read(GuestOffset(0), whole));
                result.unwrap();
                assert!(bytes.iter().all(|byte| *byte == 0), "{}", story());
                let extents = block_on(image.extents(image.whole())).unwrap();
                assert!(extents.iter().all(|it| it.status.reads_zero), "{}", story());
            }
        }
    }
    claimed
}

#[test]
fn no_power_cut_leaves_a_claim_of_zeros_over_data() {
    for preallocation in [Preallocation::Off, Preallocation::Metadata] {
        for event in EVENTS {
            let host = claiming(preallocation);
            let run = async {
                let mut image = open(host.open_file(0), Access::ReadWrite).await?;
                // What follows claims again, and is changed once more.
                for event in [event, Event::Write(0, 512), Event::MakeZero, event] {
                    image = happen(image, event).await?;
                }
                image.close().await
            };
            block_on(run).unwrap();
            let story = format!("{event:?} on {preallocation:?}");
            let claimed = assert_no_lie(&host, &story);
            // Those before the first event among them.
            assert!(claimed > 2, "{story}: only {claimed} states claimed anything");
        }
    }
}

/// The write must not be acknowledged where the claim could not be taken off.
#[test]
fn a_write_fails_where_the_claim_cannot_be_taken_off() {
    for kind in [OperationKind::Write, OperationKind::Flush] {
        for event in [Event::Write(0, 512), Event::Compressed] {
            let host = claiming(Preallocation::Metadata);
            let image = block_on(open(host.open_file(0), Access::ReadWrite)).unwrap();
            host.order(Fault::io(kind, 0).forever());
            let failed = block_on(happen(image, event));
            assert!(host.struck() && failed.is_err(), "{event:?}, {kind:?}");
            host.heal();
            assert_no_lie(&host, &format!("{event:?} while each {kind:?} fails"));
        }
    }
}

#[test]
fn an_image_opened_for_reading_believes_its_claims_and_keeps_them() {
    let host = claiming(Preallocation::Full);
    let image = block_on(open(host.open_file(0), Access::ReadOnly)).unwrap();
    assert!(block_on(image.known_zeroes()).unwrap().open);
    block_on(image.close()).unwrap();
    assert_eq!(host.content(0).read_vec(CLAIMS_AT, 1), [0b100]);
    assert!(host.record().1.is_empty(), "something was written");
}
