//! Random changes of an image, a point after each lot, in both forms: every point reads as the disk was
//! then, whatever changed between, and however often the copy was cut off.

mod common;

use common::{Bench, Cut, content};
use lacuna_backup::Form;
use testkit::Random;

/// Runs, and points of each.
const SEEDS: u64 = 6;
const POINTS: usize = 5;

fn run(seed: u64, form: Form, cut: Cut) {
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
}

#[test]
fn every_point_of_segments_reads_as_the_disk_was() {
    (0..SEEDS).for_each(|seed| run(seed, Form::Segments, Cut::Never));
}

#[test]
fn every_point_of_images_reads_as_the_disk_was() {
    (0..SEEDS).for_each(|seed| run(seed, Form::Qcow2, Cut::Never));
}

#[test]
fn copies_that_are_cut_off_go_on_or_begin_anew_and_points_before_them_stay() {
    (100..100 + SEEDS).for_each(|seed| run(seed, Form::Segments, Cut::Often));
    (200..200 + SEEDS).for_each(|seed| run(seed, Form::Qcow2, Cut::Often));
}
