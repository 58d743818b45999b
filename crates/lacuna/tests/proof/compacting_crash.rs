//! What a crash of a compaction leaves: leaks, and everything that can be read as it was. Repaired, it
//! is compacted again to the same end.

use std::collections::BTreeMap;

use lacuna::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use lacuna::qcow2::format::L1Entry;
use lacuna::qcow2::{Access, CompactOptions, CompactOrder, OpenOptions};
use lacuna::units::HostOffset;
use testkit::foreign::{qemu_img_check, qemu_io};
use testkit::sim::{Pace, SimHost, crash};
use testkit::{Random, seeds};

use crate::case::{Case, Kind};
use crate::compacting::{
    View, With, all_kinds, assert_short, assert_sound, build, compact, differing, img, options,
    pinned_kinds, refcounts, view, with_all,
};
use crate::drive::{assert_safe, is_dirty};

/// States per crash point where not all can be looked at.
const STATES: usize = 5;
/// About so many crash points are looked at; with `LACUNA_LONG` all.
const POINTS: usize = 40;
/// One in this many states is compacted again and shown to qemu-img.
const SAMPLE: usize = 40;

/// Looks at every state that a crash may leave.
pub(crate) fn crash_everywhere(case: &Case, with: With, order: CompactOrder, seed: u64) -> usize {
    let kind = &case.kind;
    let options = CompactOptions { order, ..options(kind) };
    let before = pollster::block_on(view(case)).unwrap();
    let host = SimHost::new(Pace::AtOnce, 1);
    let files = case.on(&host);
    host.start_record();
    let report =
        pollster::block_on(async { files.open().await?.compact(&options, &mut |_| ()).await });
    let goal = report.unwrap().after_bytes;
    let mut count = 0;
    let mut random = Random::new(seed);
    let points = crash::points(&host);
    let one_in = match std::env::var_os("LACUNA_LONG") {
        Some(_) => 1,
        None => (points.len() / POINTS).max(1) as u64,
    };
    for point in points {
        if !random.one_in(one_in) {
            continue;
        }
        for state in point.states(seed, STATES) {
            count += 1;
            let left = case.with_content(state.files);
            let run = async {
                examine(&left, &before).await?;
                assert_leaks_are_all(&left, &before, with).await?;
                match count % SAMPLE {
                    1 => go_on(&left, &before, goal, (with, order)).await,
                    _ => Ok(()),
                }
            };
            let examined = pollster::block_on(run);
            if let Err(error) = examined {
                let story = state.survivors.join("\n  ");
                panic!(
                    "LACUNA_SEED={seed} {kind:?} {with:?} {order:?} event {}: {error}\n  {story}",
                    point.event
                );
            }
        }
    }
    count
}

pub(crate) async fn examine(left: &Case, before: &View) -> Result<(), String> {
    assert_safe(left, false).await?;
    let seen = view(left).await.map_err(|error| format!("Reading: {error}"))?;
    let differing = differing(&seen, before);
    if differing.is_empty() { Ok(()) } else { Err(format!("{differing} read otherwise")) }
}

/// Once leaks are repaired nothing is wrong, also for a repair that does nothing else, as QEMU's. Where
/// the disk shares clusters with snapshots the dirty bit says that more is to be done, in version 3.
async fn assert_leaks_are_all(left: &Case, before: &View, with: With) -> Result<(), String> {
    if is_dirty(left) && !with.snapshots && !left.kind.lazy {
        return Err("the dirty bit is set without need".to_owned());
    }
    let (repaired, report) = leaks_repaired(left).await;
    let shown = shown(&repaired).await;
    if shown != before.shown {
        return Err(format!("pins hold what is shown {shown:?} times, not {:?}", before.shown));
    }
    match report.corruptions_fixed {
        1.. if !may_be_more(left, with) => {
            Err(format!("more than leaks was to be repaired: {report:x?}"))
        }
        _ => Ok(()),
    }
}

