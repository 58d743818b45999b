//! What compaction may cost, by what it asks of storage: bytes written, and space meanwhile.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, CompactOptions, CompactOrder, CompactReport, Image, OpenOptions};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Effect, Event, Pace, SimHost, SimStorage};
use testkit::{ImageBuilder, SparseBytes};

use crate::case::{Case, Kind};
use crate::compacting::refcounts;

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 6000;
/// 1 % of the disk.
const BATCH: u64 = CLUSTERS / 100 * CLUSTER;

/// What a run did to the file.
#[derive(Debug)]
struct Cost {
    report: CompactReport,
    written: u64,
    /// The most that the file took at any time beyond what it took before.
    extra: u64,
    /// Live bytes beyond the end that the file has afterwards.
    beyond: u64,
}

fn case(image: SparseBytes) -> Case {
    let options = OpenOptions::new(Access::ReadWrite);
    Case { image, options, ..Kind::plain(12).build(1) }
}

/// A full disk of which some clusters were taken away again; the host has their space back.
async fn thinned(stays: fn(u64) -> bool) -> lacuna::Result<SparseBytes> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let empty = case(ImageBuilder::new(3, 12, CLUSTERS * CLUSTER).build().bytes);
    let image: Image<SimStorage> = empty.on(&host).open().await?;
    let all = Buffer::from(&vec![7; (CLUSTERS * CLUSTER) as usize][..]);
    image.write(GuestOffset(0), all, WriteFlags::empty()).await.0?;
    for cluster in (0..CLUSTERS).filter(|cluster| !stays(*cluster)) {
        let range = GuestRange::new(GuestOffset(cluster * CLUSTER), CLUSTER);
        image.discard(range, DiscardMode::Full).await?;
    }
    image.close().await?;
    let mut bytes = host.content(0);
    for (cluster, count) in (0..).zip(refcounts(&bytes)) {
        if count == 0 && cluster * CLUSTER < bytes.len() {
            bytes.punch(cluster * CLUSTER, (cluster + 1) * CLUSTER);
        }
    }
    Ok(bytes)
}

async fn cost(stays: fn(u64) -> bool, order: CompactOrder) -> lacuna::Result<Cost> {
    let before = thinned(stays).await?;
    let host = SimHost::new(Pace::AtOnce, 1);
    let image = case(before.clone()).on(&host).open().await?;
    host.start_record();
    let options = CompactOptions { batch_bytes: Some(BATCH), order, ..CompactOptions::default() };
    let report = image.compact(&options, &mut |_| ()).await?;
    let tail = refcounts(&before).into_iter().skip((report.after_bytes / CLUSTER) as usize);
    let beyond = tail.filter(|count| *count > 0).count() as u64 * CLUSTER;
    let (mut file, mut written, mut most) = (before.clone(), 0, 0);
    for event in host.record().1 {
        let Event::Issued { effect, .. } = event else { continue };
        if let Effect::Write { bytes, .. } = &effect {
            written += bytes.len() as u64;
        }
        effect.apply(&mut file);
        most = most.max(file.allocated_bytes());
    }
    let extra = most.saturating_sub(before.allocated_bytes());
    Ok(Cost { report, written, extra, beyond })
}

fn clustered(cluster: u64) -> bool {
    matches!(cluster, 500..1100 | 3000..3600 | 5200..5800)
}

fn spread(cluster: u64) -> bool {
    cluster.is_multiple_of(3)
}

#[test]
fn no_more_is_written_than_lies_beyond_the_end_and_space_is_bounded_by_a_batch() {
    for stays in [clustered as fn(u64) -> bool, spread] {
        let cost = pollster::block_on(cost(stays, CompactOrder::Any)).unwrap();
        let Cost { report, written, extra, beyond } = &cost;
        assert!(*beyond > CLUSTERS / 6 * CLUSTER, "{cost:?}");
        assert!(report.moved_bytes * 100 <= beyond * 105, "{cost:?}");
        assert_eq!(*written, report.moved_bytes + report.metadata_bytes, "{cost:?}");
        assert!(*extra <= BATCH, "{cost:?}");
    }
}

/// What lies in order already moves no more than towards the front, and once.
#[test]
fn putting_data_in_order_takes_no_more_space_either() {
    for stays in [clustered as fn(u64) -> bool, spread] {
        let cost = pollster::block_on(cost(stays, CompactOrder::Guest)).unwrap();
        let Cost { report, written, extra, .. } = &cost;
        let live = report.after_bytes;
        assert!(report.moved_bytes * 100 <= live * 105, "{cost:?}");
        assert_eq!(*written, report.moved_bytes + report.metadata_bytes, "{cost:?}");
        assert!(*extra <= BATCH, "{cost:?}");
    }
}
