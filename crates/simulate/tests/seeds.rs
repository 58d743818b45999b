//! A fixed number of scenarios; that the same seed runs the same; that lies of storage are noticed.

use simulate::{Lie, Looks, shrink, simulate, simulate_parts};

const SEEDS: u64 = 150;

#[test]
fn nothing_is_found() {
    let looks = Looks { states: 3, qemu_every: Some(40), ..Looks::default() };
    let mut sum = simulate::Tally::default();
    for seed in testkit::seeds(SEEDS) {
        match simulate(seed, &looks) {
            Ok(tally) => sum += tally,
            Err(failure) => panic!("{}", shrink(failure, &looks)),
        }
    }
    println!("{sum:?}");
    assert!(sum.requests > 20 * sum.runs, "{sum:?}");
    assert!(sum.runs < SEEDS || sum.chores - sum.declined > SEEDS / 8, "{sum:?}");
    assert!(sum.runs < SEEDS || (sum.crashes > SEEDS / 3 && sum.by_qemu > 2), "{sum:?}");
}

#[test]
fn a_seed_runs_the_same_again() {
    let looks = Looks::default();
    for seed in 1..200 {
        assert_eq!(simulate(seed, &looks), simulate(seed, &looks), "seed {seed}");
    }
}

/// Storage that forgets is found out soon, and by few requests.
#[test]
fn storage_that_lies_is_noticed() {
    for lie in [Lie::Flushes, Lie::Write] {
        let looks = Looks { lie: Some(lie), ..Looks::default() };
        let found: Vec<_> = (1..60).filter_map(|seed| simulate(seed, &looks).err()).collect();
        assert!(found.len() > 5, "{lie:?} was noticed {} times in 59", found.len());
        let least = shrink(found[0].clone(), &looks).least.unwrap();
        assert!(least.parts.len() < 40, "{lie:?}: {least:?}");
        simulate_parts(found[0].seed, &least.parts, &looks).unwrap_err();
    }
}

/// In chains of three: what the image in between holds is missed when a rebase does not copy it.
#[test]
fn what_a_rebase_onto_the_base_loses_is_noticed() {
    let looks = Looks { lie: Some(Lie::Shared), ..Looks::default() };
    let found = (1..3000).find_map(|seed| simulate(seed, &looks).err()).unwrap();
    let least = shrink(found, &looks).least.unwrap();
    assert!(least.parts.len() < 10 && least.story.contains("RebaseOntoBase"), "{least:?}");
}

/// What our own client hands on is judged, too.
#[test]
fn a_wire_that_changes_a_byte_is_noticed() {
    let looks = Looks { lie: Some(Lie::Wire), ..Looks::default() };
    let found = (1..500).find_map(|seed| simulate(seed, &looks).err()).unwrap();
    let least = shrink(found, &looks).least.unwrap();
    assert!(least.story.contains("Remote"), "{least:?}");
}
