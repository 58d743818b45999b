//! Compaction that puts data in guest order: where it lies afterwards, and what a crash in it leaves.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna::qcow2::format::{Header, L1Entry, L2Entry, SubclusterBitmap};
use lacuna::qcow2::{
    CompactOptions, CompactOrder, CompactPace, CompactReport, CompactStep, compact_estimate,
};
use testkit::sim::{Pace, SimHost};

use crate::case::{Case, Kind};
use crate::compacting::{
    With, assert_short, assert_sound, build, compact, options, pinned_kinds, view, with_all,
};
use crate::compacting_crash::{crash_kinds, unpinned_kinds};

fn in_order(kind: &Kind) -> CompactOptions {
    CompactOptions { order: CompactOrder::Guest, ..options(kind) }
}

/// Guest clusters of the active disk that have a host cluster, and which.
fn data_hosts(case: &Case) -> Vec<(u64, u64)> {
    let image = &case.image;
    let header = Header::decode(&image.read_vec(0, image.len().min(2 << 20) as usize)).unwrap();
    let (geometry, l1) = (header.geometry, header.l1);
    let width = geometry.entry_width();
    let words = image.read_vec(l1.offset.0, l1.entries as usize * 8);
    let mut found = Vec::new();
    for (index, word) in (0..).zip(words.as_chunks::<8>().0) {
        let Some(table) = L1Entry(u64::from_be_bytes(*word)).table() else { continue };
        let table = image.read_vec(table.0, geometry.cluster_bytes() as usize);
        for (within, entry) in (0..).zip(table.chunks_exact(width.bytes() as usize)) {
            if let Some(host) = entry_of(entry).host() {
                found.push((index * geometry.l2_entries() + within, geometry.host_cluster(host).0));
            }
        }
    }
    found
}

fn entry_of(bytes: &[u8]) -> L2Entry {
    let word =
        |index: usize| bytes.as_chunks::<8>().0.get(index).map_or(0, |it| u64::from_be_bytes(*it));
    L2Entry { word: word(0), subclusters: SubclusterBitmap(word(1)) }
}

/// Data of the active disk lies as the guest has it; who does it again moves nothing.
pub(crate) fn assert_in_order(after: &Case, report: &CompactReport, story: &str) {
    let hosts = data_hosts(after);
    let mut met = HashSet::new();
    let firsts: Vec<u64> =
        hosts.iter().map(|(_, host)| *host).filter(|host| met.insert(*host)).collect();
    assert!(firsts.is_sorted(), "{story}: {firsts:?}");
    let follows = |a: &(u64, u64), b: &(u64, u64)| a.0 + 1 == b.0 && a.1 + 1 == b.1;
    let runs = hosts.chunk_by(follows).count() as u64;
    let extents = report.extents.unwrap();
    assert_eq!(extents.after, runs, "{story}: {hosts:?}");
    let (_, again) = pollster::block_on(compact(after, &in_order(&after.kind))).unwrap();
    assert_eq!(again.moved_bytes, 0, "{story}: {again:?}");
}

/// Without snapshots, bitmaps and compressed clusters there is one run for each run of the guest.
#[test]
fn plain_data_has_no_more_runs_than_the_guest_and_is_moved_about_once() {
    for kind in [Kind::plain(9), Kind::plain(12), Kind { version: 2, ..Kind::plain(9) }] {
        let case = build(&kind, With::default(), 5);
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let storage = host.add_file(case.image.clone());
        let options = CompactOptions { memory_bytes: 1 << 20, ..in_order(&kind) };
        let estimate = pollster::block_on(compact_estimate(&storage, &options)).unwrap();
        let (after, report) = pollster::block_on(compact(&case, &options)).unwrap();
        let guest: Vec<u64> = data_hosts(&after).iter().map(|(guest, _)| *guest).collect();
        let runs = guest.chunk_by(|a, b| a + 1 == *b).count() as u64;
        let extents = report.extents.unwrap();
        assert_eq!((extents.after, estimate.extents), (runs, report.extents), "{kind:?}");
        assert!(extents.before > extents.after, "{kind:?}: {extents:?}");
        let most = estimate.moved_bytes * 3 / 2;
        assert!((1..=most).contains(&report.moved_bytes), "{kind:?}: {estimate:?} {report:?}");
        assert!(report.peak_extra_bytes <= options.batch_bytes.unwrap(), "{report:?}");
    }
}

#[test]
fn who_stops_it_anywhere_has_a_clean_image_and_comes_to_the_same_end() {
    for kind in [Kind::plain(9), Kind { extended: true, ..Kind::plain(14) }] {
        let case = build(&kind, with_all(&kind), 1);
        let before = pollster::block_on(view(&case)).unwrap();
        for last in [1, 3, 5, 8] {
            let story = format!("{kind:?} stopped after {last}");
            let calls = Arc::new(AtomicU64::new(0));
            let pace = CompactPace::new(move |_| {
                let is_last = calls.fetch_add(1, Ordering::Relaxed) + 1 == last;
                let step = if is_last { CompactStep::Stop } else { CompactStep::GoOn };
                Box::pin(std::future::ready(step))
            });
            let stopping = CompactOptions { pace: Some(pace), ..in_order(&kind) };
            let (half, report) = pollster::block_on(compact(&case, &stopping)).unwrap();
            assert!(report.is_stopped, "{story}: {report:?}");
            assert_sound(&half, &before, &story);
            let (whole, report) = pollster::block_on(compact(&half, &in_order(&kind))).unwrap();
            assert_short(&whole, 0, &story);
            assert_in_order(&whole, &report, &story);
        }
    }
}

#[test]
fn a_crash_leaves_leaks_at_worst_while_data_is_put_in_order() {
    let wider = unpinned_kinds(14).chain(pinned_kinds(14)).filter(|(kind, _)| kind.extended);
    crash_kinds(unpinned_kinds(9).chain(wider), CompactOrder::Guest);
}

#[test]
fn nor_does_it_leave_more_where_clusters_are_pinned() {
    crash_kinds(pinned_kinds(9), CompactOrder::Guest);
}
