//! Compaction of clusters that are pinned, and not by snapshots: a repair of leaks is all that a crash
//! makes necessary, in both versions, also by stock QEMU; with free entries for second pins and without.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{DedupOptions, dedup};
use lacuna::qcow2::{Access, CompactOptions, CompactOrder, Image, OpenOptions};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost};

use crate::case::{Case, Kind};
use crate::compacting::{With, assert_short, assert_sound, compact, options, pinned_kinds, view};
use crate::compacting_crash::{crash_everywhere, crash_kinds};

/// As many pins as a table has entries.
const PINS: u64 = 64;
/// Clusters in front of what is shared.
const BEFORE: u64 = 40;
/// What such an image has beside pins.
const ALONE: With = With { snapshots: false, bitmaps: false, streams: false, pins: true };

async fn write<S: Storage>(image: &Image<S>, cluster: u64, at: u64, seed: u8) {
    let bytes = Buffer::from(&vec![seed; cluster as usize][..]);
    let at = GuestOffset(at * cluster);
    image.write(at, bytes, WriteFlags::empty()).await.0.unwrap();
}

/// Pairs of equal clusters, which fill a table of pins, behind clusters that are gone.
async fn pairs(kind: &Kind) -> Case {
    let cluster = kind.cluster_bytes();
    let case = Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(1) };
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await.unwrap();
    for at in 0..BEFORE {
        write(&image, cluster, at, 100 + at as u8).await;
    }
    for at in 0..2 * PINS {
        write(&image, cluster, BEFORE + at, 1 + (at % PINS) as u8).await;
    }
    let done = dedup(&image, DedupOptions::default(), &mut |_| ()).await.unwrap();
    assert_eq!(done.keepers, PINS, "{kind:?}: {done:?}");
    // An L1 table, and one that is full.
    assert_eq!(image.pin_facts().await.unwrap().unwrap().table_bytes, 2 * cluster, "{kind:?}");
    let range = GuestRange::new(GuestOffset(cluster), (BEFORE - 2) * cluster);
    image.discard(range, DiscardMode::Full).await.unwrap();
    image.close().await.unwrap();
    case.with_content(vec![host.content(0)])
}

fn kinds() -> [Kind; 3] {
    let plain = Kind::plain(9);
    [plain, Kind { version: 2, ..plain }, Kind { refcount_order: 3, ..plain }]
}

#[test]
fn tables_that_were_added_for_the_time_are_gone_at_the_end() {
    for kind in kinds() {
        let case = pollster::block_on(pairs(&kind));
        let before = pollster::block_on(view(&case)).unwrap();
        for order in [CompactOrder::Any, CompactOrder::Guest] {
            let options = CompactOptions { order, ..options(&kind) };
            let (after, report) = pollster::block_on(compact(&case, &options)).unwrap();
            assert!(report.moved.data >= PINS, "{report:?}");
            let story = format!("{kind:?} {order:?}");
            assert_short(&after, 0, &story);
            assert_sound(&after, &before, &story);
        }
    }
}

#[test]
fn a_crash_leaves_nothing_but_leaks_where_no_entry_is_free_for_a_pin() {
    for kind in kinds() {
        let case = pollster::block_on(pairs(&kind));
        for order in [CompactOrder::Any, CompactOrder::Guest] {
            assert!(crash_everywhere(&case, ALONE, order, 1) > 5);
        }
    }
}

#[test]
fn a_crash_leaves_nothing_but_leaks_without_snapshots() {
    for order in [CompactOrder::Any, CompactOrder::Guest] {
        let merely = |(kind, with): (Kind, With)| (kind, With { snapshots: false, ..with });
        let wider = pinned_kinds(14).filter(|(kind, _)| kind.extended);
        crash_kinds(
            pinned_kinds(9).chain(wider).map(merely).filter(|k| k.0.refcount_order == 3),
            order,
        );
    }
}
