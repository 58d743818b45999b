//! Random changes of an image, a point after each lot, in both forms: every point reads as the disk was
//! then, whatever changed between, and however often the copy was cut off.

mod common;

use common::{Bench, Cut, content};
use lacuna_backup::Form;
use testkit::Random;

/// Runs, and points of each.
const SEEDS: u64 = 4;
const POINTS: usize = 5;

/// Says how many copies went on.
fn run(seed: u64, form: Form, cut: Cut) -> u32 {
    let mut random = Random::new(seed);
    let mut bench = Bench::new(form, &mut random);
    let mut expected = Vec::new();
    for number in 0..POINTS {
        bench.change(&mut random);
        let name = format!("p{number}");
        bench.point(&name, number > 0 && !random.one_in(6), &mut random, cut);
        expected.push((name, bench.model.clone()));
        for (name, disk) in &expected {
            assert!(content(&bench.folder, name) == *disk, "seed {seed}: {name} after {number}");
        }
    }
    assert_eq!(bench.damage(), Vec::<String>::new(), "seed {seed}");
    bench.resumed.get()
}

#[test]
fn every_point_of_segments_reads_as_the_disk_was() {
    assert_eq!((0..SEEDS).map(|seed| run(seed, Form::Segments, Cut::Never)).sum::<u32>(), 0);
}

#[test]
fn every_point_of_images_reads_as_the_disk_was() {
    assert_eq!((0..SEEDS).map(|seed| run(seed, Form::Qcow2, Cut::Never)).sum::<u32>(), 0);
}

#[test]
fn copies_that_are_cut_off_go_on_or_begin_anew_and_points_before_them_stay() {
    for (seeds, form) in [(100..100 + SEEDS, Form::Segments), (200..200 + SEEDS, Form::Qcow2)] {
        let resumed: u32 = seeds.map(|seed| run(seed, form, Cut::Often)).sum();
        assert!(resumed > 0, "no copy in {} ever went on", form.name());
    }
}