/// Counts references to clusters that are pinned, other than by pins: each sharer has a pin beside it as
/// long as these do not become fewer. A crash may leave a cluster with two pins.
pub(crate) async fn shown(case: &Case) -> Option<u64> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let mut files = case.on(&host);
    files.options = OpenOptions::new(Access::ReadOnly);
    let image = files.open().await.unwrap();
    let geometry = image.geometry();
    let pin = image.snapshots().await.unwrap().into_iter().find(|it| it.is_pin())?;
    let table = |at: HostOffset, bytes: u64| case.image.read_vec(at.0, bytes as usize);
    let words = |bytes: Vec<u8>, step: u64| -> Vec<u64> {
        let words = bytes.as_chunks::<8>().0.iter().step_by(step as usize / 8);
        words.map(|word| u64::from_be_bytes(*word)).collect()
    };
    let mut pins: BTreeMap<u64, u64> = BTreeMap::new();
    for name in words(table(pin.l1.offset, u64::from(pin.l1.entries) * 8), 8) {
        let Some(at) = L1Entry(name).table() else { continue };
        let width = geometry.entry_width().bytes();
        let held = words(table(at, geometry.cluster_bytes()), width);
        held.into_iter().filter(|word| *word != 0).for_each(|word| {
            *pins.entry(geometry.host_cluster(HostOffset(word)).0).or_default() += 1;
        });
    }
    let counts = refcounts(&case.image);
    Some(pins.into_iter().map(|(cluster, pins)| counts[cluster as usize] - pins).sum())
}

/// Says whether a repair of leaks may leave something to be repaired.
fn may_be_more(left: &Case, with: With) -> bool {
    is_dirty(left) || left.kind.version == 2 && (with.snapshots || left.kind.shared_zero)
}

/// Stock QEMU finds nothing wrong once it has done what the image asks it for.
fn assert_stock_repairs(left: &Case, with: With) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = left.save(folder.path());
    match is_dirty(left) {
        true => drop(qemu_io(&path, ["flush".to_owned()])),
        false if may_be_more(left, with) => return Ok(()),
        false => img(&path, &["check", "-q", "-r", "leaks", "@"]),
    }
    let found = qemu_img_check(&path);
    if found.is_clean() { Ok(()) } else { Err(format!("after stock's repair: {}", found.text)) }
}

/// Repairs what a crash left, compacts it and comes to the same end.
async fn go_on(
    left: &Case,
    before: &View,
    goal: u64,
    (with, order): (With, CompactOrder),
) -> Result<(), String> {
    assert_safe(left, true).await?;
    assert_stock_repairs(left, with)?;
    let repaired = repaired(left).await;
    let options = CompactOptions { order, ..options(&left.kind) };
    let (again, _) =
        compact(&repaired, &options).await.map_err(|error| format!("Again: {error}"))?;
    // Streams that were packed half-way may come to lie otherwise, and what was shared may be there
    // twice, as much as a batch.
    let streams = if with.streams { 8 } else { 0 };
    let shared = if with.pins || with.snapshots { 9 } else { 0 };
    let slack = (streams + shared) * left.kind.cluster_bytes();
    if again.image.len().abs_diff(goal) > slack {
        return Err(format!("Again: {:#x} bytes, not {goal:#x}", again.image.len()));
    }
    // One that ends in the last cluster needs two holes that are neighbours.
    assert_short(&again, usize::from(with.streams), "again");
    assert_sound(&again, before, "again");
    Ok(())
}

async fn repaired(left: &Case) -> Case {
    let (repaired, report) = leaks_repaired(left).await;
    assert!(report.is_clean(), "{report:?}");
    repaired
}

async fn leaks_repaired(left: &Case) -> (Case, CheckReport) {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = host.add_file(left.image.clone());
    let options = CheckOptions { repair: Repair::Leaks };
    let report = check(&storage, &options, &mut |_| {}).await.unwrap();
    (left.with_content(vec![host.content(0)]), report)
}

pub(crate) fn crash_kinds(kinds: impl IntoIterator<Item = (Kind, With)>, order: CompactOrder) {
    for (kind, with) in kinds {
        for seed in seeds(1) {
            let count = crash_everywhere(&build(&kind, with, seed), with, order, seed);
            println!("{kind:?}: {count} states");
            assert!(count > 5, "{kind:?}: only {count} states");
        }
    }
}

pub(crate) fn unpinned_kinds(cluster_bits: u32) -> impl Iterator<Item = (Kind, With)> {
    all_kinds(cluster_bits).into_iter().map(|kind| (kind, with_all(&kind)))
}

#[test]
fn a_crash_leaves_leaks_at_worst_with_small_clusters() {
    crash_kinds(unpinned_kinds(9), CompactOrder::Any);
}

#[test]
fn a_crash_leaves_leaks_at_worst_with_larger_clusters() {
    crash_kinds(unpinned_kinds(14), CompactOrder::Any);
}

#[test]
fn a_crash_leaves_leaks_at_worst_where_clusters_are_pinned() {
    let wider = pinned_kinds(14).filter(|(kind, _)| kind.extended);
    crash_kinds(pinned_kinds(9).chain(wider), CompactOrder::Any);
}
