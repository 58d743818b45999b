//! A crash at every write of a repair: no state is worse than the damage, and another repair ends
//! where the first would have.

use std::collections::BTreeSet;

use lacuna::qcow2::check::{CheckOptions, CheckReport, Finding, FindingKind, Harm, Repair, check};
use lacuna::storage::Storage;
use testkit::SparseBytes;
use testkit::sim::{Pace, SimHost, crash};

use crate::damage::{Case, cases, snapshot_cases};
use crate::images::{Image, counts};

fn run<S: Storage>(storage: &S, repair: Repair) -> CheckReport {
    pollster::block_on(check(storage, &CheckOptions { repair }, &mut |_| {})).unwrap()
}

/// What is in danger: host clusters that somebody could overwrite by mistake, and whatever else is
/// harmful, by its place. (Not by what is there: a repair changes flags.)
pub(crate) fn harm(report: &CheckReport, cluster_bits: u32) -> BTreeSet<String> {
    // A table that is not aligned is never used, whatever it seems to say.
    let is_used =
        |finding: &&Finding| finding.location().is_none_or(|at| at.0 % (1 << cluster_bits) == 0);
    let is_harm = |finding: &&Finding| finding.harm() == Harm::Harmful && !finding.repaired;
    let place = |finding: &Finding| match &finding.kind {
        FindingKind::RefcountMismatch { cluster, .. } => format!("cluster {}", cluster.0),
        FindingKind::CopiedData { entry, .. } | FindingKind::CopiedTable { entry, .. } => {
            format!("cluster {}", (entry & 0x00ff_ffff_ffff_fe00) >> cluster_bits)
        }
        other => {
            let text = format!("{other:?}");
            format!("{} {:?}", text.split(' ').next().unwrap_or_default(), finding.location())
        }
    };
    report.findings.iter().filter(is_harm).filter(is_used).map(place).collect()
}

/// Returns how many states were looked at.
fn crash_everywhere(case: &Case) -> usize {
    let image = Image::new(case.options, "700M", case.commands);
    (case.damage)(&image);
    let damaged = image.bytes();
    let cluster_bits = u32::from_be_bytes(damaged[20..24].try_into().unwrap());
    let host = SimHost::new(Pace::AtOnce, 1);
    let storage = host.add_file(SparseBytes::from(damaged.as_slice()));
    let before = run(&storage, Repair::None);
    let after = run(&storage, Repair::All);
    let mut states = 0;
    for point in crash::points(&host) {
        for state in point.states(1, 12) {
            states += 1;
            let story =
                format!("{}: after event {}: {:?}", case.name, point.event, state.survivors);
            let file = &state.files[0];
            let host = SimHost::without_record(Pace::AtOnce, 1);
            let storage = host.add_file(file.clone());
            let found = run(&storage, Repair::None);
            let (was, is) = (harm(&before, cluster_bits), harm(&found, cluster_bits));
            let new: Vec<_> = is.difference(&was).collect();
            assert!(new.is_empty(), "{story}: new harm: {new:?}");
            let again = run(&storage, Repair::All);
            // Where it ends may lie further on: what was written before the crash stays there.
            let end = |report: &CheckReport| counts(report)[..7].to_vec();
            assert_eq!(end(&again), end(&after), "{story}: {:#?}", again.findings);
        }
    }
    states
}

#[test]
fn crash_at_any_write_of_a_repair_leaves_nothing_worse() {
    let states: usize = cases().iter().chain(&snapshot_cases()).map(crash_everywhere).sum();
    assert!(states > 500, "only {states} states: is anything written at all?");
}
