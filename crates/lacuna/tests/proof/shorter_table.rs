//! A file that gets much shorter gets a shorter refcount table, too; a crash leaves leaks at worst.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::Header;
use lacuna::qcow2::{Access, CompactOptions, CompactOrder, OpenOptions};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::ImageBuilder;
use testkit::sim::{Pace, SimHost};

use crate::case::{Case, Kind};
use crate::compacting::{With, assert_short, assert_sound, compact, options, view};
use crate::compacting_crash::crash_everywhere;

/// With counts of 64 bits and clusters of 512 bytes one cluster of refcount table is enough for 2 MiB.
const SIZE_BYTES: u64 = 3 << 20;
const CLUSTER: u64 = 512;

/// A disk that was full, and of which one cluster in sixty is left.
async fn thinned(kind: Kind) -> Case {
    let options = OpenOptions::new(Access::ReadWrite);
    let builder = ImageBuilder::new(kind.version, 9, SIZE_BYTES).refcount_order(6);
    let case = Case { image: builder.build().bytes, options, ..kind.build(1) };
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await.unwrap();
    let all = Buffer::from(&vec![7; SIZE_BYTES as usize][..]);
    image.write(GuestOffset(0), all, WriteFlags::empty()).await.0.unwrap();
    for first in (1..SIZE_BYTES / CLUSTER).step_by(60) {
        let len = 59.min(SIZE_BYTES / CLUSTER - first) * CLUSTER;
        let range = GuestRange::new(GuestOffset(first * CLUSTER), len);
        image.discard(range, DiscardMode::Full).await.unwrap();
    }
    image.close().await.unwrap();
    case.with_content(vec![host.content(0)])
}

fn table_clusters(case: &Case) -> u32 {
    Header::decode(&case.image.read_vec(0, 512)).unwrap().refcount_table.clusters
}

fn kind() -> Kind {
    Kind { refcount_order: 6, ..Kind::plain(9) }
}

#[test]
fn the_refcount_table_of_a_file_that_got_much_shorter_gets_shorter() {
    let kind = kind();
    let case = pollster::block_on(thinned(kind));
    let before = pollster::block_on(view(&case)).unwrap();
    assert!(table_clusters(&case) > 1);
    for order in [CompactOrder::Any, CompactOrder::Guest] {
        let options = CompactOptions { order, ..options(&kind) };
        let (after, _) = pollster::block_on(compact(&case, &options)).unwrap();
        assert_eq!(table_clusters(&after), 1, "{order:?}");
        let story = format!("{order:?}");
        assert_short(&after, 0, &story);
        assert_sound(&after, &before, &story);
    }
}

#[test]
fn a_crash_while_it_gets_shorter_leaves_leaks_at_worst() {
    let case = pollster::block_on(thinned(kind()));
    assert!(crash_everywhere(&case, With::default(), CompactOrder::Any, 1) > 5);
}
