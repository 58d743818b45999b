//! What a crash of a compaction leaves: leaks, and everything that can be read as it was. Repaired, it
//! is compacted again to the same end.

use lacuna::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use lacuna::qcow2::{CompactOptions, CompactOrder};
use testkit::foreign::{qemu_img_check, qemu_io};
use testkit::sim::{Pace, SimHost, crash};
use testkit::{Random, seeds};

use crate::case::{Case, Kind};
use crate::compacting::{
    View, With, all_kinds, assert_short, assert_sound, build, compact, differing, img, options,
    pinned_kinds, view, with_all,
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
                assert_leaks_are_all(&left, with).await?;
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
async fn assert_leaks_are_all(left: &Case, with: With) -> Result<(), String> {
    if is_dirty(left) && !with.snapshots && !left.kind.lazy {
        return Err("the dirty bit is set without need".to_owned());
    }
    let (_, report) = leaks_repaired(left).await;
    match report.corruptions_fixed {
        1.. if !may_be_more(left, with) => {
            Err(format!("more than leaks was to be repaired: {report:x?}"))
        }
        _ => Ok(()),
    }
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
