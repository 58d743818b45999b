//! What changed, told by tables: between snapshots of an image, and above what it stands on.

mod common;

use std::time::SystemTime;

use common::{Bench, Cut, content, read_all};
use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::SnapshotChoice;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_backup::{
    Basis, Changes, CopyOptions, Difference, Everything, Form, GoOn, PointFacts, PointName,
    SnapshotFacts, UpperLevels,
};
use pollster::block_on;
use testkit::Random;

/// Runs, and snapshots of each.
const SEEDS: u64 = 5;
const SNAPSHOTS: usize = 5;

fn add<L: Layer, C: Changes>(bench: &Bench, name: &str, basis: Basis, disk: &L, changes: &C) {
    let points = bench.folder.points().unwrap();
    let mut facts = PointFacts::full(PointName::new(name).unwrap(), disk.size_bytes());
    if basis.is_incremental() {
        facts.stands_on = points.sound.last().map(lacuna_backup::Point::reference);
        facts.basis = basis;
    }
    block_on(async {
        let mut work = bench.folder.begin(facts, GoOn::default()).await?;
        work.copy(disk, changes, CopyOptions::default(), &mut |_| ()).await?;
        work.finish().await
    })
    .unwrap();
}

fn snapshots(seed: u64) {
    let mut random = Random::new(seed);
    let mut bench = match random.one_in(2) {
        true => Bench::new(Form::Segments, &mut random),
        false => Bench::over_raw(Form::Segments, &mut random),
    };
    let (mut expected, mut before) = (Vec::new(), None);
    for number in 0..SNAPSHOTS {
        bench.change(&mut random);
        let name = format!("s{number}");
        block_on(bench.image.create_snapshot(&name.as_str().into(), SystemTime::UNIX_EPOCH))
            .unwrap();
        let choice = SnapshotChoice::Name(name.as_str().into());
        let now = block_on(bench.image.snapshot(&choice)).unwrap();
        assert!(read_all(&now) == bench.model, "seed {seed}: snapshot {number}");
        match &before {
            None => add(&bench, &name, Basis::Full, &now, &Everything),
            Some(before) => {
                let since = SnapshotFacts::default();
                let difference = Difference { before, now: &now };
                add(&bench, &name, Basis::Snapshot { since }, &now, &difference);
            }
        }
        before = Some(now);
        expected.push((name, bench.model.clone()));
        for (name, disk) in &expected {
            assert!(content(&bench.folder, name) == *disk, "seed {seed}: {name} after {number}");
        }
    }
}

#[test]
fn differences_of_snapshots_miss_nothing() {
    (0..SEEDS).for_each(snapshots);
}

#[test]
fn a_snapshot_differs_from_the_one_before_by_what_was_written_alone() {
    let mut random = Random::new(3);
    let bench = Bench::over_raw(Form::Segments, &mut random);
    let snapshot = |name: &str| {
        block_on(bench.image.create_snapshot(&name.into(), SystemTime::UNIX_EPOCH)).unwrap();
        block_on(bench.image.snapshot(&SnapshotChoice::Name(name.into()))).unwrap()
    };
    let unit = bench.image.geometry().cluster_bytes();
    let write = |index: u64| {
        let bytes = Buffer::from(&vec![9; unit as usize][..]);
        block_on(bench.image.write(GuestOffset(index * unit), bytes, WriteFlags::empty()))
            .0
            .unwrap();
    };
    write(1);
    let one = snapshot("one");
    write(3);
    let two = snapshot("two");
    write(4);
    let found = block_on(Difference { before: &one, now: &two }.changes(one.whole())).unwrap();
    let dirty: Vec<GuestRange> =
        found.iter().filter(|run| run.is_dirty).map(|run| run.range).collect();
    assert_eq!(dirty, [GuestRange::new(GuestOffset(3 * unit), unit)]);
}

#[test]
fn what_upper_levels_hold_over_a_point_of_the_lower_one_is_the_disk() {
    for seed in 20..20 + SEEDS {
        let mut random = Random::new(seed);
        let mut base = Bench::new(Form::Segments, &mut random);
        base.change(&mut random);
        base.point("base", false, &mut random, Cut::Never);
        let size = (random.below(12) + 1) << 19;
        let mut top = base.overlay(size, &mut random);
        top.change(&mut random);
        let levels = UpperLevels { disk: &top.image, count: 1 };
        add(&top, "top", Basis::Levels { count: 1 }, &top.image, &levels);
        assert!(content(&top.folder, "top") == top.model, "seed {seed}");
        assert!(content(&top.folder, "base") == base.model, "seed {seed}");
    }
}
